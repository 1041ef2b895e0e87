"""PyTorch: whether code runs on fake tensors, which have shapes and no values.

Internals used: `detect_fake_mode`, which works in the threads of autograd too.
"""

from torch._guards import detect_fake_mode


def is_traced() -> bool:
    """Whether the caller runs on fake tensors."""
    return detect_fake_mode() is not None
