"""A run that is killed at random instants, and resumed each time, ends bitwise identical to one that never was."""

import collections
import json
import os
import secrets
import signal
import time

import numpy as np
import pytest

from tests.resume.processes import Child, to_the_end, usual_pauses
from tests.resume.runs import RUNS, assert_same

KILLS = int(os.environ.get("HANDLOOM_KILLS", "10")) // len(RUNS)
SEED = int(os.environ.get("HANDLOOM_SEED", secrets.randbelow(2**31)))
# The phase of a run after each word that it tells, except saves, which are in the background.
PHASES = {
    "begin": "start",
    "train": "start",
    "step": "training",
    "validate": "validation",
    "validated": "training",
    "end": "end",
    "ended": "end",
}
# The words of each phase at which a kill may be aimed, and how often each comes.
AIMS = {
    "start": {"begin": 1, "train": 1},
    "training": {"step": 5},
    "validation": {"validate": 2},
    "saving": {"save": 2, "call": 80},
    "end": {"end": 1, "ended": 1},
}


def aims(random):
    """Instants at which to kill, one of each phase, the end last.

    Each is a word, how often it came before, and a share of the time until the next word.
    """
    for phase in [*random.permutation([phase for phase in AIMS if phase != "end"]), "end"]:
        word = str(random.choice(list(AIMS[phase])))
        yield word, int(random.integers(AIMS[phase][word])), float(random.uniform())


def kill(child, aim, pauses):
    """Kills a run some time after it has told a word."""
    word, times, share = aim
    for told in child.words():
        if told == word:
            if not times:
                time.sleep(share * pauses[word])
                child.kill()
                return
            times -= 1


def where(told):
    """The phases that a run was in after its last word."""
    words = [word for word, _ in told]
    main = next((PHASES[word] for word in reversed(words) if word in PHASES), "start")
    return {main, "saving"} if words.count("save") > words.count("saved") else {main}


@pytest.mark.parametrize("kind", RUNS)
def test_fit_killed_at_random_instants_resumes_bitwise_identical(kind, tmp_path):
    print(f"HANDLOOM_SEED={SEED}: {kind}, {KILLS} kills")
    random = np.random.default_rng([SEED, list(RUNS).index(kind)])
    result, output = tmp_path / "result.json", tmp_path / "output"

    def child(run_dir):
        return Child(to_the_end, kind, run_dir, 3, result, output=output)

    never_killed = child(tmp_path / "whole")
    assert never_killed.end() == 0, never_killed.output
    whole, pauses = json.loads(result.read_text(encoding="utf-8")), usual_pauses(never_killed.told)
    fell, kills, runs = collections.Counter(), 0, 0
    while kills < KILLS:
        run_dir, code, runs = tmp_path / f"run {runs}", -signal.SIGKILL, runs + 1
        planned = aims(random)
        while code == -signal.SIGKILL:
            resumed = child(run_dir)
            aim = next(planned, None) if kills < KILLS else None
            if aim is not None:
                kill(resumed, aim, pauses)
            code = resumed.end()
            if code == -signal.SIGKILL:
                kills += 1
                fell.update(where(resumed.told))
                print(f"run {runs}, kill {kills} aimed at {aim}: {' and '.join(sorted(where(resumed.told)))}")
        assert code == 0, resumed.output
        assert_same(json.loads(result.read_text(encoding="utf-8")), whole)
    print(f"{runs} runs, {kills} kills: {dict(fell)}")
    if KILLS >= 20:  # A few kills may miss a phase.
        assert fell.keys() == AIMS.keys()
