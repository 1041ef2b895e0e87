"""Runs in processes of their own, which tell what they are about to do, and may be killed for it.

Each is forked from one that has imported everything, and in which no backend has run: as fresh as a process can be, and
there in no time.
"""

import itertools
import json
import multiprocessing
import os
import statistics
import time
import warnings

from handloom.checkpoint import store
from handloom.errors import HandloomWarning
from tests.checkpoint.common import Nth, install
from tests.checkpoint.kill import die
from tests.resume.runs import outcome

_server = multiprocessing.get_context("forkserver")
# Also what each would import by itself: the main module here, and what Keras seeds on every backend.
_server.set_forkserver_preload(["pytest", "tensorflow", "tests.resume.processes"])


class Child:
    """A function in a process of its own; its last argument is what it tells by, a word at a time.

    Args:
        function: Of a module, so that the process finds it.
        arguments: The others.
        output: The file to which what it writes is added.

    Attributes:
        pid: The number of the process.
        told: What it has told so far, as far as it was read, each word with the time of its reading.
    """

    def __init__(self, function, *arguments, output):
        self._output = output
        reading, writing = _server.Pipe(duplex=False)
        self._process = _server.Process(target=run_here, args=(function, arguments, writing, output))
        self._process.start()
        self.pid = self._process.pid
        writing.close()
        self._words = os.fdopen(os.dup(reading.fileno()), encoding="utf-8")
        reading.close()
        self.told = []

    def words(self):
        """What it tells, as it does so, to its end."""
        for line in self._words:
            self.told.append((line.strip(), time.perf_counter()))
            yield line.strip()

    def kill(self):
        """As at any instant the system may. It still tells what it had before."""
        self._process.kill()

    def end(self):
        """Waits for its end.

        Returns:
            Its exit code; what killed it, as a negative number.
        """
        for _ in self.words():
            pass
        self._process.join()
        code = self._process.exitcode
        self._words.close()
        self._process.close()
        return code

    @property
    def output(self):
        return self._output.read_text(encoding="utf-8")


def run_here(function, arguments, writing, output):
    """Runs a function in this process: what it tells goes to one file, what it writes is added to another."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for standard in (1, 2):
        os.dup2(file, standard)
    warnings.simplefilter("error", HandloomWarning)
    # A line in one call, as two threads tell.
    function(*arguments, lambda word: os.write(writing.fileno(), f"{word}\n".encode()))


def to_the_end(kind, run_dir, keep, result, tell):
    """Trains, tells of everything, and writes what is left at the end."""
    tell("begin")
    tell_of_saves(tell)
    result.write_text(json.dumps(outcome(kind, run_dir, tell, keep)), encoding="utf-8")
    tell("done")


def killed_at(number, kind, run_dir, keep, tell):
    """Trains, and is killed at its n-th call to the system for a checkpoint (from 0): in writes half-way."""
    tell_of_saves(tell)

    def act(name, arguments):
        tell(name)
        die(name, arguments, part=0.5)

    install(Nth(number, act))
    outcome(kind, run_dir, keep=keep)


def tell_of_saves(tell):
    """Has what writes checkpoints tell when one begins and ends, and of each call to the system in it."""
    save = store.Store.save

    def saving(self, draft):
        tell("save")
        try:
            return save(self, draft)
        finally:
            tell("saved")

    store.Store.save = saving
    install(lambda name, arguments: tell("call"))


def usual_pauses(told):
    """Seconds from each word to the one after, whichever that is: the median, by word."""
    pauses = {}
    for (word, begun), (_, ended) in itertools.pairwise(told):
        pauses.setdefault(word, []).append(ended - begun)
    return {word: statistics.median(found) for word, found in pauses.items()}
