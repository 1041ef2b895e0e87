"""Reads the log of a run."""

from handloom.report import read_events


def epochs_in(run_dir):
    """The values of each epoch, with `epoch` (the number of finished epochs) and `step`."""
    return [
        {"epoch": event.epoch, "step": event.step, **event.values}
        for event in read_events(run_dir)
        if event.kind == "epoch"
    ]


def saves_in(run_dir):
    """The events of saves, including those of steps that were taken again."""
    return [event for event in read_events(run_dir, superseded=True) if event.kind == "saved"]
