"""PyTorch: torch's own modules and optimizers in a step, while it is traced.

The values of Keras variables are fake tensors then; the parameters of torch's own modules are real. A trace may read
them. What would change them, or leave gradients of fake tensors with them, is refused before it happens: the step runs
eagerly.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses import FakeTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode

from handloom._util.patch import Patch
from handloom.backends.dependencies import reached
from handloom.backends.program import Untraceable
from handloom.backends.torch.fake import is_traced

_REQUIRES_GRAD: Any = torch.Tensor.requires_grad
_FREEZES = _REQUIRES_GRAD.__set__
_INSTEAD = "To compile it, use a Keras optimizer, and keras.layers.TorchModuleWrapper(module) for a module of torch"


@contextlib.contextmanager
def real_tensors_kept() -> Iterator[None]:
    """A block that leaves all real tensors, and their gradients, as they are.

    Raises:
        Untraceable: The code in the block would change one.
    """
    with _checks_leaves, _NoChanges():
        yield


class _NoChanges(TorchFunctionMode):
    """Refuses functions that change a real tensor."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        sets = name == "__set__" and func != _FREEZES  # Such as `grad`; Keras freezes a layer by the other.
        changed = [*(args[:1] if changes_first(func) or sets else ()), kwargs.get("out")]
        if any(map(_is_real, changed)) and is_traced():
            raise _untraceable(f"{name} changes a tensor of torch that is not the value of a Keras variable")
        return func(*args, **kwargs)


def changes_first(func: Callable[..., Any]) -> bool:
    """Whether a function of torch changes its first argument: `add_`, `__iadd__` or `__setitem__`."""
    name = getattr(func, "__name__", "")
    if name.endswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and hasattr(torch.Tensor, f"__{name[3:]}"))
    return name.endswith("_")


def _checking_leaves(original: Callable[..., None]) -> Callable[..., None]:
    def backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
        starts = [tensors] if isinstance(tensors, torch.Tensor) else tensors
        nodes = reached([tensor.grad_fn for tensor in starts if tensor.grad_fn is not None], _followed)
        if any(_is_real(getattr(node, "variable", None)) for node in nodes):
            raise _untraceable(f"backward() reaches tensors that are not the values of Keras variables. {_INSTEAD}")
        original(tensors, *args, **kwargs)

    return backward


def _followed(node: Any) -> list[Any]:
    return [after for after, _ in node.next_functions if after is not None]


_checks_leaves = Patch((torch.autograd, "backward", _checking_leaves), when=is_traced)


def _untraceable(reason: str) -> Untraceable:
    return Untraceable(reason, unsaved=["modules, optimizers or tensors of torch"])


def _is_real(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and not isinstance(tensor, FakeTensor)


def _refuse_in_trace(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if is_traced():
        raise _untraceable(f"torch.optim.{type(optimizer).__name__} has a state of its own. {_INSTEAD}")


# For good: to remove it again would disturb another thread that is running the hooks.
register_optimizer_step_pre_hook(_refuse_in_trace)
