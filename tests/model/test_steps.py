"""The compiled steps of a model: they are kept until the model changes, and each change takes effect."""

import threading

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.errors import HandloomWarning, StepError
from tests.models import compiled, functional, sequential
from tests.models import fit as fit_model
from tests.numbers import close, numpy, same
from tests.threads import in_threads

X = np.linspace(-1, 1, 24, dtype="float32").reshape(8, 3)
Y = X[:, :1] + 1


class Counting(hl.Sequential):
    """Counts how often Python runs its steps; compiled steps run in Python only once."""

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


def counting(built=True, optimizer=None, **options):
    parts = layers.Dense(2, name="first"), layers.Dense(1, name="last")
    return compiled(sequential(*parts, cls=Counting) if built else Counting(parts), optimizer, **options)


both = pytest.mark.parametrize("built", [True, False], ids=["built", "built by the first fit"])


def fit(model, **options):
    return fit_model(model, X, Y, **options)["loss"][0]


def evaluate(model):
    return model.evaluate(X, Y, verbose=0)


def predict(model):
    return model.predict(X, verbose=0)


def after(**hooks):
    return [keras.callbacks.LambdaCallback(**hooks)]


# ----------------------------------------------------------- kept between runs


@both
def test_fit_evaluate_and_predict_compile_their_steps_once(built):
    model = counting(built)
    for run in (fit, evaluate, predict):
        run(model)
        before = dict(model.ran)
        run(model)
        assert model.ran == before
    model.train_on_batch(X, Y)
    model.test_on_batch(X, Y)
    model.predict_on_batch(X)
    assert model.ran == before


def test_evaluate_within_fit_keeps_the_steps():
    model = counting(built=False)
    fit(model, callbacks=after(on_epoch_end=lambda epoch, logs: evaluate(model)))
    before = dict(model.ran)
    fit(model)
    evaluate(model)
    assert model.ran == before


def test_a_new_learning_rate_or_new_weights_take_effect_without_compiling_again():
    model = counting()
    fit(model)
    predict(model)
    ran, before = dict(model.ran), model.get_weights()
    model.optimizer.learning_rate = 0.0
    fit(model)
    same(model.get_weights()[0], before[0])
    model.set_weights([np.zeros_like(weight) for weight in before])
    same(predict(model), np.zeros((8, 1)))
    assert model.ran == ran


# -------------------------------------------------- dropped when the model changes


def test_compile_drops_the_steps():
    model = counting()
    fit(model)
    ran = model.ran["train"]
    compiled(model, loss="mae")
    close(np.abs(predict(model) - Y).mean(), fit(model))
    assert model.ran["train"] > ran


@both
@pytest.mark.parametrize("train", [fit, lambda model: model.train_on_batch(X, Y)], ids=["fit", "train_on_batch"])
def test_fit_and_train_on_batch_train_a_layer_unless_it_is_frozen(train, built):
    model = counting(built)
    train(model)
    first = model.get_layer("first")
    for trainable in (False, True):
        first.trainable = trainable
        before = first.get_weights()
        train(model)
        same_bits = [np.array_equal(one, other) for one, other in zip(before, first.get_weights(), strict=True)]
        assert same_bits == [not trainable] * 2


@pytest.mark.parametrize("kind", ["variable", "layer"])
def test_fit_leaves_a_frozen_variable_or_the_statistics_of_a_frozen_layer_alone(kind):
    """The layer has no trainable weights, by which a change could be seen."""
    normalization, last = layers.BatchNormalization(center=False, scale=False), layers.Dense(1)
    model = compiled(functional(normalization, last))
    fit(model)
    part, variable = (last.kernel, last.kernel) if kind == "variable" else (normalization, normalization.moving_mean)
    part.trainable = False
    before = numpy(variable)
    fit(model)
    same(variable, before)


def test_fit_leaves_a_layer_alone_that_was_frozen_during_the_fit_before():
    model = counting(built=False)
    fit(model, callbacks=after(on_epoch_end=lambda epoch, logs: setattr(model.layers[0], "trainable", False)))
    before = model.layers[0].get_weights()[0]
    fit(model)
    same(model.layers[0].get_weights()[0], before)


def test_predict_and_evaluate_notice_another_layer():
    model = counting()
    predict(model)
    evaluate(model)
    model.pop()
    model.add(layers.Dense(1, kernel_initializer="zeros", bias_initializer="ones"))
    same(predict(model), np.ones((8, 1)))
    same(model.predict_on_batch(X), np.ones((8, 1)))
    close(evaluate(model), np.mean((Y - 1) ** 2))


def test_fit_uses_an_optimizer_that_replaces_the_compiled_one():
    model = counting(optimizer=keras.optimizers.SGD(0.0))
    fit(model)
    before = model.get_weights()[0]
    model.optimizer = keras.optimizers.SGD(0.1)
    fit(model)
    assert not np.array_equal(model.get_weights()[0], before)


# --------------------------------------------------------- eager and compiled


