"""Python values that a compiled function reads: it heeds their changes, and tells of those a variable should hold."""

import collections
import copy
import re
import types
import unittest.mock

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.errors import HandloomWarning, RetraceWarning
from tests.models import built, sequential
from tests.numbers import close, normal, numpy, ones

X, Y = normal(8, 3), normal(8, 1, seed=1)
BETA = 1.0


class Holder:
    """Holds the same number in many ways."""

    beta = 1.0

    def __init__(self):
        self.own, self.items, self.inner = 1.0, {"a": [{"b": 1.0}]}, types.SimpleNamespace(beta=1.0)

    @property
    def seen(self):
        return self.own

    def found(self):
        return getattr(self, "own")  # noqa: B009  So may a user.

    @hl.function
    def step(self, x):
        return x * self.own


class Gain(layers.Layer):
    def __init__(self):
        super().__init__()
        self.gain = 1.0

    def call(self, x):
        return x * self.gain


def set_global(value):
    globals()["BETA"] = value


def closure():
    beta = 1.0

    def change(value):
        nonlocal beta
        beta = value

    return lambda x: x * beta, change


def held_by(holder, amplifier):
    return {
        "BETA": (lambda x: x * BETA, set_global),
        "beta": closure(),
        "holder.own": (lambda x: x * holder.own, lambda value: setattr(holder, "own", value)),
        "holder.own by a property": (lambda x: x * holder.seen, lambda value: setattr(holder, "own", value)),
        "holder.own by a method": (lambda x: x * holder.found(), lambda value: setattr(holder, "own", value)),
        "self.own": (holder.step, lambda value: setattr(holder, "own", value)),
        "Holder.beta": (lambda x: x * Holder.beta, lambda value: setattr(Holder, "beta", value)),
        "holder.inner.beta": (lambda x: x * holder.inner.beta, lambda value: setattr(holder.inner, "beta", value)),
        "holder.items['a'][0]['b']": (
            lambda x: x * holder.items["a"][0]["b"],
            lambda value: holder.items["a"][0].__setitem__("b", value),
        ),
        "amplifier.gain": (lambda x: amplifier(x) + 0, lambda value: setattr(amplifier, "gain", value)),
    }


@pytest.mark.parametrize("path", held_by(Holder(), Gain()))
def test_function_is_compiled_again_for_a_number_that_has_changed_and_names_its_line(path):
    step, change = held_by(Holder(), Gain())[path]
    step = step if isinstance(step, type(hl.function(min))) else hl.function(step)
    close(step(ones(2)), [1, 1])
    change(3.0)
    with pytest.warns(RetraceWarning, match=r"has changed from 1\.0 to 3\.0.*= keras\.Variable\(1\.0.*HL141") as told:
        close(step(ones(2)), [3, 3])
    assert path.split(" by")[0] in str(told[0].message)
    assert any(text in _line(told[0]) for text in ("x * ", "self.own", "getattr"))
    change(1.0)
    close(step(ones(2)), [1, 1])  # By the first version.
    assert [trace.reason.partition(": ")[2] for trace in step.traces[1:]] == ["1.0 -> 3.0"]


def _line(warning):
    with open(warning.filename) as file:
        return file.readlines()[warning.lineno - 1]


def test_function_heeds_the_rate_of_dropout_and_a_replaced_layer():
    parts = types.SimpleNamespace(drop=layers.Dropout(1e-9), dense=layers.Dense(1, kernel_initializer="ones"))
    step = hl.function(lambda x: parts.dense(parts.drop(x, training=True)))
    close(step(ones(2, 3)), [[3], [3]])
    parts.drop.rate = 0.999999
    with pytest.warns(
        RetraceWarning, match=r"parts\.drop\.rate has changed from 1e-09.*cannot be a variable there.*once an epoch"
    ):
        close(step(ones(2, 3)), [[0], [0]])
    parts.drop, parts.dense = layers.Dropout(1e-9), layers.Dense(1, kernel_initializer="zeros", bias_initializer="ones")
    parts.dense.build((2, 3))
    close(step(ones(2, 3)), [[1], [1]])


