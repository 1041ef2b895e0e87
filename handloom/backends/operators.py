"""Python's operators promote dtypes as `keras.ops` do, where the framework's own refuse or do otherwise.

Only operands that need it go through `keras.ops`; all others keep the framework's own operator.
"""

import functools
import re
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from handloom._keras import Tensor, keras
from handloom._util.patch import Replacement

ops = keras.ops

Needs: TypeAlias = Callable[[str, Any, Any], bool]
"""Takes the name of an operator, a tensor and the other operand; whether the framework's own operator does not do."""

TWO_WAYS = {
    "add": ops.add,
    "sub": ops.subtract,
    "mul": ops.multiply,
    "truediv": ops.true_divide,
    "floordiv": ops.floor_divide,
    "mod": ops.mod,
    "pow": ops.power,
    "matmul": ops.matmul,
    "and": ops.bitwise_and,
    "or": ops.bitwise_or,
    "xor": ops.bitwise_xor,
}
COMPARISONS = {
    "lt": ops.less,
    "le": ops.less_equal,
    "gt": ops.greater,
    "ge": ops.greater_equal,
    "eq": ops.equal,
    "ne": ops.not_equal,
}


def promoting(tensor: type, needs: Needs) -> list[Replacement]:
    """The operators of a class of tensors, replaced by those of `keras.ops` for the operands that need it."""
    forward = [(tensor, f"__{name}__", _either(name, op, needs)) for name, op in {**TWO_WAYS, **COMPARISONS}.items()]
    return forward + [(tensor, f"__r{name}__", _either(name, _reflected(op), needs)) for name, op in TWO_WAYS.items()]


def _either(name: str, op: Callable[..., Tensor], needs: Needs) -> Callable[[Any], Any]:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Tensor, other: Any) -> Any:
            return op(self, _converted(other)) if needs(name, self, other) else original(self, other)

        return call

    return make


def _reflected(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda self, other: op(other, self)


def _converted(other: Any) -> Any:
    """An operand by the rule for data: 64-bit floats of NumPy become `floatx`, and single ones Python's."""
    if isinstance(other, float):
        return float(other)
    is_double = isinstance(other, np.ndarray) and other.dtype == np.float64
    return other.astype(keras.config.floatx()) if is_double else other


def dtype_of(operand: Any) -> Any:
    """The dtype of a tensor, array or variable by name, the class of a Python number; `None` for anything else."""
    if isinstance(operand, (bool, int, float)):  # NumPy's scalars of 64 bits are floats too.
        return next(kind for kind in (bool, int, float) if isinstance(operand, kind))
    dtype = getattr(operand, "dtype", None)
    name = getattr(dtype, "name", None) or str(dtype).removeprefix("torch.")
    return name if _REAL.fullmatch(name) else None


_REAL = re.compile(r"bool|u?int\d+|b?float\d+")


@functools.cache
def promotes(one: Any, other: Any) -> bool:
    """Whether an operand of a dtype becomes another by an operand of another dtype, or the other way round."""
    kinds = [kind for kind in (one, other) if isinstance(kind, str)]
    common = keras.backend.result_type(one, other)
    return any(kind != common for kind in kinds)
