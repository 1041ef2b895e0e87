"""PyTorch: whether code runs on stand-ins for tensors, which have shapes and no values.

Internals used: `detect_fake_mode`, which also finds the mode in the threads in which autograd runs backward passes.
"""

from torch._guards import detect_fake_mode


def is_traced() -> bool:
    """Whether the caller runs on stand-ins."""
    return detect_fake_mode() is not None
