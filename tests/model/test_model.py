"""`hl.Model` with custom steps: their results, `minimize`, and the checks of `compile`."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.errors import HandloomWarning, StepError
from tests.models import compiled, fit, functional
from tests.numbers import close, each_close, normal, numpy, same
from tests.test_pain import KERAS_STEP

X = normal(40, 3)
Y = (X @ [[1.0], [-2.0], [0.5]]).astype("float32")


def mlp(cls=hl.Model):
    return functional(layers.Dense(4, "tanh", name="hidden"), layers.Dense(1), cls=cls)


# ------------------------------------------------------------------------ steps


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


@pytest.mark.backend("tensorflow", "torch")
def test_fit_trains_with_a_train_step_written_for_one_backend_as_with_the_default_one(eagerly):
    default, own = mlp(), mlp(type("Own", (KERAS_STEP, hl.Model), {}))
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


# ---------------------------------------------------------------------- compile


@pytest.mark.once
@pytest.mark.parametrize("method", ["fit", "evaluate", "train_on_batch", "test_on_batch"])
def test_fit_and_evaluate_before_compile_are_refused(method):
    with pytest.raises(StepError, match=rf"{method}\(\) was called before compile\(\)\. Model uses the default.*HL213"):
        getattr(mlp(), method)(X, Y)
