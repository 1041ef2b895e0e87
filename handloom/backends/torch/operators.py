"""PyTorch: the operators that its own refuse: `@` between dtypes, `-` with booleans, any with a NumPy array."""

from typing import Any

import numpy as np
import torch

from handloom.backends.operators import dtype_of, promotes, promoting


def _needs_keras(name: str, tensor: torch.Tensor, other: Any) -> bool:
    one, two = dtype_of(tensor), dtype_of(other)
    if one is None or two is None:
        return False
    if isinstance(other, np.ndarray) or (name == "matmul" and promotes(one, two)):
        return True
    return name == "sub" and (one == "bool") != (two in ("bool", bool))


operators_of_keras = promoting(torch.Tensor, _needs_keras)
