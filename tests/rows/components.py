"""The three ways in which a component is used: in a functional model, in a subclassed one, and in a loop by hand.

Each takes layers that follow on each other, an example of their inputs, and what `compile` takes; and gives something
that trains them, saves them, and loads them.
"""

import keras
import numpy as np
import pytest
from keras import ops

import handloom as hl

registered = keras.saving.register_keras_serializable("rows")
BATCH = 64


class InARow:
    """Calls what it is given one after the other."""

    def __init__(self, parts, **options):
        super().__init__(**options)
        self.parts = list(parts)

    def call(self, x, training=False):  # Keras tells what is inside whether it trains, if this wants to know.
        for part in self.parts:
            x = part(x)
        return x

    def get_config(self):
        return {"parts": [keras.saving.serialize_keras_object(part) for part in self.parts]}

    @classmethod
    def from_config(cls, config):
        return cls([keras.saving.deserialize_keras_object(part) for part in config["parts"]])


@registered
class ChainLayer(InARow, keras.Layer):
    """As a layer."""


@registered
class ChainModel(InARow, hl.Model):
    """As a model."""


class InModel:
    """A model, trained by its `fit`."""

    def __init__(self, model, optimizer, loss="mse", metrics=()):
        self.net = model
        model.compile(optimizer, loss, metrics=list(metrics))

    @property
    def optimizer(self):
        return self.net.optimizer

    def train(self, data, epochs=2):
        """Returns what is reported, by epoch."""
        x, y, *weight = data
        weight = weight[0] if weight else None
        options = {"batch_size": BATCH, "epochs": epochs, "shuffle": False, "verbose": 0}
        return self.net.fit(x, y, sample_weight=weight, **options).history

    def reloaded(self, path):
        """The same, saved and loaded."""
        self.net.save(path / "model.keras")
        loaded = InModel.__new__(InModel)
        loaded.net = keras.saving.load_model(path / "model.keras")
        return loaded


class InLoop:
    """Any layer, trained by a compiled step and a loop by hand."""

    def __init__(self, layer, optimizer, loss="mse", metrics=()):
        self.net, self.optimizer, self.loss = layer, optimizer, loss
        self.metrics = metrics = list(metrics)
        mean, loss = keras.metrics.Mean(name="loss"), keras.losses.get(loss)
        self._reported = [mean, *metrics, *layer.metrics]

        @hl.function
        def step(x, y, weight=None):
            def loss_fn():
                y_pred = layer(x, training=True)
                if isinstance(loss, keras.Loss):
                    return loss(y, y_pred, sample_weight=weight), y_pred
                values = loss(y, y_pred)
                return ops.mean(values if weight is None else values * weight), y_pred

            value, y_pred = hl.minimize(loss_fn, layer, optimizer, has_aux=True)
            mean.update_state(value, sample_weight=len(y))
            for metric in metrics:
                metric.update_state(y, y_pred)
            return {metric.name: metric.result() for metric in self._reported}

        self._step = step

    def train(self, data, epochs=2):
        """Returns what is reported, by epoch."""
        by_epoch = []
        for _ in range(epochs):
            for metric in self._reported:
                metric.reset_state()
            for batch in hl.Feed(data, batch_size=BATCH):
                logs = self._step(*batch)
            by_epoch.append(logs)
        return {name: [float(logs[name]) for logs in by_epoch] for name in logs}

    def reloaded(self, path):
        """The same, made anew from its configs and restored from a checkpoint."""
        loaded = InLoop(_made_anew(self.net), _made_anew(self.optimizer), self.loss, map(_made_anew, self.metrics))
        loaded.optimizer.build(loaded.net.trainable_variables)
        with hl.Checkpointer(path, self._state()) as checkpointer:
            checkpointer.save(0)
        hl.Checkpointer(path, loaded._state()).restore()
        return loaded

    def _state(self):
        return {"net": self.net, "optimizer": self.optimizer, "metrics": self.metrics}


def _made_anew(thing):
    return keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(thing))


