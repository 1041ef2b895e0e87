"""Runs in separate processes, which tell what they are about to do, and may be killed then."""

import itertools
import json
import os
import statistics
import time
import warnings

from handloom.checkpoint import store
from handloom.errors import HandloomWarning
from tests.checkpoint.common import install
from tests.forkserver import forkserver
from tests.resume.runs import outcome


class Child:
    """A function in a separate process.

    Args:
        function: A function of a module. Its last argument is a function by which it tells words.
        arguments: Its other arguments.
        output: The file to which its output is appended.

    Attributes:
        pid: The number of the process.
        told: The words read so far, each with the time of its reading.
    """

    def __init__(self, function, *arguments, output):
        self._output = output
        reading, writing = forkserver.Pipe(duplex=False)
        self._process = forkserver.Process(target=run_here, args=(function, arguments, writing, output))
        self._process.start()
        self.pid = self._process.pid
        writing.close()
        self._words = os.fdopen(os.dup(reading.fileno()), encoding="utf-8")
        reading.close()
        self.told = []

    def words(self):
        """The words that it tells, until it ends."""
        for line in self._words:
            self.told.append((line.strip(), time.perf_counter()))
            yield line.strip()

    def kill(self):
        """Kills it, as the system may at any instant. The words told before can still be read."""
        self._process.kill()

    def end(self):
        """Waits for its end; returns its exit code, which is negative after a signal."""
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
    """Runs a function in this process: its words go to one file, its output is appended to another."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for standard in (1, 2):
        os.dup2(file, standard)
    warnings.simplefilter("error", HandloomWarning)
    # A line in one call, because two threads tell words.
    function(*arguments, lambda word: os.write(writing.fileno(), f"{word}\n".encode()))


def to_the_end(kind, run_dir, keep, result, tell):
    """Trains, tells of everything, and writes the result."""
    tell("begin")
    tell_of_saves(tell)
    result.write_text(json.dumps(outcome(kind, run_dir, tell, keep)), encoding="utf-8")
    tell("done")


def tell_of_saves(tell):
    """Tells when the writing of a checkpoint begins and ends, and of each system call in it."""
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
    """The median of the seconds from each word to the next word, by word."""
    pauses = {}
    for (word, begun), (_, ended) in itertools.pairwise(told):
        pauses.setdefault(word, []).append(ended - begun)
    return {word: statistics.median(found) for word, found in pauses.items()}
