"""What a run left in its log."""

from handloom.report import read_events


def epochs_in(run_dir):
    """What each epoch ended with: a dict of `epoch` (those finished, so from 1), `step` and the values."""
    return [
        {"epoch": event.epoch, "step": event.step, **event.values}
        for event in read_events(run_dir)
        if event.kind == "epoch"
    ]


def saves_in(run_dir):
    """The events that are saves, those of steps taken again among them."""
    return [event for event in read_events(run_dir, superseded=True) if event.kind == "saved"]
