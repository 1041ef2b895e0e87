"""Events of a run, and callbacks that read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from handloom._keras import keras
from handloom._util.every import Every, check_every
from handloom.callbacks._state import Stateful
from handloom.errors import StepError


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that happened in a run.

    | kind | when | data |
    |---|---|---|
    | `run_begin` | before the first step | `activity`: fit, evaluate or predict; `epochs`, `steps`, `resumed` |
    | `trace` | a step was compiled | `function`, `signature`, `duration`, `reason`, `compiled` |
    | `finding` | a warning was given | `code`, `filename`, `lineno`, `saw`, `why`, `fix` |
    | `progress` | within an epoch, when a reader's `every` says so | `values` so far |
    | `validation` | an evaluation ended | `values` |
    | `epoch` | an epoch ended, after its callbacks | `values` |
    | `saved` | a checkpoint is on the disk | `saved_step`, `bytes`, `duration`, `waited` |
    | `run_end` | after the last step, or an error | `values`, `error` |

    Durations are in seconds.

    Attributes:
        kind: One of these.
        epoch: Epochs finished.
        step: Steps taken over the whole run.
        batch: Steps taken in the epoch at hand.
        seconds: Seconds that the run has taken, those of the processes that it resumes included.
        time: When it happened, in seconds since 1970.
        data: What else there is to say.
    """

    kind: str
    epoch: int
    step: int
    batch: int
    seconds: float
    time: float
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def values(self) -> Mapping[str, Any]:
        """The reported values, by name; empty where there are none."""
        return self.data.get("values") or {}


class EventReader(Stateful, keras.callbacks.Callback):
    """A callback that reads the events of a run. Subclass it to write them wherever you like.

    Args:
        every: When to be given `progress` events within epochs: `hl.every(steps=...)` or `hl.every(seconds=...)`;
            `None` for never.

    Example:
        ```python
        class Print(handloom.callbacks.EventReader):
            def read(self, event):
                print(event.kind, event.step, dict(event.values))
        ```
    """

    takes_executions = True  # See `Callbacks.each_step`.

    def __init__(self, every: Every | None = None) -> None:
        super().__init__()
        if every is not None:
            check_every(every, "every", "hl.every(steps=100), or None")
        self.every = every
        self._is_read_to = False

    def read(self, event: Event) -> None:
        """Is given each event, in order."""
        raise NotImplementedError

    def close(self) -> None:
        """Called when the run is over, also by an exception."""

    def begin_reading(self) -> None:
        """Called by a run that has events, before the first."""
        self._is_read_to = True

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        if not self._is_read_to:
            raise StepError(
                f"HL215: {type(self).__name__} reads the events of a run of Handloom, and Keras's own fit has none.",
                fix="Train with hl.Model or hl.fit, or use a callback of Keras's, such as keras.callbacks.CSVLogger.",
            )