def test_function_heeds_an_array_that_is_changed_in_place():
    holder = types.SimpleNamespace(weights=np.ones(2, "float32"), large=np.ones(5000, "float32"))
    step = hl.function(lambda x: x * holder.weights + holder.large[0])
    close(step(ones(2)), [2, 2])
    holder.weights[1] = 3
    message = r"holder\.weights has changed from \[1\., 1\.\] to \[1\., 3\.\].*holder\.weights\.assign.*HL141"
    with pytest.warns(RetraceWarning, match=message):
        close(step(ones(2)), [2, 4])
    holder.weights[1] = 1
    close(step(ones(2)), [2, 2])
    assert len(step.traces) == 2


def test_function_heeds_an_object_that_is_replaced_in_a_list():
    double, triple = (layers.Rescaling(factor) for factor in (2.0, 3.0))
    stack = [double, double]

    @hl.function
    def step(x):
        for layer in stack:
            x = layer(x)
        return x

    close(step(ones(2)), [4, 4])
    stack[1] = triple
    close(step(ones(2)), [6, 6])
    stack[1] = double
    close(step(ones(2)), [4, 4])
    assert len(step.traces) == 2


def test_function_reads_a_set_of_pairs():
    pairs = {(1, 2.0), (2, 3.0)}
    close(hl.function(lambda x: x * sum(number for _, number in pairs))(ones(2)), [5, 5])


COLLECTIONS = {
    "a deque": (collections.deque([1.0, 2.0]), lambda items: items[0], lambda items: items.rotate()),
    "a set": ({1.0}, sum, lambda items: (items.clear(), items.add(2.0))),
    "many numbers": ([1.0] * 200, lambda items: items[150], lambda items: items.__setitem__(150, 2.0)),
    "a large dict": (
        {**dict.fromkeys(range(200), 0.0), "a": 1.0},
        lambda items: items["a"],
        lambda items: items.update(a=2.0),
    ),
    "lists and numbers": ([1.0, [5.0]], lambda items: items[0], lambda items: items.__setitem__(0, 2.0)),
    "lists in a list": ([3.0, [1.0]], lambda items: items[1][0], lambda items: items[1].__setitem__(0, 2.0)),
    "a list in a tuple": ((3.0, [1.0]), lambda items: items[1][0], lambda items: items[1].__setitem__(0, 2.0)),
}


@pytest.mark.filterwarnings("ignore::handloom.errors.RetraceWarning")
@pytest.mark.parametrize("is_default", [False, True])
@pytest.mark.parametrize("kind", COLLECTIONS)
def test_function_heeds_a_number_in_a_collection(kind, is_default):
    kept, read, change = COLLECTIONS[kind]
    items = copy.deepcopy(kept)

    def by_default(x, *, items=items):
        return x * read(items)

    step = hl.function(by_default if is_default else (lambda x: x * read(items)))
    close(step(ones(2)), [1, 1])
    change(items)
    close(step(ones(2)), [2, 2])


@pytest.mark.filterwarnings("ignore::handloom.errors.RetraceWarning")
def test_function_heeds_a_function_that_is_replaced():
    holder = types.SimpleNamespace(activation=ops.square)
    step = hl.function(lambda x: holder.activation(x) + 0)
    close(step(ones(2)), [1, 1])
    holder.activation = ops.negative
    close(step(ones(2)), [-1, -1])


class Endless:
    """Has any attribute, each a new object."""

    def __getattr__(self, name):
        return Endless()


def test_function_asks_objects_for_no_attribute_that_it_does_not_name():
    mock, endless = unittest.mock.MagicMock(), Endless()
    step = hl.function(lambda x: [x * 2, mock, endless][0])
    close(step(ones(2)), [2, 2])
    assert mock.method_calls == []


