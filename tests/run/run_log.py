"""What a run left in its log."""

from handloom.report import read_events


def epochs_in(run_dir):
    """The events that are ends of epochs."""
    return [event for event in read_events(run_dir) if event.kind == "epoch"]


def saves_in(run_dir):
    """The events that are saves, those of steps taken again among them."""
    return [event for event in read_events(run_dir, superseded=True) if event.kind == "saved"]
