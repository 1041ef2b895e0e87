"""Where a run ends early: a generator is used up, or `keras.config` limits epochs and steps."""

import keras
import numpy as np
import pytest

import handloom as hl
from tests.models import compiled, fit, sequential
from tests.numbers import close, normal, same

X = normal(8, 3)
Y = X[:, :1]


def model():
    return compiled(sequential(keras.layers.Dense(1, kernel_initializer="ones")))


def batches(count):
    return ((X, Y) for _ in range(count))


def codes(findings):
    return [finding.code for finding in findings]


# ----------------------------------------------------------------------------- a generator that is used up


@pytest.mark.parametrize(
    ("count", "steps", "epochs", "found"),
    [
        (3, None, 1, ["HL759"]),
        (6, 2, 3, ["HL759"]),
        (5, 2, 3, ["HL751", "HL759"]),
    ],
    ids=["one pass", "whole epochs", "part of an epoch"],
)
@pytest.mark.parametrize("together", [1, 2])
def test_fit_ends_with_a_warning_where_a_generator_is_used_up(count, steps, epochs, found, together):
    trained, other = model(), model()
    with hl.checks.collect() as findings:
        losses = fit(trained, batches(count), epochs=9, steps_per_epoch=steps, steps_per_execution=together)["loss"]
    assert (codes(findings), len(losses), int(trained.optimizer.iterations)) == (found, epochs, count)
    fit(other, X, Y, epochs=count)
    close(trained.get_weights()[0], other.get_weights()[0])


@pytest.mark.parametrize("given", [{"epochs": 1}, {"epochs": 2, "steps_per_epoch": 2}])
def test_fit_does_not_warn_or_read_on_when_a_generator_has_lasted(given):
    left = batches(4)
    with hl.checks.collect() as findings:
        fit(model(), left, **given)
    assert not findings
    assert not list(left)


def test_hl_fit_ends_with_a_warning_where_a_feed_over_a_generator_is_used_up():
    feed = hl.Feed(np.full(2, value, "float32") for value in (1, 3))
    with hl.checks.collect() as findings:
        history = hl.fit(lambda x: {"mean": keras.ops.mean(x)}, feed, epochs=3, verbose=0)
    assert (codes(findings), history.history) == (["HL759"], {"mean": [2.0]})


@pytest.mark.parametrize(("count", "steps", "validations"), [(2, None, 1), (2, 1, 2), (2, 2, 1), (4, 2, 2)])
def test_fit_continues_without_validation_where_its_generator_is_used_up(count, steps, validations):
    options = {"validation_data": batches(count), "validation_steps": steps, "epochs": 4}
    trained = model()
    with hl.checks.collect() as findings:
        history = fit(trained, X, Y, **options)
    # The training losses are those of a run that validates on arrays, in as many epochs as there is data.
    expected = fit(model(), X, Y, validation_data=(X, Y), epochs=4)
    close(history["loss"], expected["loss"])
    close(history["val_loss"], expected["val_loss"][:validations])
    assert codes(findings) == ["HL762"]
    assert "validation data (the generator)" in str(findings[0])


def test_hl_fit_continues_without_validation_where_its_generator_is_used_up():
    def mean(x):
        return {"mean": keras.ops.mean(x)}

    with hl.checks.collect() as findings:
        history = hl.fit(mean, np.ones(2, "float32"), validate=(mean, iter([np.full(2, 3.0, "float32")])), epochs=3)
    assert (codes(findings), history.history) == (["HL762"], {"mean": [1.0] * 3, "val_mean": [3.0]})


@pytest.mark.parametrize(("count", "steps", "epochs"), [(3, None, 1), (4, 2, 2), (3, 2, 2)])
def test_fit_resumed_with_a_new_generator_stays_ended_unless_more_epochs_are_asked_for(count, steps, epochs, tmp_path):
    def run(count, epochs):
        trained = model()
        with hl.checks.collect():
            history = trained.fit(batches(count), epochs=epochs, steps_per_epoch=steps, run_dir=tmp_path, verbose=0)
        return trained, len(history.history["loss"])

    first, ended = run(count, 5)
    again, still = run(count, 5)
    assert (ended, still) == (epochs, epochs)
    same(again.get_weights()[0], first.get_weights()[0])
    more, later = run(2 * count, 7)
    assert later > epochs
    assert int(more.optimizer.iterations) > count


# ----------------------------------------------------------------------------- limits of keras.config


@pytest.fixture
def limits():
    yield keras.config.set_max_epochs, keras.config.set_max_steps_per_epoch
    keras.config.set_max_epochs(None)
    keras.config.set_max_steps_per_epoch(None)


def test_fit_heeds_set_max_epochs_and_set_max_steps_per_epoch_as_keras_does(limits):
    for limit, most in zip(limits, (2, 3), strict=True):
        limit(most)
    ours, theirs = model(), compiled(sequential(keras.layers.Dense(1, kernel_initializer="ones"), cls=keras.Sequential))
    options = {"epochs": 5, "batch_size": 1, "validation_data": (X, Y), "validation_batch_size": 2}
    with hl.checks.collect() as findings:
        found = fit(ours, X, Y, **options)
    assert set(codes(findings)) == {"HL760", "HL761"}
    with pytest.warns(UserWarning, match="Limiting"):
        expected = fit(theirs, X, Y, **options)
    assert int(ours.optimizer.iterations) == 6
    close(found["val_loss"], expected["val_loss"])
    close(ours.get_weights()[0], theirs.get_weights()[0])


def test_hl_fit_heeds_set_max_epochs_and_set_max_steps_per_epoch(limits):
    for limit, most in zip(limits, (2, 3), strict=True):
        limit(most)
    feed = hl.Feed(np.arange(8, dtype="float32"), batch_size=1)
    with hl.checks.collect() as findings:
        history = hl.fit(lambda x: {"sum": keras.ops.sum(x)}, feed, epochs=5, verbose=0)
    assert (codes(findings), history.history) == (["HL760", "HL761"], {"sum": [1.0, 4.0]})


def test_evaluate_and_predict_heed_set_max_steps_per_epoch(limits):
    limits[1](3)
    trained = model()
    with hl.checks.collect() as findings:
        loss = trained.evaluate(X, Y, batch_size=2, verbose=0)
        assert trained.predict(X, batch_size=2, verbose=0).shape == (6, 1)
    assert codes(findings) == ["HL761", "HL761"]
    close(loss, np.mean((X[:6].sum(axis=1, keepdims=True) - Y[:6]) ** 2))


def test_fit_and_evaluate_within_the_limits_of_keras_config_do_not_warn(limits):
    for limit in limits:
        limit(4)
    with hl.checks.collect() as findings:
        fit(model(), X, Y, epochs=4, batch_size=2)
        model().evaluate(X, Y, batch_size=4, verbose=0)
    assert not findings
