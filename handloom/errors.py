"""The errors and warnings of Handloom.

HandloomError
├── ArgumentError             (ValueError, TypeError)  an argument that a function does not accept
├── BackendNotInstalledError  (ImportError)   the chosen backend is not installed, or not supported
├── ExtraNotInstalledError    (ImportError)   a library that a feature needs is not installed
├── GradientError             (ValueError)    a value that has no gradient
├── TraceError                (TypeError)     a step that uses the value of a tensor in Python
├── VariableError             (ValueError)    a variable created too late, or on every call
├── StepError                 (TypeError)     a step that takes or returns something that cannot be used
├── DataError                 (ValueError)    data that cannot be batched, or contradicts itself
├── OptimizerError            (ValueError)    an optimizer without variables, or variables without an optimizer
├── CheckpointError           (ValueError)    a checkpoint that is damaged, does not fit, or cannot be written
├── ExportError               (ValueError)    a model that cannot be exported in that format on this backend
├── SavedModelError           (ValueError)    a saved model with unknown classes or functions
└── RecipeError               (ValueError)    a recipe that does not exist or does not run

HandloomWarning (UserWarning)
├── RetraceWarning            an argument makes a function compile again and again
├── SlowCompilationWarning    a function is traced or compiled for long; logged, since it need not be a mistake
└── FallbackWarning           a step falls back to eager execution, or to another slower way

An error has a class of its own if a caller may want to catch it alone. Each class also derives from the
built-in exception that Python programmers expect. Each error carries a `Finding`.
"""

from dataclasses import dataclass as _dataclass

from handloom._util.source_line import users_frame as _users_frame


@_dataclass(frozen=True)
class Finding:
    """A mistake that was found.

    Attributes:
        code: The stable code of the message, such as `"HL204"`; `docs/messages.md` lists them.
        filename: The user's file.
        lineno: The line in the file, counted from 1.
        saw: What was seen.
        why: Why it is wrong, unless that is obvious.
        fix: What to do instead, if that is known.
    """

    code: str
    filename: str
    lineno: int
    saw: str
    why: str = ""
    fix: str = ""

    def __str__(self) -> str:
        return " ".join([*filter(None, (self.saw, self.why, self.fix)), f"[{self.code}]"])


class _WithFinding(Exception):
    """An exception that carries a finding.

    Args:
        saw: The code and what was seen: `"HL204: Something was seen."`
        why: Why it is wrong.
        fix: What to do instead.
        at: File and line; by default the innermost line of the user's code.
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


class HandloomError(_WithFinding):
    """Base of all errors raised by Handloom itself.

    Attributes:
        finding: The mistake, its place, and the fix.
    """

    _keras_call_info_injected = True  # Otherwise Keras would raise one from `Layer.call` anew, with another message.


class ArgumentError(HandloomError, ValueError, TypeError):
    """A function received an argument that it does not accept."""


class BackendNotInstalledError(HandloomError, ImportError):
    """The backend that Keras is set to cannot be imported, or is not one Handloom runs on."""


class ExtraNotInstalledError(HandloomError, ImportError):
    """A feature needs a library that is not installed."""


class GradientError(HandloomError, ValueError):
    """A value has no gradient: it is not a scalar, or depends on nothing differentiable."""


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
    """A checkpoint cannot be written, is damaged or unsafe, or does not fit the state to restore."""


class ExportError(HandloomError, ValueError):
    """The backend cannot export a model in the requested format."""


class SavedModelError(HandloomError, ValueError):
    """A saved model has classes or functions that are unknown in this process."""


class RecipeError(HandloomError, ValueError):
    """A recipe does not exist, or a file has no recipe."""


class HandloomWarning(_WithFinding, UserWarning):
    """Base of all warnings given by Handloom itself.

    Attributes:
        finding: The mistake, its place, and the fix.
    """


class RetraceWarning(HandloomWarning):
    """A Python value or a shape that changes from call to call compiles a function again each time."""


class SlowCompilationWarning(HandloomWarning):
    """A function is still being traced or compiled. Logged by the logger `handloom`, since it need not be a mistake."""


class FallbackWarning(HandloomWarning):
    """A step falls back to eager execution, or to another slower way."""


__all__ = [name for name in dir() if not name.startswith("_")]
