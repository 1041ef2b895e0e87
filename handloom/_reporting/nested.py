"""Runs within runs: a callback may evaluate, or train, while an epoch is in progress."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from handloom._reporting.step import ReportingStep

_running: ContextVar[tuple[ReportingStep, ...]] = ContextVar("running", default=())


@contextlib.contextmanager
def in_progress(step: ReportingStep) -> Iterator[None]:
    """A block in which an epoch of a step is in progress."""
    token = _running.set((*_running.get(), step))
    try:
        yield
    finally:
        _running.reset(token)


@contextlib.contextmanager
def outer_epochs_kept(step: ReportingStep) -> Iterator[None]:
    """A block that runs a step. The epochs around it report what they would without it."""
    with contextlib.ExitStack() as kept:
        for outer in _running.get():
            kept.enter_context(outer.epoch_kept(from_logs=outer is step))
        yield
