"""Events of a run, and callbacks that read them."""

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
    | `saved` | a checkpoint is on disk | `saved_step`, `bytes`, `duration`, `waited` |
    | `run_end` | after the last step, or an error | `values`, `error` |

    Durations are in seconds.

    Attributes:
        kind: The kind.
        epoch: The number of epochs finished.
        step: The number of steps taken over the whole run.
        batch: The number of steps taken in the current epoch.
        seconds: The duration of the run so far, including the processes that it resumes.
        time: The time of the event, in seconds since 1970.
        data: Further data, by kind.
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
        """The reported values by name, empty if the event has none."""
        return self.data.get("values") or {}


class EventReader(Stateful, keras.callbacks.Callback):
    """A callback that reads the events of a run. Subclass it to write them anywhere.

    Args:
        every: When to receive `progress` events within epochs: `hl.every(steps=...)` or `hl.every(seconds=...)`; `None`
            for never.

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
        """Receives each event, in order."""
        raise NotImplementedError

    def close(self) -> None:
        """Called when the run is over, also after an exception."""

    def begin_reading(self) -> None:
        """Called by a run that has events, before the first one."""
        self._is_read_to = True

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        if not self._is_read_to:
            raise StepError(
                f"HL215: {type(self).__name__} reads the events of a Handloom run, and Keras's own fit has none.",
                fix="Train with hl.Model or hl.fit, or use a callback of Keras, such as keras.callbacks.CSVLogger.",
            )
