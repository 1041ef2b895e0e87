"""Steps in Keras's own manner on JAX: the same numbers as with `keras.Model`."""

import jax
import keras
import numpy as np
import pytest
from keras import layers

import handloom as hl
from tests.models import fit, functional, subclassed
from tests.numbers import each_close, each_same, normal, values_of

pytestmark = pytest.mark.backend("jax")

X = normal(64, 3)
Y = 2 * X[:, :1] + 1
WEIGHTS = np.linspace(0.1, 2, 64, dtype="float32")


def with_own_steps(base):
    class OwnSteps(base):
        """Every part of the state goes through the stateless methods of Keras; counts its forward passes."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.passes = self.add_weight(shape=(), trainable=False, name="passes")

        def losses_and_updates(self, trained, others, measured, x, y, weight):
            y_pred, others = self.stateless_call(trained, others, x, training=True)
            found = self.stateless_compute_loss(
                trained, others, measured, x=x, y=y, y_pred=y_pred, sample_weight=weight, training=True
            )
            loss, (_, others, measured) = found
            return loss, (y_pred, others, measured)

        def measure(self, measured, loss, y, y_pred, weight):
            logs, news = {}, []
            for metric in self.metrics:
                now = measured[len(news) :][: len(metric.variables)]
                arguments = (loss,) if metric.name == "loss" else (y, y_pred, weight)
                news += metric.stateless_update_state(now, *arguments)
                logs[metric.name] = metric.stateless_result(news[-len(now) :])
            return logs, news

        def train_step(self, state, data):
            trained, others, optimizer, measured = state
            x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
            gradient = jax.value_and_grad(self.losses_and_updates, has_aux=True)
            (loss, (y_pred, others, measured)), grads = gradient(trained, others, measured, x, y, weight)
            trained, optimizer = self.optimizer.stateless_apply(optimizer, grads, trained)
            place = [variable is self.passes for variable in self.non_trainable_variables].index(True)
            others[place] = others[place] + 1
            logs, measured = self.measure(measured, loss, y, y_pred, weight)
            return logs, (trained, others, optimizer, measured)

        def test_step(self, state, data):
            trained, others, measured = state
            x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
            y_pred, _ = self.stateless_call(trained, others, x, training=False)
            loss, _ = self.stateless_compute_loss(trained, others, measured, y=y, y_pred=y_pred, training=False)
            logs, measured = self.measure(measured, loss, y, y_pred, weight)
            return logs, (trained, others, measured)

        def predict_step(self, state, data):
            y_pred, others = self.stateless_call(*state, data[0] if isinstance(data, tuple) else data, training=False)
            return 10 * y_pred, others

    return OwnSteps


def by_super(base):
    class BySuper(base):
        def train_step(self, state, data):
            return super().train_step(state, data)

        def test_step(self, state, data):
            return super().test_step(state, data)

        def predict_step(self, state, data):
            y_pred, others = super().predict_step(state, data)
            return 10 * y_pred, others

    return BySuper


def trained(kind, base, optimizer=None, batch_size=16, epochs=2, fitted=None, **options):
    keras.utils.set_random_seed(1)
    parts = [
        layers.Dense(4, use_bias=False, kernel_regularizer="l2"),
        layers.BatchNormalization(),
        layers.Dropout(0.3),
        layers.Dense(1),
    ]
    unbuilt = kind is with_own_steps and {"inputs": None}
    model = (subclassed if unbuilt else functional)(*parts, cls=kind(base), **(unbuilt or {}))
    model.compile(optimizer or keras.optimizers.Adam(0.01), "mse", weighted_metrics=["mae"], **options)
    options = {"epochs": epochs, "batch_size": batch_size, "validation_data": (X[:32], Y[:32])} | (fitted or {})
    return model, fit(model, X, Y, **options)


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}], ids=["compiled", "eager"])
@pytest.mark.parametrize("kind", [with_own_steps, by_super])
def test_steps_that_take_the_state_train_as_in_keras(kind, options):
    weights = {"fitted": {"sample_weight": WEIGHTS}}
    (plain, expected), (own, history) = (trained(kind, base, **weights, **options) for base in (keras.Model, hl.Model))
    assert history.keys() == expected.keys()
    for name, values in expected.items():
        each_close(history[name], values, rtol=1e-4)
    each_close(values_of(own), values_of(plain), rtol=1e-4, atol=1e-5)
    each_close(own.predict(X, verbose=0), plain.predict(X, verbose=0), rtol=1e-4, atol=1e-5)
    each_close(own.evaluate(X, Y, verbose=0), plain.evaluate(X, Y, verbose=0), rtol=1e-4)


@pytest.mark.parametrize("steps", [{"jit_compile": False}, {"steps_per_execution": 2}], ids=str)
def test_a_step_that_takes_the_state_trains_the_same_in_every_way(steps):
    models = [trained(with_own_steps, hl.Model, **options)[0] for options in (steps, {"jit_compile": True})]
    each_close(*map(values_of, models), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("optimizer", "batch_size"),
    [(lambda sgd: hl.optimizers.GradientAccumulation(sgd, 4), 16), (lambda sgd: {"*": sgd}, 64)],
    ids=["accumulation", "by name"],
)
def test_a_step_that_takes_the_state_updates_once_from_all_examples(optimizer, batch_size):
    models = [functional(layers.Dense(1, kernel_initializer="ones"), cls=by_super(hl.Model)) for _ in range(2)]
    for model, is_plain, size in zip(models, (True, False), (64, batch_size), strict=True):
        sgd = keras.optimizers.SGD(0.05, momentum=0.9)
        model.compile(sgd if is_plain else optimizer(sgd), "mse")
        fit(model, X, Y, epochs=3, batch_size=size)
    each_close(models[1].get_weights(), models[0].get_weights())


def test_a_step_that_takes_the_state_resumes_bitwise(tmp_path):
    whole, _ = trained(with_own_steps, hl.Model, epochs=3, fitted={"seed": 1})
    trained(with_own_steps, hl.Model, fitted={"seed": 1, "run_dir": tmp_path})
    resumed, _ = trained(with_own_steps, hl.Model, epochs=3, fitted={"seed": 1, "run_dir": tmp_path})
    each_same(values_of(resumed), values_of(whole))
