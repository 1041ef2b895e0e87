"""What can go wrong, by name.

HandloomError
├── ArgumentError             (ValueError, TypeError)  an argument that a function does not take
├── BackendNotInstalledError  (ImportError)   the chosen backend is not installed, or not supported
├── ExtraNotInstalledError    (ImportError)   a library that a feature needs is not installed
├── GradientError             (ValueError)    something that cannot be differentiated
├── TraceError                (TypeError)     a step that does in Python what must be an operation
├── VariableError             (ValueError)    a variable created too late, or on every call
├── StepError                 (TypeError)     a step that takes or returns something that cannot be used
├── DataError                 (ValueError)    data that cannot be batched, or contradicts itself
├── OptimizerError            (ValueError)    an optimizer without variables, or variables without an optimizer
├── CheckpointError           (ValueError)    a checkpoint that is damaged, of something else, or cannot be written
├── ExportError               (ValueError)    a model that cannot be exported in that format on this backend
├── SavedModelError           (ValueError)    a saved model with classes or functions that are not known
└── RecipeError               (ValueError)    a recipe that does not exist or does not run

HandloomWarning (UserWarning)
├── RetraceWarning            one argument makes a function compile again and again
└── FallbackWarning           a step falls back to eager execution, or to a slower way

A class of its own is deserved where a caller may want to catch just that; each also is the
built-in exception that Python programmers expect in its place. Each carries a `Finding`.
"""

import dataclasses

from handloom._util.source_line import users_frame as _users_frame

__all__ = [
    "ArgumentError",
    "BackendNotInstalledError",
    "CheckpointError",
    "DataError",
    "ExportError",
    "ExtraNotInstalledError",
    "FallbackWarning",
    "Finding",
    "GradientError",
    "HandloomError",
    "HandloomWarning",
    "OptimizerError",
    "RecipeError",
    "RetraceWarning",
    "SavedModelError",
    "StepError",
    "TraceError",
    "VariableError",
]


@dataclasses.dataclass(frozen=True)
class Finding:
    """A mistake that was found.

    Attributes:
        code: The stable code of the message, such as `"HL210"`; `docs/messages.md` lists them.
        filename: The user's file that it is about.
        lineno: The line in it, counted from 1.
        saw: What was seen.
        why: Why it is wrong, where that does not go without saying.
        fix: What to do instead, if there is one thing to do.
    """

    code: str
    filename: str
    lineno: int
    saw: str
    why: str = ""
    fix: str = ""

    def __str__(self) -> str:
        return " ".join([*filter(None, (self.saw, self.why, self.fix)), f"[{self.code}]"])


class _Told(Exception):
    """An exception that carries a finding.

    Args:
        saw: The code and what was seen: `"HL210: What was seen."`
        why: Why it is wrong.
        fix: What to do instead.
        at: File and line; by default the line of the user's that led here.
    """

    finding: Finding

    def __init__(self, saw: str, why: str = "", fix: str = "", *, at: tuple[str, int] | None = None) -> None:
        super().__init__(saw, why, fix)
        if at is None:
            frame = _users_frame()
            at = frame.f_code.co_filename, frame.f_lineno
        code, _, saw = saw.partition(": ")
        self.finding = Finding(code, *at, saw, why, fix)

    def __str__(self) -> str:
        return str(self.finding)


class HandloomError(_Told):
    """Base of all errors raised by Handloom itself.

    Attributes:
        finding: What was found, where, and what to do instead.
    """


class ArgumentError(HandloomError, ValueError, TypeError):
    """A function was given an argument that it does not take."""


class BackendNotInstalledError(HandloomError, ImportError):
    """The backend that Keras is set to cannot be imported, or is not one Handloom runs on."""


class ExtraNotInstalledError(HandloomError, ImportError):
    """A feature needs a library that is not installed."""


class GradientError(HandloomError, ValueError):
    """A gradient was asked of something that has none: no scalar, or nothing differentiable."""


class TraceError(HandloomError, TypeError):
    """A compiled step used a tensor where Python needs a number, as in `if loss < 1:`."""


class VariableError(HandloomError, ValueError):
    """A variable was created after the first call of a compiled function, or on every call."""


class StepError(HandloomError, TypeError):
    """A step takes arguments, or returns results, that a loop cannot use."""


class DataError(HandloomError, ValueError):
    """The data cannot be batched, or contradicts itself."""


class OptimizerError(HandloomError, ValueError):
    """An optimizer owns no variables, or variables belong to several optimizers or to none."""


class CheckpointError(HandloomError, ValueError):
    """A checkpoint cannot be written, or what is there is damaged, unsafe, or does not fit what it is to restore."""


class ExportError(HandloomError, ValueError):
    """The backend cannot export a model in the format asked for."""


class SavedModelError(HandloomError, ValueError):
    """A saved model has parts that are not known where it is loaded."""


class RecipeError(HandloomError, ValueError):
    """No such recipe, or a file that holds none."""


class HandloomWarning(_Told, UserWarning):
    """Base of all warnings given by Handloom itself.

    Attributes:
        finding: What was found, where, and what to do instead.
    """


class RetraceWarning(HandloomWarning):
    """A Python value that changes from call to call compiles a function again each time."""


class FallbackWarning(HandloomWarning):
    """A step falls back to eager execution, or to another slower way."""
