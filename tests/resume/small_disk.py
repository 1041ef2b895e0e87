"""What a run does on a disk without room, on the same disk with room, and on one that is read-only.

A program of its own, for a namespace in which it may mount such a disk. What it finds it prints as JSON.
"""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import tensorflow  # noqa: F401  Each process forked here would import it by itself: Keras seeds it on every backend.

import handloom as hl
from tests.resume.processes import run_here, to_the_end

KIND = "step"


def mount(disk, *options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "handloom", disk], check=True)


def trained(run_dir, aside):
    """Trains; returns the exit code, how many steps were taken, what was written, the checkpoints, and what is left."""
    words, output, result = (aside / name for name in ("words", "output", "result.json"))
    words.write_text("", encoding="utf-8")
    child = os.fork()
    if child == 0:
        try:
            with words.open("a") as telling:
                run_here(to_the_end, (KIND, run_dir, 3, result), telling, output)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {
        "code": code,
        "steps": words.read_text(encoding="utf-8").split().count("step"),
        "output": output.read_text(encoding="utf-8"),
        "saved": hl.Checkpointer(run_dir / "checkpoints", {}).steps,
        "left": json.loads(result.read_text(encoding="utf-8")) if code == 0 else None,
    }


def main(disk, aside, room):
    run_dir = disk / "run"
    mount(disk, f"size={room}")
    full = trained(run_dir, aside)
    mount(disk, "remount", "size=64m")
    with_room = trained(run_dir, aside)
    mount(disk, "remount", "ro")
    return {"full": full, "with room": with_room, "read-only": trained(disk / "other", aside)}


if __name__ == "__main__":
    disk, aside, room = sys.argv[1:]
    print(json.dumps(main(Path(disk), Path(aside), room)))
