"""Three ways to use a component: in a functional model, in a subclassed one, and in a loop by hand.

Each takes a list of layers, example inputs and the arguments of `compile`; the result trains the layers, saves them
and loads them.
"""

import keras
import pytest
from keras import layers, ops

import handloom as hl
from tests.numbers import close, each_close, each_same
from tests.rows import by_numpy

registered = keras.saving.register_keras_serializable("rows")
BATCH = 64


class Chain:
    """Calls its parts one after the other."""

    def __init__(self, parts, **options):
        super().__init__(**options)
        self.parts = list(parts)

    def call(self, x, training=False):  # Keras passes `training` on to the parts only if this method takes it.
        for part in self.parts:
            x = part(x)
        return x

    def get_config(self):
        return {"parts": [keras.saving.serialize_keras_object(part) for part in self.parts]}

    @classmethod
    def from_config(cls, config):
        return cls([keras.saving.deserialize_keras_object(part) for part in config["parts"]])


@registered
class ChainLayer(Chain, keras.Layer):
    """A chain that is a layer."""


@registered
class ChainModel(Chain, hl.Model):
    """A chain that is a model."""


class InModel:
    """A model, trained by its `fit`."""

    def __init__(self, model, optimizer="sgd", loss="mse", metrics=()):
        self.net = model
        model.compile(optimizer, loss, metrics=list(metrics))

    @property
    def optimizer(self):
        return self.net.optimizer

    def train(self, data, epochs=2):
        """Returns the reported values by epoch."""
        x, y, *weight = data
        options = {"batch_size": BATCH, "epochs": epochs, "shuffle": False, "verbose": 0}
        return self.net.fit(x, y, sample_weight=weight[0] if weight else None, **options).history

    def reloaded(self, path):
        """The same, saved and loaded."""
        self.net.save(path / "model.keras")
        loaded = InModel.__new__(InModel)
        loaded.net = keras.saving.load_model(path / "model.keras")
        return loaded


class InLoop:
    """Any layer, trained by a compiled step and a loop by hand."""

    def __init__(self, layer, optimizer="sgd", loss="mse", metrics=()):
        self.net, self.optimizer, self.loss = layer, keras.optimizers.get(optimizer), loss
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

            value, y_pred = hl.minimize(loss_fn, layer, self.optimizer, has_aux=True)
            mean.update_state(value, sample_weight=len(y))
            for metric in metrics:
                metric.update_state(y, y_pred)
            return {metric.name: metric.result() for metric in self._reported}

        self._step = step

    def train(self, data, epochs=2):
        """Returns the reported values by epoch."""
        by_epoch = []
        for _ in range(epochs):
            for metric in self._reported:
                metric.reset_state()
            for batch in hl.Feed(data, batch_size=BATCH):
                logs = self._step(*batch)
            by_epoch.append(logs)
        return {name: [float(logs[name]) for logs in by_epoch] for name in logs}

    def reloaded(self, path):
        """The same, created again from its configs and restored from a checkpoint."""
        loaded = InLoop(_copied(self.net), _copied(self.optimizer), self.loss, map(_copied, self.metrics))
        loaded.optimizer.build(loaded.net.trainable_variables)
        with hl.Checkpointer(path, self._state()) as checkpointer:
            checkpointer.save(0)
        hl.Checkpointer(path, loaded._state()).restore()
        return loaded

    def _state(self):
        return {"net": self.net, "optimizer": self.optimizer, "metrics": self.metrics}


def _copied(thing):
    return keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(thing))


def functional(parts, x, *compile_arguments, **options):
    inputs = keras.tree.map_structure(lambda array: keras.Input(array.shape[1:]), x)
    outputs = inputs
    for part in parts:
        outputs = part(outputs)
    return InModel(hl.Model(inputs, outputs), *compile_arguments, **options)


def subclassed(parts, x, *compile_arguments, cls=ChainModel, **options):
    return InModel(_built(cls(parts), x), *compile_arguments, **options)


def by_hand(parts, x, *compile_arguments, **options):
    return InLoop(_built(ChainLayer(parts), x), *compile_arguments, **options)


def _built(net, x):
    """Called once, so that all variables exist."""
    net(keras.tree.map_structure(lambda array: array[:1], x))
    return net


WAYS = {"functional": functional, "subclassed": subclassed, "own loop": by_hand}
IN_EACH_WAY = "in a functional model, a subclassed one and a loop by hand"
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


class Seen(keras.callbacks.Callback):
    """Keeps the reported value that is not the loss, batch by batch."""

    def __init__(self):
        super().__init__()
        self.values = []

    def on_test_batch_end(self, batch, logs=None):
        [value] = [value for name, value in logs.items() if name != "loss"]
        self.values.append(value)


def evaluated(build):
    def measure(metric, y, y_pred, batch_size, epochs):
        model, seen = build([layers.Identity()], y_pred, metrics=[metric]).net, Seen()
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
    "measure", [evaluated(functional), evaluated(subclassed), measured_by_hand], ids=WAYS
)
"""Three ways to measure a metric: each returns its value after each batch of a few epochs."""


def assert_trains_as_in_numpy(used, data, update, weights, epochs=2):
    """Compares the losses of each epoch and the last weights with those of `by_numpy.train`; returns both."""
    history = used.train(data, epochs)
    losses, weights = by_numpy.train(update, data, weights, epochs, BATCH)
    close(history["loss"], losses.mean(axis=1), rtol=1e-4)
    each_close(used.net.get_weights(), weights, rtol=1e-3, atol=1e-5)
    return history["loss"], weights


def assert_trains_on_exactly(used, data, path):
    """Saves and loads in the middle of training, and compares the rest bitwise. Returns what was loaded."""
    used.train(data)
    loaded = used.reloaded(path)
    assert loaded.train(data) == used.train(data)
    each_same([*loaded.net.weights, *loaded.optimizer.variables], [*used.net.weights, *used.optimizer.variables])
    return loaded