def test_function_heeds_changes_in_objects_that_it_is_given():
    step, dense, holder = (
        hl.function(lambda layer, holder, x: x * len(layer.trainable_variables) * holder.own),
        *given(),
    )
    for trainable, right in [(True, 2), (False, 0), (True, 2)]:
        dense.trainable = trainable
        close(step(dense, holder, ones(2)), [right, right])
    assert [trace.reason for trace in step.traces[1:]] == [
        "dense.trainable: True -> False; dense['dense/kernel'].trainable: True -> False; "
        "dense['dense/bias'].trainable: True -> False"
    ]
    holder.own = 3.0
    with pytest.warns(RetraceWarning, match=r"Holder\.own has changed from 1\.0 to 3\.0"):
        close(step(dense, holder, ones(2)), [6, 6])


def given():
    dense = layers.Dense(1, name="dense")
    dense.build((2, 3))
    return dense, Holder()


OPTIMIZERS = {
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "Adam": lambda: keras.optimizers.Adam(0.01),
    # Its versions depend on the variables that it averages: the first one is not valid any more.
    "averaged": lambda: hl.optimizers.WeightAveraging(keras.optimizers.SGD(0.1)),
}


def test_function_heeds_a_number_in_a_dict_of_a_layer():
    class Scaled(layers.Layer):
        def __init__(self):
            super().__init__()
            self.options = {"factor": 2.0}

        def call(self, x):
            return x * self.options["factor"]

    layer = Scaled()
    scaled = hl.function(layer)
    close(scaled(X), 2 * X)
    layer.options["factor"] = 3.0
    with pytest.warns(RetraceWarning, match="factor"):
        close(scaled(X), 3 * X)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_function_heeds_trainable_and_reuses_its_versions(optimizer):
    def run():
        keras.utils.set_random_seed(1)
        model, own = sequential(layers.Dense(4), layers.Dense(1)), OPTIMIZERS[optimizer]()
        step = hl.function(lambda x, y: hl.minimize(lambda: ops.mean((model(x) - y) ** 2), model, own))
        model(X)
        model.layers[0].trainable = False
        for index in range(9):
            before = numpy(model.layers[0].kernel)
            step(X, Y)
            assert (numpy(model.layers[0].kernel) != before).any() == model.layers[0].trainable
            if index % 2:
                model.layers[0].trainable = not model.layers[0].trainable
        return [numpy(variable) for variable in [*model.variables, *own.variables]], step

    found, step = run()
    assert len(step.traces) == (3 if optimizer == "averaged" else 2)
    with hl.run_eagerly(True):
        for one, other in zip(found, run()[0], strict=True):
            close(one, other)


AROUND = {
    "WeightAveraging": hl.optimizers.WeightAveraging,
    "MultiOptimizer": lambda inner: keras.optimizers.MultiOptimizer(lambda variable: inner),
}


@pytest.mark.parametrize("around", AROUND)
def test_function_heeds_a_number_of_an_optimizer_inside_another(around):
    dense, inner = built(layers.Dense(1), 3), keras.optimizers.SGD(1.0, momentum=0.5)
    optimizer = AROUND[around](inner)

    @hl.function
    def step():
        hl.minimize(lambda: ops.sum(dense.bias), dense.bias, optimizer)

    step()
    inner.momentum = 0.25
    with pytest.warns(RetraceWarning, match=r"momentum has changed from 0\.5 to 0\.25"):
        step()
    close(dense.bias, [-1 + (-0.25 - 1)])


def test_function_heeds_a_number_of_a_schedule_and_names_where_it_is():
    schedule = keras.optimizers.schedules.ExponentialDecay(1.0, 1, 1.0)
    dense, optimizer = built(layers.Dense(1), 3), keras.optimizers.SGD(schedule)

    @hl.function
    def step():
        hl.minimize(lambda: ops.sum(dense.bias), dense.bias, optimizer)

    step()
    schedule.initial_learning_rate = 0.5
    message = r"optimizer\.learning_rate\.initial_learning_rate has changed from 1\.0 to 0\.5.*cannot be a variable"
    with pytest.warns(RetraceWarning, match=message):
        step()
    close(dense.bias, [-1.5])


