"""The output of a run for people: a progress bar in a terminal, or a line an epoch."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Column

from handloom._util.every import every
from handloom._util.short import short
from handloom.callbacks._event_reader import Event, EventReader
from handloom.errors import ArgumentError


def progress_display(verbose: str | int) -> list[EventReader]:
    """The readers for Keras's `verbose`: none for 0, a bar for 1, a line an epoch for 2.

    Raises:
        ArgumentError: `verbose` is something else, and not `"auto"`.
    """
    if verbose == "auto":
        verbose = 1 if Console().is_terminal else 2
    displays: dict[Any, list[type[EventReader]]] = {0: [], 1: [ProgressBar], 2: [EpochLines]}
    if verbose not in displays:
        raise ArgumentError(f"HL750: verbose takes 0, 1 (bar), 2 (line an epoch) or 'auto'; received {short(verbose)}.")
    return [display() for display in displays[verbose]]


class ProgressBar(EventReader):
    """A bar with the values so far, steps a second and the time left, refreshed ten times a second.

    The speed is that after the first steps, which are compiled. At the end of an epoch, its duration takes its place.

    It reads the values only when it refreshes, so that nothing waits for the device in between.

    Args:
        console: The console to draw on; standard output by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        super().__init__(every(seconds=0.1))
        self._console = console or Console()
        self._bar: Progress | None = None
        self._first: Event | None = None

    def read(self, event: Event) -> None:
        """Draws the event."""
        if event.kind == "run_begin":
            self._begin, self._activity, self._first, self._last = event, event.data["activity"], None, event.seconds
            for line in resumed_lines(event):
                self._console.print(line, highlight=False, markup=False)
            return
        is_last = event.kind == {"fit": "epoch", "evaluate": "validation", "predict": "run_end"}[self._activity]
        if is_last:
            self._refresh(event, shown_duration(event.seconds - self._last))
            self._last = event.seconds
        elif event.kind == "progress":
            self._refresh(event, self._clock(event))
        if is_last or event.kind == "run_end":  # An error may end the run within an epoch.
            self.close()

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _refresh(self, event: Event, clock: str) -> None:
        done = event.batch if event.kind != "epoch" else event.data["steps"]
        shown: dict[str, Any] = {"clock": clock, "values": shown_values(event.values)}
        if self._bar is None:
            bar, numbers = BarColumn(bar_width=24), MofNCompleteColumn()
            values = TextColumn("{task.fields[values]}", table_column=Column(overflow="fold"))  # Wraps; others do not.
            columns = "{task.description}", bar, numbers, "{task.fields[clock]}", values
            self._bar = Progress(*columns, console=self._console, auto_refresh=False)
            title, steps = self._title(event), self._begin.data["steps"]
            self._task: TaskID = self._bar.add_task(title, total=steps, completed=done, **shown)
            self._bar.start()
        self._bar.update(self._task, completed=done, refresh=True, **shown)

    def _title(self, event: Event) -> str:
        epoch = f"Epoch {event.epoch + (event.kind != 'epoch')}/{self._begin.data['epochs']}"
        return {"fit": epoch, "evaluate": "Evaluating", "predict": "Predicting"}[self._activity]

    def _clock(self, event: Event) -> str:
        """Speed and time left; nothing at first."""
        self._first = self._first or event
        done, steps = event.step - self._first.step, self._begin.data["steps"]
        if not done:
            return ""
        speed = done / max(event.seconds - self._first.seconds, 1e-9)
        shown = f"{speed:{'.0f' if speed >= 10 else '.2g'}} steps/s"
        if steps is None:
            return shown
        left = steps * (self._begin.data["epochs"] - event.epoch) - event.batch
        return f"{shown}, {shown_duration(left / speed)} left"


class EpochLines(EventReader):
    """One line for each epoch: for logs in a file."""

    def read(self, event: Event) -> None:
        """Prints the event."""
        if event.kind == "run_begin":
            self._begin, self._last = event, event.seconds
            for line in resumed_lines(event):
                print(line, flush=True)
        elif event.kind == "epoch":
            duration = shown_duration(event.seconds - self._last)
            self._last = event.seconds
            epoch = f"Epoch {event.epoch}/{self._begin.data['epochs']}"
            print(f"{epoch}  {duration}  {shown_values(event.values)}", flush=True)
        elif event.kind == "validation" and self._begin.data["activity"] == "evaluate":
            print(f"Evaluated  {shown_values(event.values)}", flush=True)


def resumed_lines(event: Event) -> Iterator[str]:
    """Lines that tell where a run resumes, and what differs; none for a new run."""
    resumed = event.data.get("resumed")
    if not resumed:
        return
    yield f"Resuming from {resumed['directory']} at step {event.step} (epoch {event.epoch + 1}, batch {event.batch})."
    yield f"  Restored {resumed['variables']} variables and the state of {', '.join(resumed['things'])}."
    differences = {
        "Not in the checkpoint; initialized from scratch": resumed["missing"],
        "Only in the checkpoint; ignored": resumed["unused"],
        "Changed since the checkpoint; results will not be bitwise identical": resumed["differences"],
    }
    for text, names in differences.items():
        if names:
            yield f"  {text}: {', '.join(names)}."
    if resumed["reread"]:
        yield f"  {resumed['reread']} has no position; it is read again up to this batch, in its present order."


def shown_values(values: Mapping[str, Any]) -> str:
    """Values in one line."""
    return "  ".join(f"{name} {_shown(value)}" for name, value in values.items())


def _shown(value: Any) -> str:
    if isinstance(value, str):  # A callback of the user's may have added it.
        return value
    if isinstance(value, np.ndarray):
        return np.array2string(value, precision=4, threshold=4)
    if 0 < abs(value) < 1e-3:
        return f"{value:.4g}"
    return f"{value:.{max(0, 5 - len(f'{abs(value):.0f}'))}f}"  # Five digits, but all of those before the point.


def shown_duration(seconds: float) -> str:
    """Seconds as `59s`, `1m01s` or `2h03m`."""
    minutes, seconds = divmod(round(seconds), 60)
    if not minutes:
        return f"{seconds}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