def functional(parts, x, optimizer="sgd", loss="mse", metrics=()):
    inputs = keras.tree.map_structure(lambda array: keras.Input(array.shape[1:]), x)
    outputs = inputs
    for part in parts:
        outputs = part(outputs)
    return InModel(hl.Model(inputs, outputs), optimizer, loss, metrics)


def subclassed(parts, x, optimizer="sgd", loss="mse", metrics=()):
    return InModel(_called(ChainModel(parts), x), optimizer, loss, metrics)


def by_hand(parts, x, optimizer="sgd", loss="mse", metrics=()):
    return InLoop(_called(ChainLayer(parts), x), keras.optimizers.get(optimizer), loss, metrics)


def _called(net, x):
    """Once, so that all variables are there."""
    net(keras.tree.map_structure(lambda array: array[:1], x))
    return net


WAYS = {"functional": functional, "subclassed": subclassed, "own loop": by_hand}
IN_EACH_WAY = "in a functional model, a subclassed one and a loop by hand"
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


# -------------------------------------------------------------- the same for metrics


class AsItIs(hl.Model):
    def call(self, x):
        return ops.copy(x)


def functional_as_it_is():
    inputs = keras.Input((1,))
    return hl.Model(inputs, keras.layers.Identity()(inputs))


class Seen(keras.callbacks.Callback):
    """The last of the reported values, after each batch."""

    def __init__(self):
        super().__init__()
        self.values = []

    def on_test_batch_end(self, batch, logs=None):
        self.values.append(list(logs.values())[-1])


def evaluated(build):
    def measure(metric, y, y_pred, batch_size, epochs):
        model, seen = build(), Seen()
        model.compile(loss="mse", metrics=[metric])
        for _ in range(epochs):
            model.evaluate(y_pred, y, batch_size=batch_size, callbacks=[seen], verbose=0)
        return seen.values

    return measure


def measured_by_hand(metric, y, y_pred, batch_size, epochs):
    if not isinstance(metric, keras.Metric):
        metric = keras.metrics.MeanMetricWrapper(metric)

    @hl.function
    def step(y, y_pred):
        metric.update_state(y, y_pred)
        return metric.result()

    values = []
    for _ in range(epochs):
        metric.reset_state()
        values += [float(step(*batch)) for batch in hl.Feed((y, y_pred), batch_size=batch_size)]
    return values


metric_ways = pytest.mark.parametrize(
    "measure", [evaluated(functional_as_it_is), evaluated(AsItIs), measured_by_hand], ids=WAYS
)
"""How a metric is measured: each gives its value after each batch, of a few epochs."""


# -------------------------------------------------------------------------- compared


def goes_on_as_if_it_had_never_been_saved(used, data, path):
    """Saves and loads in the midst of training. Returns what was loaded: the same to the bit ever after."""
    used.train(data)
    loaded = used.reloaded(path)
    assert loaded.train(data) == used.train(data)
    pairs = [(used.net.weights, loaded.net.weights), (used.optimizer.variables, loaded.optimizer.variables)]
    for ones, others in pairs:
        for one, other in zip(ones, others, strict=True):
            np.testing.assert_array_equal(ops.convert_to_numpy(one), ops.convert_to_numpy(other))
    return loaded


def in_numpy(update, data, weights, epochs=2, batch_size=BATCH):
    """Trains in NumPy.

    Args:
        update: Takes the weights and a batch, array by array; returns the next weights, and what is to be reported of
            each example, such as its loss.
        data: Arrays in any structure.
        weights: To begin with.
        epochs: How often.
        batch_size: The last batch is what is left.

    Returns:
        The means of each epoch, and the last weights.
    """
    arrays, means = [array.astype("float64") for array in keras.tree.flatten(data)], []
    for _ in range(epochs):
        reported = []
        for first in range(0, len(arrays[0]), batch_size):
            weights, of_batch = update(weights, *(array[first : first + batch_size] for array in arrays))
            reported.append(of_batch)
        means.append(np.concatenate(reported).mean(axis=0))
    return np.array(means), weights
