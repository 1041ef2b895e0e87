"""The one counter of a run."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class Progress:
    """Where training stands: (epoch, step, batch in epoch), and nothing else counts.

    Attributes:
        epoch: Epochs finished.
        step: Steps taken over the whole run. A step is one call of the training step, however many
            optimizers it uses.
        batch: Steps taken in the epoch at hand; 0 between two epochs.
    """

    epoch: int = 0
    step: int = 0
    batch: int = 0

    def advance(self, steps: int = 1) -> None:
        """So many steps have been taken."""
        self.step += steps
        self.batch += steps

    def end_epoch(self) -> None:
        """The epoch is over."""
        self.epoch += 1
        self.batch = 0