def test_steps_per_execution_of_a_model_is_the_number_of_keras_and_may_be_set_later():
    model = counting()
    assert model.steps_per_execution == 1
    assert model.get_compile_config()["steps_per_execution"] == "auto"  # Another choice may be right elsewhere.
    begun, count = [], keras.callbacks.Callback()
    count.takes_executions = True
    count.on_train_batch_begin = lambda batch, logs: begun.append(batch)
    model.steps_per_execution = 2
    assert model.get_compile_config()["steps_per_execution"] == 2
    fit(model, batch_size=2, callbacks=[count])
    assert begun == [0, 2]


@pytest.mark.parametrize("name", ["train", "test", "predict"])
def test_fit_evaluate_and_predict_warn_of_a_function_of_keras_that_is_not_called(name):
    def make(self, force=False):
        raise AssertionError

    model = compiled(type("Own", (Counting,), {f"make_{name}_function": make})([layers.Dense(1)]))
    with pytest.warns(HandloomWarning, match=rf"Own\.make_{name}_function is not called\..*{name}_step\(self, data\)"):
        {"train": fit, "test": evaluate, "predict": predict}[name](model)


def test_compile_with_run_eagerly_runs_python_on_every_batch():
    model = counting(run_eagerly=True)
    fit(model, batch_size=4, epochs=3)
    model.evaluate(X, Y, batch_size=4, verbose=0)
    model.predict(X, batch_size=4, verbose=0)
    assert model.ran == {"train": 6, "test": 2, "predict": 2}


def test_run_eagerly_of_a_model_can_be_switched_and_concerns_no_other_model():
    model, other = counting(), counting()
    fit(model)
    fit(other)
    ran = model.ran["train"], other.ran["train"]
    model.run_eagerly = True
    fit(model)
    fit(other)
    assert (model.ran["train"], other.ran["train"]) == (ran[0] + 1, ran[1])
    model.run_eagerly = False
    fit(model)
    assert model.ran["train"] == ran[0] + 1


def test_predict_may_be_called_by_several_threads_at_once():
    model, together = counting(), threading.Barrier(4)

    def predict_together():
        together.wait()
        return predict(model)

    for predicted in in_threads([predict_together] * 4):
        close(predicted, model(X))
    assert keras.random.normal((2, 3)).shape == (2, 3)  # Keras is as it was before the traces.


@pytest.mark.once
def test_compile_checks_jit_compile():
    with pytest.raises(ValueError, match="jit_compile takes True, False or \"auto\"; received 'fast'"):
        counting(jit_compile="fast")


# -------------------------------------------------------------------- arguments


@pytest.mark.backend("tensorflow", "torch")
@pytest.mark.parametrize("name", ["train_step", "test_step", "predict_step"])
def test_a_step_with_the_signature_of_keras_on_jax_is_refused_elsewhere(name):
    step = {name: lambda self, state, data: ({}, state)}
    step[name].__name__ = name
    model = type("Stateless", (hl.Model,), step)()
    run = {"train_step": model.fit, "test_step": model.evaluate, "predict_step": model.predict}[name]
    with pytest.raises(
        StepError, match=rf"Stateless\.{name}\(state, data\) cannot .* {name}\(self, data\).*KERAS_BACKEND=jax.*HL254"
    ):
        run(X, verbose=0)


def test_a_step_without_an_argument_is_refused():
    model = type("Empty", (hl.Model,), {"train_step": lambda self: {}})()
    with pytest.raises(StepError, match=r"A step takes one argument, the batch.*HL254"):
        model.fit(X, Y, verbose=0)


def with_default(self, data, scale=2.0):
    return {"mean": scale * ops.mean(data[1])}


def of_any_number(self, *data, **options):
    return {"mean": 2.0 * ops.mean(data[0][1])}


@pytest.mark.parametrize("step", [with_default, of_any_number])
def test_train_step_may_take_optional_arguments(step):
    model = type("Optional", (hl.Model,), {"train_step": step})()
    close(fit_model(model, X, Y)["mean"], [2 * Y.mean()])


# ----------------------------------------------------------------------------- nothing to train


def rescaling(cls):
    return cls([keras.Input((3,)), layers.Rescaling(2.0)])


def unbuilt(cls):
    return cls([layers.Rescaling(2.0)])


def frozen(cls):
    model = cls([keras.Input((3,)), layers.Dense(3, kernel_initializer="ones", kernel_regularizer="l2")])
    model.trainable = False
    return model


@pytest.mark.filterwarnings("ignore:The model does not have any trainable weights")  # Keras's own.
@pytest.mark.parametrize("make", [rescaling, unbuilt, frozen])
def test_fit_of_a_model_without_trainable_weights_reports_as_keras_and_warns_once(make, eagerly):
    histories = []
    with hl.checks.collect() as findings:
        for cls in (hl.Sequential, keras.Sequential):
            model = compiled(make(cls), "adam", metrics=["mae"])
            validation = {"validation_data": (X, X), "batch_size": 3}
            histories.append(fit_model(model, X, X, epochs=2, **validation))
    assert [finding.code for finding in findings] == ["HL255"]
    assert histories[0].keys() == histories[1].keys()
    for name, values in histories[1].items():
        close(histories[0][name], values)


def test_fit_trains_a_model_that_is_unfrozen_later():
    model = compiled(frozen(hl.Sequential))
    with pytest.warns(HandloomWarning, match="HL255"):
        [before] = fit_model(model, X, X)["loss"]
    model.trainable = True
    assert fit_model(model, X, X, epochs=2)["loss"][1] < before
