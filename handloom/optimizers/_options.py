"""Moved to `_tree`."""

from handloom.optimizers._tree import check_options  # noqa: F401
