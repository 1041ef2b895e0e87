"""`EarlyStopping` stops when a value no longer improves, and restores the best weights."""

import keras
import pytest
from keras import ops

import handloom as hl
from handloom.callbacks import EarlyStopping
from handloom.errors import HandloomWarning, StepError
from tests.callbacks.scripted import INF, NAN, Scripted, X, at, mean_step, run
from tests.models import compiled, fit, functional, sequential
from tests.numbers import each_same, numpy


@pytest.mark.parametrize(
    ("script", "options", "epochs", "best"),
    [
        ([5, 4, 2, 3, 3, 1], {"patience": 2}, 5, 3),
        ([5, 4, 3, 2, 1], {"patience": 1}, 5, 5),
        ([5, 6, 4, 7], {}, 2, 1),
        ([1, 2, 3, 3, 4], {"patience": 1, "mode": "max"}, 4, 3),
        ([5, 4.5, 4, 3, 2.9, 2.8], {"patience": 1, "min_delta": 0.6}, 2, 1),
        ([5, 4.5, 4, 3, 2.9, 2.8], {"patience": 2, "min_delta": 0.6}, 6, 4),
        ([5, 4, 3, 2, 1], {"patience": 2, "baseline": 0.5}, 2, 2),
        ([5, 4, 3, 9, 9, 9], {"patience": 2, "baseline": 4.5}, 5, 3),
        ([1, 9, 8, 7, 8, 9], {"patience": 1, "start_from_epoch": 2}, 5, 4),
        # NaN is worse than any number.
        ([NAN, 3, 2, 4, 1], {"patience": 1}, 4, 3),
        ([3, NAN, NAN, 1], {"patience": 1}, 2, 1),
        ([INF, 3, 4, 1], {"patience": 1}, 3, 2),
        ([NAN, NAN, 1], {"patience": 1}, 2, 1),
        ([NAN, 1, 2, NAN, 3], {"patience": 1, "mode": "max"}, 4, 3),
    ],
)
def test_early_stopping_stops_in_the_right_epoch_and_restores_the_best(script, options, epochs, best):
    model = Scripted(script)
    losses = run(model, EarlyStopping("loss", restore_best_weights=True, **options))["loss"]
    assert losses == pytest.approx(script[:epochs], nan_ok=True)
    assert float(model.count) == best


def test_early_stopping_without_restoring_keeps_the_last_weights():
    model = Scripted([5, 4, 6, 7])
    run(model, EarlyStopping("loss", patience=1))
    assert float(model.count) == 3


class Reports(keras.callbacks.Callback):
    """Reports given values as `watched`, and keeps the weights of each epoch."""

    def __init__(self, values):
        super().__init__()
        self.values, self.weights = values, []

    def on_epoch_end(self, epoch, logs=None):
        logs["watched"] = self.values[epoch]
        self.weights.append(self.model.get_weights())


@pytest.mark.parametrize(("name", "values", "stops"), [("g_loss", [2, 3, 1], 2), ("accuracy", [0.5, 0.7, 0.6, 1], 3)])
def test_early_stopping_infers_the_direction_of_losses_and_metrics(name, values, stops):
    model = Scripted(values, name=name)
    model.accuracy = keras.metrics.BinaryAccuracy(name="accuracy")
    assert len(run(model, EarlyStopping(name))[name]) == stops


def test_early_stopping_infers_the_direction_of_a_compiled_metric():
    model = compiled(functional(inputs=1), metrics=["binary_accuracy"])
    stopping = EarlyStopping("val_binary_accuracy", patience=1)
    history = fit(model, X, X, validation_data=(X, X), epochs=5, callbacks=[stopping])
    assert len(history["loss"]) == 2  # It begins at its best: 1.


def test_early_stopping_requires_a_mode_for_an_unknown_name():
    with pytest.raises(ValueError, match=r"EarlyStopping cannot tell .* 'strangeness' is better.*mode=\"max\".*HL705"):
        run(Scripted([1, 2], name="strangeness"), EarlyStopping("strangeness"))


def test_early_stopping_does_not_count_epochs_without_validation():
    validations = iter([5.0, 4.0, 6.0, 7.0])
    stopping = EarlyStopping(patience=2)
    options = {"validate": lambda: {"loss": next(validations)}, "validate_every": hl.every(epochs=2), "verbose": 0}
    history = hl.fit(mean_step, X, epochs=12, callbacks=[stopping], **options)
    assert len(history.epoch) == 8
    assert stopping.wait == 2


@pytest.mark.parametrize(
    ("monitor", "words"),
    [
        ("lost_loss", r"'lost_loss', which was reported in this epoch.*Choose .* monitor=: 'loss'\. \[HL758"),
        ("val_loss", "'val_loss', which was reported in no epoch"),  # It might have come until then.
    ],
)
def test_early_stopping_warns_once_of_a_value_that_is_not_reported(monitor, words):
    with pytest.warns(HandloomWarning, match=f"EarlyStopping watches {words}") as warned:
        run(Scripted([1, 2, 3]), EarlyStopping(monitor))
    assert len(warned) == 1


# ------------------------------------------------------------------------ hl.fit


def test_early_stopping_restores_several_models_in_hl_fit(eagerly):
    state = {name: sequential(inputs=1, cls=keras.Sequential) for name in ("generator", "discriminator")}
    optimizers = {name: keras.optimizers.SGD(0.1) for name in state}

    def step(x):
        return {
            name: hl.minimize(lambda part=part: ops.mean((part(x) - 1) ** 2), part, optimizers[name])
            for name, part in state.items()
        }

    reports = Reports([2.0, 1.0, 3.0])
    stopping = EarlyStopping("watched", mode="min", restore_best_weights=True)
    hl.fit(step, X + 1, epochs=5, state=state, callbacks=[reports, stopping], verbose=0)
    assert len(reports.weights) == 3
    now = [*state["discriminator"].get_weights(), *state["generator"].get_weights()]
    each_same(now, reports.weights[1])
    assert (now[0] != reports.weights[2][0]).any()
    hl.fit(step, X, verbose=0)  # They can still be trained.


def test_early_stopping_names_the_state_that_it_needs_to_restore():
    stopping = EarlyStopping("mean", mode="min", restore_best_weights=True)
    with pytest.raises(StepError, match=r'state=\{"model": model\}'):
        hl.fit(mean_step, X, callbacks=[stopping], verbose=0)


def test_early_stopping_without_restoring_needs_no_model():
    script = iter([3.0, 4.0, 2.0])
    report = at("on_epoch_end", lambda epoch, logs: logs.update(watched=next(script)))
    stopping = EarlyStopping("watched", mode="min")
    assert hl.fit(mean_step, X, epochs=3, callbacks=[report, stopping], verbose=0).history["watched"] == [3, 4]


# ------------------------------------------------------------------------- state


def test_early_stopping_that_had_stopped_stays_stopped():
    first, second = (EarlyStopping("loss", restore_best_weights=True) for _ in range(2))
    model = Scripted([2, 3, 9, 9])
    run(model, first)
    restore = at("on_train_begin", lambda logs: second.restore(first.state()))
    model.count.assign(7)
    assert run(model, second, restore, epochs=4, initial_epoch=2) == {}
    assert numpy(model.count) == 1
