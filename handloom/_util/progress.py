"""The counts of a run."""

import dataclasses


@dataclasses.dataclass
class Progress:
    """The progress of training: (epoch, step, batch in epoch). No other code counts.

    Attributes:
        epoch: Epochs finished.
        step: Steps taken over the whole run. A step is one call of the training step, however many
            optimizers it uses.
        batch: Steps taken in the current epoch; 0 between two epochs.
    """

    epoch: int = 0
    step: int = 0
    batch: int = 0

    def advance(self, steps: int = 1) -> None:
        """Counts steps."""
        self.step += steps
        self.batch += steps

    def end_epoch(self) -> None:
        """Counts an epoch."""
        self.epoch += 1
        self.batch = 0
