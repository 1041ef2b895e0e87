"""A run that is killed at any system call of a save resumes bitwise identical.

Here a run copies its directory before each call, and in the middle of each write, and resumes from each copy, with new
variables and seeds as in a new process. `test_kills.py` kills processes.
"""

import keras
from keras import layers, ops

import handloom as hl
from handloom.checkpoint.names import named
from tests.checkpoint.common import Copies, install
from tests.models import compiled, sequential
from tests.resume.runs import BATCH, X, Y, assert_same, left


class Again:
    """A model that is trained from its start each time, and compiled once."""

    def __init__(self):
        optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
        self.model = compiled(sequential(layers.Dropout(0.5), layers.Dense(1)), optimizer)
        self.model.fit(X, Y, batch_size=BATCH, verbose=0)
        self.variables = named({"model": self.model})[0].values()
        self.start = [ops.convert_to_numpy(variable.value).copy() for variable in self.variables]

    def train(self, run_dir):
        """Two epochs of six steps, saved after every fifth step and at the end; only the last checkpoint is kept."""
        for variable, value in zip(self.variables, self.start, strict=True):
            variable.assign(value)
        options = {"save": hl.every(steps=5), "keep": 1, "seed": 1, "verbose": 0}
        history = self.model.fit(X, Y, batch_size=BATCH, epochs=2, run_dir=run_dir, **options)
        return left(run_dir, {"model": self.model}, history, [])


def test_fit_resumes_from_the_files_that_any_system_call_of_a_save_leaves(tmp_path):
    run = Again()
    whole = run.train(tmp_path / "whole")
    copies = Copies(tmp_path / "run", tmp_path / "copies")
    install(copies)
    try:
        assert run.train(tmp_path / "run") == whole
    finally:
        install(None)
    left_by_kills = copies.different()
    saved = {tuple(hl.Checkpointer(copy / "checkpoints", {}).steps) for copy in left_by_kills}
    assert saved >= {(), (5,), (5, 10), (10,), (10, 12), (12,)}
    for copy in left_by_kills:
        print(copy.name)
        assert_same(run.train(copy), whole)
