"""`hl.Model` with steps of its own: their results, `minimize`, and the checks of `compile`."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.errors import HandloomWarning, OptimizerError, StepError
from tests.models import compiled, fit, functional
from tests.numbers import close, each_close, normal, numpy, same

X = normal(40, 3)
Y = (X @ [[1.0], [-2.0], [0.5]]).astype("float32")


def mlp(cls=hl.Model):
    return functional(layers.Dense(4, "tanh", name="hidden"), layers.Dense(1), cls=cls)


# ------------------------------------------------------------------------ steps


class Largest(keras.metrics.Metric):
    """The largest value so far, which an average over batches would not give."""

    def __init__(self, **options):
        super().__init__(**options)
        self.value = self.add_variable((), keras.initializers.Constant(-1e9), name="value")

    def update_state(self, values):
        self.value.assign(ops.maximum(self.value, ops.max(values)))

    def result(self):
        return self.value.value

    def reset_state(self):
        self.value.assign(-1e9)


class Reporting(hl.Model):
    """Reports facts about the targets in every form that a step may return."""

    def __init__(self):
        super().__init__()
        self.tracker, self.largest = keras.metrics.Mean(name="tracked"), Largest(name="largest")

    def train_step(self, data):
        _, y = data
        self.tracker.update_state(y)
        self.largest.update_state(y)
        nested = {"inside": ops.mean(y) + 1}
        return {"metric": self.tracker, "result": self.tracker.result(), "largest": self.largest, "nested": nested}

    test_step = train_step


def test_fit_and_evaluate_report_each_value_of_a_step_under_its_name(eagerly):
    y = Y[:30] + np.arange(30, dtype="float32")[:, None]
    model = Reporting()
    assert [metric.name for metric in model.metrics] == ["tracked", "largest"]
    reports = (fit(model, X[:30], y, batch_size=20), model.evaluate(X[:30], y, 20, verbose=0, return_dict=True))
    for logs in reports:
        found = {name: np.ravel(value)[-1] for name, value in logs.items()}
        expected = {"metric": y.mean(), "result": y.mean(), "largest": y.max(), "inside": y.mean() + 1}
        assert set(found) == set(expected)
        close([found[name] for name in expected], list(expected.values()))


def test_fit_resets_metrics_that_are_attributes_in_each_epoch():
    rising = np.arange(40, dtype="float32")[:, None]
    epochs = iter(range(2))

    def falling():
        """Smaller targets in each epoch, so that a value kept from the epoch before would show."""
        lower = 100 * next(epochs)
        yield from ((X[:20], rising[first:][:20] - lower) for first in (0, 20))

    history = fit(Reporting(), falling, epochs=2)
    close(history["largest"], [39, -61])
    close(history["metric"], [19.5, -80.5])


def test_train_step_and_test_step_may_use_the_results_of_the_default_ones():
    class Doubled(hl.Model):
        def train_step(self, data):
            logs = super().train_step(data)
            return logs | {"double": 2 * logs["loss"]}

        def test_step(self, data):
            return {"error": super().test_step(data)["loss"]}

    model = compiled(mlp(Doubled), metrics=["mae"])
    history = fit(model, X, Y, batch_size=25, validation_data=(X, Y))
    assert set(history) == {"loss", "mae", "double", "val_error"}
    close(history["double"], 2 * np.array(history["loss"]))
    close(history["val_error"][0], np.mean((model.predict(X, verbose=0) - Y) ** 2))


def test_test_step_and_predict_step_need_no_compile():
    class Own(hl.Model):
        def test_step(self, data):
            x, y = data
            return {"largest_error": ops.max(ops.abs(self(x) - y))}

        def predict_step(self, data):
            return {"negative": -self(data), "count": ops.shape(data)[0] * ops.ones((len(data),))}

    model = mlp(Own)
    outputs = numpy(model(X))
    error = np.abs(outputs - Y)
    expected = np.average([error[:30].max(), error[30:].max()], weights=[30, 10])
    close(model.evaluate(X, Y, batch_size=30, verbose=0), expected)
    predicted = model.predict(X, batch_size=30, verbose=0)
    close(predicted["negative"], -outputs)
    same(predicted["count"], [30.0] * 30 + [10.0] * 10)


class Taped(hl.Model):
    """The step that Keras's guide for TensorFlow teaches."""

    def train_step(self, data):
        import tensorflow as tf  # noqa: PLC0415

        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(y=y, y_pred=y_pred)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return self.compute_metrics(x, y, y_pred) | {"loss": loss}


