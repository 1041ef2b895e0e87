"""Runs in which callbacks change what a compiled step read in Python: it takes effect at the next step."""

import collections
import functools

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.errors import HandloomWarning, RetraceWarning
from handloom.optimizers import GradientAccumulation, LossScaleOptimizer, WeightAveraging
from tests.numbers import close, each_close, normal, numpy, ones

X, Y = normal(8, 3), normal(8, 1, seed=1)

OPTIMIZERS = {
    "Adam": lambda: keras.optimizers.Adam(0.01),
    "by name": lambda: {"base": "adam", "head": keras.optimizers.SGD(0.1, momentum=0.9)},
    "accumulated": lambda: GradientAccumulation(keras.optimizers.SGD(0.1), 2),
    "scaled and averaged": lambda: LossScaleOptimizer(WeightAveraging({"*": "rmsprop"})),
}


class Tuned(hl.Model):
    def __init__(self):
        super().__init__()
        self.base, self.head = layers.Dense(4), layers.Dense(1)

    def call(self, x):
        return self.head(self.base(x))


class TunedByHand(Tuned):
    def train_step(self, data):
        x, y = data
        return {"loss": self.minimize(lambda: ops.mean((self(x) - y) ** 2))}


class Toggle(keras.callbacks.Callback):
    """Unfreezes and freezes a part of a model again and again, and notes whether each step moved it."""

    def __init__(self, part, each):
        super().__init__()
        self.part, self.count, self.moved, self.was_trainable = part, 0, [], []
        setattr(self, f"on_{each}_begin", self.begin)
        setattr(self, f"on_{each}_end", self.end)

    def begin(self, *_):
        self.before = [numpy(weight) for weight in self.part.weights]
        self.was_trainable.append(self.part.trainable)

    def end(self, *_):
        self.moved.append(
            any((numpy(new) != old).any() for new, old in zip(self.part.weights, self.before, strict=True))
        )
        self.count += 1
        if self.count % 2 == 0:
            self.part.trainable = not self.part.trainable


def tuned(cls, optimizer):
    keras.utils.set_random_seed(1)
    model = cls()
    model(X)
    model.base.trainable = False
    model.compile(OPTIMIZERS[optimizer](), loss="mse")
    return model


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("cls", "each"), [(Tuned, "epoch"), (TunedByHand, "train_batch")])
def test_fit_heeds_trainable_set_by_a_callback(cls, each, optimizer):
    def run():
        model = tuned(cls, optimizer)
        toggle = Toggle(model.base, each)
        sizes = {"epochs": 7, "batch_size": 8} if each == "epoch" else {"epochs": 1, "batch_size": 1}
        model.fit(X, Y, **sizes, shuffle=False, verbose=0, callbacks=[toggle])
        return model, toggle

    model, toggle = run()
    if optimizer != "accumulated":  # It updates in every second step.
        assert toggle.moved == toggle.was_trainable
    with hl.run_eagerly(True):
        each_close(model.get_weights(), run()[0].get_weights(), rtol=1e-4)


@pytest.mark.parametrize("eager", [False, True])
def test_fit_in_which_a_layer_is_unfrozen_moves_as_two_fits_of_keras(eager):
    weights = []
    for make in (Tuned, lambda: keras.Sequential([layers.Dense(4), layers.Dense(1)])):
        keras.utils.set_random_seed(1)
        model = make()
        model(X)
        base = model.layers[0]
        base.trainable = False
        model.compile(keras.optimizers.SGD(0.1), loss="mse", run_eagerly=eager and make is Tuned)
        if make is Tuned:
            unfreeze = keras.callbacks.LambdaCallback(
                on_epoch_end=lambda *_, base=base: setattr(base, "trainable", True)
            )
            model.fit(X, Y, epochs=2, batch_size=4, shuffle=False, verbose=0, callbacks=[unfreeze])
        else:
            model.fit(X, Y, batch_size=4, shuffle=False, verbose=0)
            base.trainable = True
            model.compile(keras.optimizers.SGD(0.1), loss="mse")
            model.fit(X, Y, batch_size=4, shuffle=False, verbose=0)
        weights.append(model.get_weights())
    each_close(*weights)


