"""Reads the events of a run from its log."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import optree

from handloom._util.findings import warn
from handloom.callbacks import Event

_NUMBERS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_ATTRIBUTES = ("kind", "epoch", "step", "batch", "seconds", "time")


def read_events(path: str | Path, *, superseded: bool = False) -> list[Event]:
    """Reads the events of a run; the run may not have ended yet.

    Args:
        path: A file that `handloom.callbacks.JSONLogger` wrote, or a run directory.
        superseded: Whether to include superseded events: of steps that were taken again after the run was resumed
            from an earlier checkpoint or started from scratch. The file holds everything that ever happened.

    Returns:
        The events, in order. NaN and infinite values are numbers again; arrays are lists.

    Raises:
        FileNotFoundError: There is no such file.
    """
    path = Path(path)
    events = list(_events(path / "events.jsonl" if path.is_dir() else path))
    return events if superseded else _without_superseded(events)


def _events(path: Path) -> Iterator[Event]:
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            data = json.loads(line)
            attributes = {name: data.pop(name) for name in _ATTRIBUTES}
        except (AttributeError, KeyError, TypeError, ValueError):
            if line and number < len(lines):  # The last line may still be being written.
                warn(f"HL950: Line {number} of {path} is not an event; it is skipped.")
            continue
        if "values" in data:  # NaN and infinity are text in JSON.
            data["values"] = optree.tree_map(lambda leaf: _NUMBERS.get(leaf, leaf), data["values"])
        yield Event(**attributes, data=data)


def _without_superseded(events: list[Event]) -> list[Event]:
    found: list[Event] = []
    for event in events:
        if event.kind == "run_begin":
            found = [earlier for earlier in found if _is_before(earlier, event)] if event.data["resumed"] else []
        found.append(event)
    return found


def _is_before(event: Event, resumed: Event) -> bool:
    """Whether an event happened before the point at which a run was resumed."""
    ended = event.kind == "run_end"
    return not ended and (event.step < resumed.step or (event.step == resumed.step and event.epoch <= resumed.epoch))