class Backward(hl.Model):
    """The step that Keras's guide for PyTorch teaches."""

    def train_step(self, data):
        import torch  # noqa: PLC0415

        x, y = data
        self.zero_grad()
        y_pred = self(x, training=True)
        loss = self.compute_loss(y=y, y_pred=y_pred)
        loss.backward()
        with torch.no_grad():
            self.optimizer.apply([variable.value.grad for variable in self.trainable_variables])
        return self.compute_metrics(x, y, y_pred) | {"loss": loss}


@pytest.mark.parametrize(
    "cls",
    [
        pytest.param(Taped, marks=pytest.mark.backend("tensorflow")),
        pytest.param(Backward, marks=pytest.mark.backend("torch")),
    ],
)
def test_fit_trains_with_a_train_step_written_for_one_backend_as_with_the_default_one(cls, eagerly):
    default, own = mlp(), mlp(cls)
    own.set_weights(default.get_weights())
    histories = []
    for model in (default, own):
        compiled(model, keras.optimizers.SGD(0.1, momentum=0.9)).optimizer.build(model.trainable_variables)
        histories.append(fit(model, X, Y, batch_size=20, epochs=3)["loss"])
    close(*histories)
    each_close(own.get_weights(), default.get_weights())


def test_evaluate_and_predict_take_a_number_of_steps_and_warn_if_the_data_has_fewer():
    class Count(hl.Model):
        def test_step(self, data):
            return {"mean": ops.mean(data)}

        def predict_step(self, data):
            return data

    numbers = np.arange(40, dtype="float32")[:, None]
    model = Count()
    assert model.evaluate(numbers, batch_size=10, steps=2, verbose=0) == 9.5
    same(model.predict(numbers, batch_size=15, steps=2, verbose=0), numbers[:30])
    with pytest.warns(HandloomWarning, match="4 of 7 steps"):
        assert model.evaluate(numbers, batch_size=10, steps=7, verbose=0) == 19.5
    with pytest.warns(HandloomWarning, match="3 of 4 steps"):
        same(model.predict(numbers, batch_size=15, steps=4, verbose=0), numbers)


# --------------------------------------------------------------------- minimize


def test_minimize_of_parts_in_turn_shares_the_compiled_optimizer():
    """An optimizer of Keras, built for the first part, would refuse the second."""

    class InTurn(hl.Model):
        def train_step(self, data):
            x, y = data
            parts = [layer for layer in self.layers if layer.weights]
            return {part.name: self.minimize(lambda: ops.mean((self(x) - y) ** 2), wrt=part) for part in parts}

    model = compiled(mlp(InTurn), "adam", loss=None)
    before = model.get_weights()
    fit(model, X, Y)
    assert not any(np.array_equal(one, other) for one, other in zip(before, model.get_weights(), strict=True))
    assert len(model.optimizer.variables) == 2 + 2 * 4


def test_minimize_outside_of_fit_makes_one_update_now():
    model = compiled(functional(layers.Dense(1, use_bias=False)))
    kernel = model.get_weights()[0]
    close(model.minimize(lambda: ops.sum(model.trainable_variables[0] ** 2)), np.sum(kernel**2))
    close(model.get_weights()[0], 0.8 * kernel)


def test_minimize_of_a_model_that_is_not_compiled_says_how_to_give_an_optimizer():
    class Uncompiled(hl.Model):
        def train_step(self, data):
            return {"loss": self.minimize(lambda: ops.mean(self(data)))}

    with pytest.raises(OptimizerError, match=r"Uncompiled has no optimizer.*compile\(.*minimize\(.*HL333"):
        fit(mlp(Uncompiled), X)


# ---------------------------------------------------------------------- compile


@pytest.mark.once
@pytest.mark.parametrize("method", ["fit", "evaluate", "train_on_batch", "test_on_batch"])
def test_methods_that_use_the_compiled_loss_ask_for_compile(method):
    with pytest.raises(StepError, match=rf"{method}\(\) was called before compile\(\)\. Model uses the default.*HL213"):
        getattr(mlp(), method)(X, Y)
