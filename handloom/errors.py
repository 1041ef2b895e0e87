"""What can go wrong, by name.

HandloomError
├── BackendNotInstalledError  (ImportError)   the chosen backend is not there, or not one of ours
├── GradientError             (ValueError)    what was to be differentiated cannot be
├── TraceError                (TypeError)     a step does in Python what must be an operation
├── VariableError             (ValueError)    a variable was made too late, or on every call
├── StepError                 (TypeError)     a step takes or returns what cannot be used
├── DataError                 (ValueError)    data that no step could be given
├── OptimizerError            (ValueError)    an optimizer without variables, or variables without an optimizer
├── CheckpointError           (ValueError)    a checkpoint that is damaged, of something else, or cannot be written
├── ExportError               (ValueError)    a model that cannot be exported in that format on this backend
├── SavedModelError           (ValueError)    a saved model with parts that are not known here
└── RecipeError               (ValueError)    a recipe that is not there or does not run

HandloomWarning (UserWarning)
├── RetraceWarning            one argument makes a function compile again and again
└── FallbackWarning           a step runs op by op because it could not be compiled

A class of its own is deserved where a caller may want to catch just that; each also is the
built-in exception that Python programmers expect in its place.
"""

__all__ = [
    "BackendNotInstalledError",
    "CheckpointError",
    "DataError",
    "ExportError",
    "FallbackWarning",
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


class HandloomError(Exception):
    """Base of all errors raised by Handloom itself."""


class BackendNotInstalledError(HandloomError, ImportError):
    """The backend that Keras is set to cannot be imported, or is not one Handloom runs on."""


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
    """An optimizer owns no variables, shares some, or leaves some to nobody."""


class CheckpointError(HandloomError, ValueError):
    """A checkpoint cannot be written, or what is there is damaged, unsafe, or does not fit what it is to restore."""


class ExportError(HandloomError, ValueError):
    """The backend cannot export a model in the format asked for."""


class SavedModelError(HandloomError, ValueError):
    """A saved model has parts that are not known where it is loaded."""


class RecipeError(HandloomError, ValueError):
    """No such recipe, or a file that holds none."""


class HandloomWarning(UserWarning):
    """Base of all warnings given by Handloom itself."""


class RetraceWarning(HandloomWarning):
    """A Python value that changes from call to call compiles a function anew each time."""


class FallbackWarning(HandloomWarning):
    """A step could not be compiled and runs op by op instead."""
