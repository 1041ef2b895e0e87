"""What a run left in its log."""

import json


def epochs_in(run_dir):
    """The lines of the log that are of epochs; the others are of saves."""
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "epoch" in line]


def saves_in(run_dir):
    """What each save took."""
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["saved"] for line in lines if "saved" in line]
