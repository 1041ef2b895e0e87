"""Runs within runs: what a callback evaluates or trains does not change what the epoch around it reports."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from tests.models import compiled, fit, functional, subclassed
from tests.numbers import close, normal

X, Y = normal(12, 3), (normal(12, 1, seed=1) > 0).astype("float32")
HOOKS = ["on_train_begin", "on_epoch_begin", "on_train_batch_begin", "on_train_batch_end", "on_epoch_end"]


def classifier(make=functional, seed=0, **options):
    keras.utils.set_random_seed(seed)
    model = make(layers.Dense(1, activation="sigmoid"), **options)
    return compiled(model, loss="binary_crossentropy", metrics=["accuracy"])


def at(hook, function):
    return keras.callbacks.LambdaCallback(**{hook: lambda *_: function()})


def history(model, *callbacks, **options):
    return fit(model, X, Y, **({"batch_size": 4, "epochs": 2, "callbacks": callbacks} | options))


def evaluates(model):
    return lambda: model.evaluate(X[:2], Y[:2], verbose=0)


@pytest.mark.parametrize("hook", HOOKS)
def test_evaluate_in_a_hook_of_fit_leaves_its_reports_as_they_are(hook, eagerly):
    model = classifier()
    nested = history(model, at(hook, evaluates(model)), validation_data=(X, Y))
    assert nested == history(classifier(), validation_data=(X, Y))


def test_evaluate_before_the_first_step_of_fit_may_build_the_model_and_its_metrics():
    model = classifier(subclassed, inputs=None)
    nested = history(model, at("on_epoch_begin", evaluates(model)))
    keras.utils.set_random_seed(0)
    assert nested == history(classifier(subclassed, inputs=None))


@pytest.mark.parametrize("name", ["test_on_batch", "predict"])
def test_other_runs_in_a_hook_of_fit_leave_its_reports_as_they_are(name):
    model = classifier()
    run = (lambda: model.predict(X, verbose=0)) if name == "predict" else (lambda: model.test_on_batch(X, Y))
    assert history(model, at("on_train_batch_end", run)) == history(classifier())


@pytest.mark.parametrize("train", ["train_on_batch", "fit"])
def test_training_in_a_hook_of_fit_does_not_enter_its_reports(train):
    """The same step runs inside its own epoch, on data whose loss is none of the epoch's."""

    class Means(hl.Model):
        def train_step(self, data):
            return {"mean": ops.mean(data)}

    model, data, pending = Means(), np.arange(12, dtype="float32"), [None]

    def inner():
        if not pending:
            return
        pending.pop()
        if train == "fit":
            fit(model, 100 + data, batch_size=3)
        else:
            model.train_on_batch(100 + data)

    assert fit(model, data, batch_size=4, callbacks=[at("on_train_batch_end", inner)]) == {"mean": [5.5]}


def test_evaluate_in_a_hook_of_evaluate_leaves_its_results_as_they_are():
    model, pending = classifier(), [None]

    def inner():
        if pending:
            pending.pop()
            evaluates(model)()

    expected = model.evaluate(X, Y, batch_size=4, verbose=0)
    close(model.evaluate(X, Y, batch_size=4, verbose=0, callbacks=[at("on_test_batch_end", inner)]), expected)


@pytest.mark.parametrize("where", ["validate", "hook"])
def test_evaluate_within_an_epoch_of_hl_fit_leaves_its_reports_as_they_are(where):
    """The step updates the compiled metrics that `evaluate` resets."""

    def run(**options):
        model = classifier()

        def step(x, y):
            y_pred = model(x, training=True)
            loss = model.minimize(lambda: model.compute_loss(x, y, model(x, training=True)))
            return model.compute_metrics(x, y, y_pred) | {"loss": loss}

        chosen = {name: make(evaluates(model)) for name, make in options.items()}
        extra = {"validate_every": hl.every(steps=1)} if "validate" in options else {}
        feed = hl.Feed((X, Y), batch_size=4)
        reported = hl.fit(step, feed, epochs=2, state={"model": model}, verbose=0, **chosen, **extra).history
        return {name: values for name, values in reported.items() if not name.startswith("val_")}

    looks = {
        "validate": lambda look: lambda: {"loss": look()[0]},
        "hook": lambda look: [at("on_train_batch_end", look)],
    }
    option = "validate" if where == "validate" else "callbacks"
    assert run(**{option: looks[where]}) == run()
