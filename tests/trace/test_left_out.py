"""Columns of a batch that the backend cannot hold: a step may pass them over, and hears of them where it uses one."""

import keras
import numpy as np
import pandas as pd
import pytest
from keras import layers, ops

import handloom as hl
from handloom.backends import backend
from handloom.errors import DataError
from tests.models import built, compiled, functional
from tests.numbers import close, normal, ones, same

X, Y = normal(6, 3), normal(6, 1, seed=1)
NAMES = [f"name {index}" for index in range(6)]
MISSING, DATES = np.array([*NAMES[1:], None], object), np.array(["2026-01-01"] * 6, "datetime64[D]")


def rows(**columns):
    return [{name: column[index] for name, column in columns.items()} for index in range(6)]


def loader(**columns):
    return pytest.importorskip("torch").utils.data.DataLoader(rows(**columns), 3)


def table(**columns):
    return pytest.importorskip("datasets").Dataset.from_dict({name: list(part) for name, part in columns.items()})


def in_batches(columns):
    return [{name: column[start : start + 3] for name, column in columns.items()} for start in (0, 3)]


class Numbered(keras.utils.PyDataset):
    def __init__(self, **columns):
        super().__init__()
        self.batches = in_batches(columns)

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return self.batches[index]


SOURCES = {
    "arrays": lambda **columns: hl.Feed({**columns, "name": np.array(NAMES)}, batch_size=3),
    "lists": lambda **columns: hl.Feed({**columns, "name": NAMES}, batch_size=3),
    "pandas": lambda **columns: hl.Feed({**columns, **pd.DataFrame({"name": NAMES, "z": 1.0})}, batch_size=3),
    "text with a gap": lambda **columns: hl.Feed({**columns, "name": MISSING}, batch_size=3),
    "dates": lambda **columns: hl.Feed({**columns, "name": DATES}, batch_size=3),
    "generator": lambda **columns: lambda: in_batches({**columns, "name": NAMES}),
    "DataLoader": lambda **columns: loader(**columns, name=NAMES),
    "Dataset": lambda **columns: hl.Feed(table(**columns, name=NAMES), batch_size=3),
    "IterableDataset": lambda **columns: table(**columns, name=NAMES).to_iterable_dataset().batch(3),
    "PyDataset": lambda **columns: Numbered(**columns, name=NAMES),
}


def linear():
    """A step that trains a weight, from zero, towards the columns x and y, and the weight."""
    w = keras.Variable(np.zeros((3, 1), "float32"))
    sgd = keras.optimizers.SGD(0.1)
    return lambda batch: {"loss": hl.minimize(lambda: ops.mean((batch["x"] @ w - batch["y"]) ** 2), [w], sgd)}, w


@pytest.mark.parametrize("source", SOURCES)
def test_fit_passes_over_a_column_that_the_step_does_not_use_and_compiles_once(source, eagerly):
    step, w = linear()
    runs = []

    def counted(batch):
        runs.append(len(batch))
        return step(batch)

    hl.fit(counted, SOURCES[source](x=X, y=Y), epochs=2, verbose=0)
    expected = np.zeros((3, 1))
    for _ in range(2):
        for x, y in zip(np.split(X, 2), np.split(Y, 2), strict=True):
            expected -= 0.1 * 2 / 3 * x.T @ (x @ expected - y)
    close(w, expected, rtol=1e-4)
    assert len(runs) == 4 if eagerly else len(runs) <= 2


def test_function_passes_over_an_array_of_text_and_compiles_once():
    function = hl.function(lambda batch: ops.sum(batch["x"]))
    for names in np.split(np.array(NAMES, object), 2):
        close(function({"x": ones(3), "name": names}), 3)
    assert len(function.traces) == 1


USES = {
    "==": lambda name, x: name == "name 1",
    "@": lambda name, x: x @ name,
    "for": lambda name, x: list(name),
    "[]": lambda name, x: name[0],
    "attribute": lambda name, x: name.shape,
    "np": lambda name, x: np.asarray(name),
    "ops": lambda name, x: ops.add(x, name),
    "layer": lambda name, x: layers.Dense(1)(name),
    "call": lambda name, x: layers.Lambda(lambda x: name + x)(x),
}


@pytest.mark.backend("jax", "torch")
@pytest.mark.parametrize("use", USES)
def test_fit_says_what_the_column_is_at_the_line_that_uses_it(use, eagerly):
    def step(batch):
        USES[use](batch["name"], batch["x"])
        return {"loss": 0.0}

    said = r"'name' is text, for example 'name 0'; this backend has no text.*HL424"
    with pytest.raises(DataError, match=said) as caught:
        hl.fit(step, SOURCES["generator"](x=X), verbose=0)
    assert caught.value.finding.filename == __file__
    assert caught.value.finding.lineno == USES[use].__code__.co_firstlineno


@pytest.mark.skipif(backend.holds_text, reason="Keras says that it ignores the text")
def test_fit_evaluate_and_predict_of_a_model_with_a_column_more_than_inputs():
    inputs = {"x": X, "name": np.array(NAMES)}
    alone = compiled(functional(layers.Dense(1, kernel_initializer="ones")))
    tensor = keras.Input((3,), name="x")
    model = compiled(hl.Model({"x": tensor}, layers.Dense(1, kernel_initializer="ones")(tensor)))
    model.fit(inputs, Y, shuffle=False, verbose=0)
    alone.fit(X, Y, shuffle=False, verbose=0)
    same(model.predict(inputs, verbose=0), alone.predict(X, verbose=0))
    assert model.evaluate(inputs, Y, verbose=0) == alone.evaluate(X, Y, verbose=0)


@pytest.mark.backend("jax", "torch")
def test_fit_says_what_the_column_is_that_call_uses():
    class Reader(hl.Model):
        def __init__(self):
            super().__init__()
            self.dense = built(layers.Dense(1))

        def call(self, x):
            return self.dense(x["name"])

    with pytest.raises(DataError, match=r"x\['name'\] is text"):
        compiled(Reader()).fit({"x": X, "name": np.array(NAMES)}, Y, verbose=0)


def test_feed_restores_a_position_in_text_of_another_process_without_a_warning():
    columns = {"x": X, "name": np.array(NAMES, object)}
    state = hl.Feed(columns, batch_size=3).state()
    again = columns | {"name": np.array([f"name {index}" for index in range(6)], object)}
    assert hl.Feed(again, batch_size=3).differences(state) == []
    assert hl.Feed(columns | {"name": columns["name"][::-1]}, batch_size=3).differences(state) != []
