"""The options that `hl.fit` and `Model.fit` have in common."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from handloom._util.arguments import whole_number
from handloom._util.every import Every, check_every, every
from handloom._util.short import short
from handloom.distribute._strategy import Strategy
from handloom.errors import ArgumentError


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """The options of a run, documented at `hl.fit`.

    Raises:
        ArgumentError: An option has a value that it does not take.
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
        if self.resume not in ("auto", "exact", "never"):
            raise ArgumentError(f"HL006: resume takes 'auto', 'exact' or 'never'; received {short(self.resume)}.")
        if self.save is not None:
            check_every(self.save, "save", "hl.every(epochs=1), or None")
        if isinstance(self.allow, str):
            raise ArgumentError(f"HL007: allow takes a list; received {self.allow!r}.", fix=f"Pass [{self.allow!r}].")
        if self.steps_per_execution != "auto":
            whole_number("fit", steps_per_execution=self.steps_per_execution)

    @property
    def directory(self) -> Path | None:
        """The run directory."""
        return None if self.run_dir is None else Path(self.run_dir)