class Counting:
    def __init__(self):
        self.count, self.shown, self.seen, self.cache, self.stats = 0, 0, [], None, {"steps": 0, "shown": 0}
        self.weight = 8.0

    def every_third(self, x):
        self.count += 1
        return x * (self.count % 3 == 0)

    def by_key(self, x):
        self.stats["steps"] += 1
        return x * (self.stats["steps"] > 2)

    def in_one_line(self, x):
        self.count += 1; return x * min(1, self.count / 8)  # fmt: skip  # noqa: E702

    def by_key_in_one_line(self, x):
        self.stats["steps"] += 1; return x * (1 if self.stats["steps"] % 2 else 0)  # fmt: skip  # noqa: E702

    def halved(self, x):
        self.weight *= 0.5
        return x * self.weight

    def harmless(self, x):
        self.last_size = x.shape[0]
        self.seen.append(x.shape)
        self.shown += 1
        self.stats["shown"] = self.stats["shown"] + 1
        if self.cache is None:
            self.cache = ops.convert_to_numpy(np.ones(3)).sum()
        return x * self.cache / self.last_size


COUNTING = {
    "every_third": ("self.count", "0", "+= 1"),
    "by_key": ("self.stats['steps']", "0", "+= 1"),
    "in_one_line": ("self.count", "0", "+= 1"),
    "by_key_in_one_line": ("self.stats['steps']", "0", "+= 1"),
    "halved": ("self.weight", "8.0", "*= 0.5"),
}


@pytest.mark.parametrize("method", COUNTING)
def test_function_tells_of_a_number_that_it_changes_and_reads(method):
    path, before, update = COUNTING[method]
    variable = re.escape(f"{path} = keras.Variable({before}, trainable=False)")
    message = rf"{re.escape(path)} from {before} to .*{variable}.*by {re.escape(path)}\.assign\(.*HL140"
    with pytest.warns(HandloomWarning, match=message) as told:
        hl.function(getattr(Counting(), method))(ones(2))
    assert update in _line(told[0])


def test_function_tells_of_a_variable_of_an_enclosing_function_if_it_reads_the_count():
    count = traces = 0

    def step(x):
        nonlocal count
        count += 1
        return x * (count % 3)

    def noted(x):
        nonlocal traces
        traces += 1
        return x

    with pytest.warns(HandloomWarning, match=r"step has changed count from 0 to .*HL140"):
        hl.function(step)(ones(2))
    hl.function(noted)(ones(2))


def test_function_neither_warns_of_harmless_assignments_nor_is_compiled_again_for_them():
    step = hl.function(Counting().harmless)
    for size in (2, 3, 2, 3):
        close(step(ones(size)), [3 / size] * size)
    assert len(step.traces) == 2


def test_function_that_freezes_a_part_in_turns_is_compiled_once():
    first, second = (sequential(layers.Dense(1)) for _ in range(2))
    optimizers = keras.optimizers.SGD(0.1), keras.optimizers.SGD(0.1)

    @hl.function
    def step(x, y):
        for trained, frozen, optimizer in ((first, second, optimizers[0]), (second, first, optimizers[1])):
            trained.trainable, frozen.trainable = True, False
            hl.minimize(lambda: ops.mean((first(x) + second(x) - y) ** 2), trained, optimizer)

    for _ in range(2):
        before = [numpy(weight) for weight in (*first.weights, *second.weights)]
        step(X, Y)
        after = [numpy(weight) for weight in (*first.weights, *second.weights)]
        assert all((new != old).any() for new, old in zip(after, before, strict=True))
    assert [trace.compiled for trace in step.traces] == [True]