def test_train_on_batch_of_a_model_frozen_in_turns_reuses_its_steps():
    model = tuned(TunedByHand, "Adam")
    for index in range(6):
        model.base.trainable = bool(index % 2)
        before = model.base.get_weights()
        model.train_on_batch(X, Y)
        assert any((new != old).any() for new, old in zip(model.base.get_weights(), before, strict=True)) == bool(
            index % 2
        )
    [step] = model._steps._reporting.values()
    assert len(step.function.traces) == 2


class Weighted(hl.Model):
    def __init__(self):
        super().__init__()
        self.w = self.add_weight(shape=(), initializer="ones")
        self.beta, self.config, self.count = 1.0, {"gamma": 0.0}, 0

    def train_step(self, data):
        return {"loss": self.minimize(lambda: 0.0 * self.w + self.beta + self.config["gamma"] + 0 * ops.sum(data))}


class Counting(Weighted):
    def train_step(self, data):
        self.count += 1
        if self.count % 3 == 0:
            return super().train_step(data)
        return {"loss": 0.0}


@pytest.mark.parametrize("each", ["epoch", "train_batch"])
def test_fit_heeds_a_loss_weight_that_a_callback_changes_and_says_where_to_keep_it(each):
    model, seen = Weighted(), []

    def change(index, logs):
        seen.append(float(np.asarray(logs["loss"])))
        model.beta, model.config["gamma"] = 1.0 + (index + 1) % 2, float(index + 1) // 2

    model.compile(keras.optimizers.SGD(0.1))
    callback = keras.callbacks.LambdaCallback(**{f"on_{each}_end": change})
    sizes = {"epochs": 3, "batch_size": 8} if each == "epoch" else {"batch_size": 2}
    with pytest.warns(RetraceWarning) as told:
        model.fit(ones(8, 2), **sizes, verbose=0, callbacks=[callback])
    assert [f"{w.message.finding.saw}"[:11] for w in told] == ["self.beta h", "self.config"]
    values = [1.0, 2.0, 1.0 + 1.0, 2.0 + 1.0][: len(seen)]
    means = values if each == "epoch" else np.cumsum(values) / np.arange(1, len(seen) + 1)
    close(seen, means)


def test_fit_tells_of_a_step_that_counts_in_python():
    model = Counting()
    model.compile(keras.optimizers.SGD(0.1))
    with pytest.warns(HandloomWarning, match=r"train_step has changed self\.count .*HL140"):
        model.fit(ones(8, 2), batch_size=2, verbose=0)


def test_hl_fit_heeds_trainable_set_by_a_callback():
    model, optimizer = (
        keras.Sequential([keras.Input((3,)), layers.Dense(4), layers.Dense(1)]),
        keras.optimizers.Adam(0.1),
    )
    model.layers[0].trainable = False
    toggle = Toggle(model.layers[0], "epoch")

    def step(x, y):
        return {"loss": hl.minimize(lambda: ops.mean((model(x) - y) ** 2), model, optimizer)}

    state = {"model": model, "optimizer": optimizer}
    hl.fit(step, (X, Y), epochs=7, state=state, callbacks=[toggle], verbose=0)
    assert toggle.moved == toggle.was_trainable == [False, False, True, True, False, False, True]


class Penalty(keras.Regularizer):
    def __init__(self):
        self.factor = 0.0

    def __call__(self, weight):
        return self.factor * ops.sum(weight)


class Above(keras.metrics.Metric):
    """The share of predictions above a threshold."""

    def __init__(self):
        super().__init__(name="above")
        self.threshold, self.mean = 0.0, keras.metrics.Mean()

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.mean.update_state(ops.cast(y_pred > self.threshold, "float32"))

    def result(self):
        return self.mean.result()


class Steady(keras.optimizers.schedules.LearningRateSchedule):
    def __init__(self):
        self.rate = 0.0

    def __call__(self, step):
        return ops.convert_to_tensor(self.rate, "float32")


class Damped(keras.optimizers.SGD):
    def __init__(self):
        super().__init__(0.1)
        self.gamma = 0.0

    def update_step(self, gradient, variable, learning_rate):
        super().update_step(gradient * self.gamma, variable, learning_rate)


class Shown(hl.Model):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.factor = 0.0

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        return super().compute_metrics(x, y, y_pred, sample_weight) | {"shown": self.factor * ops.mean(y_pred)}


def by_default(x, scale={"factor": 0.0}):  # noqa: B006  So may a user.
    return x * scale["factor"]


