"""The options of a run that `hl.fit` and `Model.fit` have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from handloom._util.arguments import whole_number
from handloom._util.every import Every, check_every, every
from handloom.distribute._strategy import Strategy, check_strategy
from handloom.errors import ArgumentError

_RESUME = ("auto", "exact", "never")


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """What they mean is said at `hl.fit`.

    Raises:
        ArgumentError: For a value that an option does not take.
    """

    run_dir: str | Path | None = None
    resume: str = "auto"
    allow: Sequence[str] = ()
    save: Every | None = every(epochs=1)
    keep: int | None = 3
    best: str | None = None
    strategy: Strategy | None = None
    steps_per_execution: int | str = "auto"
    verbose: str | int = "auto"

    def __post_init__(self) -> None:
        if self.resume not in _RESUME:
            raise ArgumentError(
                f"HL006: resume takes one of {', '.join(map(repr, _RESUME))}; received {self.resume!r}."
            )
        if self.save is not None:
            check_every(self.save, "save", "hl.every(epochs=1), or None")
        if isinstance(self.allow, str):
            raise ArgumentError(
                f"HL007: allow takes a list of patterns, such as [{self.allow!r}]; received {self.allow!r}."
            )
        check_strategy(self.strategy)
        if self.steps_per_execution != "auto":
            whole_number("fit", steps_per_execution=self.steps_per_execution)

    @property
    def directory(self) -> Path | None:
        """The run directory."""
        return None if self.run_dir is None else Path(self.run_dir)


def as_list(callbacks: Any) -> list[Any]:
    """Callbacks as they may be given: one, several, or a `CallbackList` of Keras's."""
    if callbacks is None:
        return []
    callbacks = getattr(callbacks, "callbacks", callbacks)
    return list(callbacks) if hasattr(callbacks, "__iter__") else [callbacks]
