"""How long a model's compiled steps are kept: as long as the model stays what they were compiled for."""

import threading

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl

X = np.linspace(-1, 1, 24, dtype="float32").reshape(8, 3)
Y = X[:, :1] + 1


class Counting(hl.Model):
    """Counts how often Python runs its steps, which once they are compiled is never."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.ran = {"train": 0, "test": 0, "predict": 0}

    def train_step(self, data):
        self.ran["train"] += 1
        return super().train_step(data)

    def test_step(self, data):
        self.ran["test"] += 1
        return super().test_step(data)

    def predict_step(self, data):
        self.ran["predict"] += 1
        return super().predict_step(data)


class Stack(Counting, hl.Sequential):
    pass


def make(built=True, **options):
    model = Stack(
        ([keras.Input((3,))] if built else []) + [layers.Dense(2, name="first"), layers.Dense(1, name="last")]
    )
    model.compile(**({"optimizer": keras.optimizers.SGD(0.1), "loss": "mse"} | options))
    return model


def fit(model):
    return model.fit(X, Y, verbose=0).history["loss"][0]


def test_a_second_run_compiles_nothing():
    model = make()
    for run in (fit, lambda model: model.evaluate(X, Y, verbose=0), lambda model: model.predict(X, verbose=0)):
        run(model)
        before = dict(model.ran)
        run(model)
        assert model.ran == before
    model.train_on_batch(X, Y)
    model.test_on_batch(X, Y)
    model.predict_on_batch(X)
    assert model.ran == before


def test_nor_does_one_after_a_model_was_built_by_its_first_fit():
    model = make(built=False)
    fit(model)
    before = dict(model.ran)
    fit(model)
    assert model.ran == before


def test_a_run_within_a_run_keeps_the_steps():
    model = make(built=False)
    model.fit(
        X,
        Y,
        verbose=0,
        callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: model.evaluate(X, Y, verbose=0))],
    )
    before = dict(model.ran)
    fit(model)
    model.evaluate(X, Y, verbose=0)
    assert model.ran == before


def test_compile_starts_anew():
    model = make()
    fit(model)
    before = dict(model.ran)
    model.compile(keras.optimizers.SGD(0.1), "mae")
    expected = np.abs(model.predict(X, verbose=0) - Y).mean()
    np.testing.assert_allclose(fit(model), expected, rtol=1e-5)
    assert model.ran["train"] > before["train"]


@pytest.mark.parametrize("built", [True, False], ids=["built", "built by the first fit"])
def test_a_layer_frozen_and_thawed_between_fits_stands_still_and_moves_again(built):
    model = make(built=built)
    fit(model)
    first = model.get_layer("first")
    for trainable in (False, True):
        first.trainable = trainable
        before = first.get_weights()
        fit(model)
        same = [np.array_equal(one, other) for one, other in zip(before, first.get_weights(), strict=True)]
        assert same == [not trainable] * 2


def test_a_frozen_variable_stands_still_too():
    model = make()
    fit(model)
    kernel = model.get_layer("last").kernel
    kernel.trainable = False
    before = ops.convert_to_numpy(kernel)
    fit(model)
    np.testing.assert_array_equal(ops.convert_to_numpy(kernel), before)


def test_a_layer_without_trained_weights_is_frozen_as_well():
    """Frozen, batch normalization uses its statistics and leaves them alone."""
    normalization = layers.BatchNormalization(center=False, scale=False)
    model = hl.Model([keras.Input((3,)), normalization, layers.Dense(1)])
    model.compile("sgd", "mse")
    fit(model)
    normalization.trainable = False
    before = normalization.get_weights()
    fit(model)
    np.testing.assert_array_equal(normalization.get_weights(), before)


def test_a_layer_frozen_between_batches_stands_still():
    model = make()
    model.train_on_batch(X, Y)
    model.layers[0].trainable = False
    before = model.layers[0].get_weights()
    model.train_on_batch(X, Y)
    np.testing.assert_array_equal(model.layers[0].get_weights()[0], before[0])


def test_a_layer_frozen_during_a_fit_stands_still_from_the_next_on():
    model = make(built=False)

    def freeze(epoch, logs):
        model.layers[0].trainable = False

    model.fit(X, Y, verbose=0, callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=freeze)])
    before = model.layers[0].get_weights()
    fit(model)
    np.testing.assert_array_equal(model.layers[0].get_weights()[0], before[0])


def test_a_layer_added_or_taken_away_is_noticed():
    model = make()
    model.predict(X, verbose=0)
    model.evaluate(X, Y, verbose=0)
    model.pop()
    model.add(layers.Dense(1, kernel_initializer="zeros", bias_initializer="ones"))
    np.testing.assert_array_equal(model.predict(X, verbose=0), np.ones((8, 1)))
    np.testing.assert_array_equal(model.predict_on_batch(X), np.ones((8, 1)))
    np.testing.assert_allclose(model.evaluate(X, Y, verbose=0), np.mean((Y - 1) ** 2), rtol=1e-5)


def test_an_optimizer_put_in_anothers_place_is_used():
    model = make(optimizer=keras.optimizers.SGD(0.0))
    fit(model)
    before = model.get_weights()
    fit(model)
    np.testing.assert_array_equal(model.get_weights()[0], before[0])
    model.optimizer = keras.optimizers.SGD(0.1)
    fit(model)
    assert not np.array_equal(model.get_weights()[0], before[0])


def test_a_learning_rate_takes_effect_without_compiling_anew():
    model = make()
    fit(model)
    ran = dict(model.ran)
    model.optimizer.learning_rate = 0.0
    before = model.get_weights()
    fit(model)
    np.testing.assert_array_equal(model.get_weights()[0], before[0])
    assert model.ran == ran


def test_weights_that_are_set_take_effect_without_compiling_anew():
    model = make()
    model.predict(X, verbose=0)
    ran = dict(model.ran)
    model.set_weights([np.zeros_like(weight) for weight in model.get_weights()])
    np.testing.assert_array_equal(model.predict(X, verbose=0), np.zeros((8, 1)))
    assert model.ran == ran


def test_compiled_to_run_eagerly_python_runs_on_every_batch():
    model = make(run_eagerly=True)
    model.fit(X, Y, batch_size=4, epochs=3, verbose=0)
    model.evaluate(X, Y, batch_size=4, verbose=0)
    model.predict(X, batch_size=4, verbose=0)
    assert model.ran == {"train": 6, "test": 2, "predict": 2}


def test_run_eagerly_may_be_switched_on_the_model():
    model = make()
    fit(model)
    model.run_eagerly = True
    before = model.ran["train"]
    fit(model)
    assert model.ran["train"] == before + 1
    model.run_eagerly = False
    fit(model)
    assert model.ran["train"] == before + 1


def test_one_model_run_eagerly_leaves_others_compiled():
    eager, compiled = make(run_eagerly=True), make()
    fit(compiled)
    before = dict(compiled.ran)
    fit(eager)
    fit(compiled)
    assert compiled.ran == before


def test_a_model_may_be_used_from_several_threads_at_once():
    model = make()
    expected = ops.convert_to_numpy(model(X))
    predicted = []
    together = threading.Barrier(4)

    def predict():
        together.wait()
        predicted.append(model.predict(X, verbose=0))

    threads = [threading.Thread(target=predict) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(predicted) == 4
    for each in predicted:
        np.testing.assert_allclose(each, expected, rtol=1e-5, atol=1e-6)
    assert keras.random.normal((2, 3)).shape == (2, 3)  # What a trace replaces in Keras is back in its place.


@pytest.mark.once
@pytest.mark.parametrize("name", ["train_step", "test_step"])
def test_a_step_in_the_manner_of_keras_on_jax_is_told_of_data(name):
    class Stateless(hl.Model):
        def train_step(self, state, data):
            return {}, state

        def test_step(self, state, data):
            return {}, state

    model = Stateless()
    run = {"train_step": model.fit, "test_step": model.evaluate}[name]
    with pytest.raises(hl.errors.StepError, match=rf"Stateless\.{name} takes state, data; a step takes one argument"):
        run(X, Y, verbose=0)


@pytest.mark.parametrize("kind", ["a default", "any number"])
def test_a_step_may_take_more_than_data_if_it_need_not(kind):
    class WithDefault(hl.Model):
        def train_step(self, data, scale=2.0):
            return {"mean": scale * ops.mean(data[1])}

    class WithAny(hl.Model):
        def train_step(self, *data, **options):
            return {"mean": 2.0 * ops.mean(data[0][1])}

    model = WithDefault() if kind == "a default" else WithAny()
    history = model.fit(X, Y, verbose=0).history
    np.testing.assert_allclose(history["mean"], [2 * Y.mean()], rtol=1e-5)


@pytest.mark.once
def test_jit_compile_is_checked_when_the_model_is_compiled():
    with pytest.raises(ValueError, match="jit_compile takes True, False or \"auto\"; received 'fast'"):
        make(jit_compile="fast")


@pytest.mark.backend("jax", "tensorflow")  # On PyTorch, True compiles C++ for many seconds: see test_function.py.
@pytest.mark.parametrize("jit_compile", [True, False])
def test_jit_compile_changes_no_number(jit_compile):
    usual = make()
    model = make(jit_compile=jit_compile)
    model.set_weights(usual.get_weights())
    np.testing.assert_allclose(fit(model), fit(usual), rtol=1e-5)
    np.testing.assert_allclose(model.get_weights()[0], usual.get_weights()[0], rtol=1e-5)
    np.testing.assert_allclose(model.predict(X, verbose=0), usual.predict(X, verbose=0), rtol=1e-5)