def in_keras():
    """A layer, a number set in what it holds, and options of `compile`, by what holds the number."""
    l2, penalty, constraint = keras.regularizers.L2(0.0), Penalty(), keras.constraints.MaxNorm(0.0)
    factors, several, recent = [0.0], {"a": [[0.0]]}, collections.deque([0.0] * 3)
    many, schedule, damped, above = [0.0] * 200, Steady(), Damped(), Above()
    sgd, dense = keras.optimizers.SGD(0.1), layers.Dense(1)
    rescaling = layers.Rescaling(0)

    def at(items, key):
        return lambda value: items.__setitem__(key, value)

    def of(thing, name):
        return lambda value: setattr(thing, name, value)

    return {
        "a regularizer": (layers.Dense(1, kernel_regularizer=l2), of(l2, "l2"), {}),
        "a regularizer of the user": (layers.Dense(1, bias_regularizer=penalty), of(penalty, "factor"), {}),
        "a regularizer of outputs": (layers.Dense(1, activity_regularizer=l2), of(l2, "l2"), {}),
        "a constraint": (layers.Dense(1, kernel_constraint=constraint), of(constraint, "max_value"), {}),
        "a list of Lambda": (layers.Lambda(lambda x: x * factors[0]), at(factors, 0), {}),
        "lists in a dict": (layers.Lambda(lambda x: x * several["a"][0][0]), at(several["a"][0], 0), {}),
        "a deque": (layers.Lambda(lambda x: x * recent[1]), at(recent, 1), {}),
        "many numbers": (layers.Lambda(lambda x: x * many[150]), at(many, 150), {}),
        "a default": (layers.Lambda(by_default), at(by_default.__defaults__[0], "factor"), {}),
        "an activation": (layers.Dense(1, activation=lambda x: x * factors[0]), at(factors, 0), {}),
        "a number that was an integer": (rescaling, lambda value: setattr(rescaling, "scale", value or 0), {}),
        "a schedule": (layers.Dense(1), of(schedule, "rate"), {"optimizer": keras.optimizers.SGD(schedule)}),
        "an optimizer of the user": (layers.Dense(1), of(damped, "gamma"), {"optimizer": damped}),
        "an optimizer": (layers.Dense(1), lambda value: setattr(sgd, "clipnorm", value or None), {"optimizer": sgd}),
        "a layer": (dense, lambda value: setattr(dense, "activation", (ops.relu, ops.tanh)[value > 0]), {}),
        "a metric": (layers.Dense(1), of(above, "threshold"), {"metrics": [above]}),
        "a metric's function": (layers.Dense(1), at(factors, 0), {"metrics": [lambda y, out: out * factors[0]]}),
        "a model": (layers.Dense(1), None, {}),
    }


@pytest.mark.filterwarnings("ignore::handloom.errors.RetraceWarning")
@pytest.mark.parametrize("where", in_keras())
def test_fit_heeds_a_value_in_what_objects_of_keras_hold(where):
    def run(*, eager):
        keras.utils.set_random_seed(1)
        layer, change, options = in_keras()[where]
        inputs = keras.Input((3,))
        model = Shown(inputs, layers.Dense(1)(layer(inputs)))
        change = change or functools.partial(setattr, model, "factor")
        change(0.0)
        model.compile(**{"optimizer": "sgd", "loss": "mse", "run_eagerly": eager} | options)
        begin = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, _: change(0.25 * epoch))
        logs = model.fit(X, Y, batch_size=4, epochs=2, shuffle=False, verbose=0, callbacks=[begin]).history
        return model, [*model.get_weights(), *map(np.asarray, logs.values())]

    model, found = run(eager=False)
    each_close(found, run(eager=True)[1], rtol=1e-4)
    [step] = model._steps._reporting.values()
    assert len(step.function.traces) == 2


@pytest.mark.filterwarnings("ignore::handloom.errors.RetraceWarning")
def test_evaluate_heeds_what_changes_between_two_runs():
    dense = layers.Dense(1, kernel_initializer="ones")
    model = hl.Model([keras.Input((3,)), dense])
    model.compile(loss="mse")
    for activation in (ops.relu, ops.tanh, ops.relu):
        dense.activation = activation
        right = np.mean((numpy(activation(X.sum(axis=1, keepdims=True))) - Y) ** 2)
        close(model.evaluate(X, Y, verbose=0), right, rtol=1e-4)
