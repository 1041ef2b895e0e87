"""`TerminateOnNaN` stops training when a reported value is not finite."""

import numpy as np
import pytest
from keras import ops

import handloom as hl
from handloom.callbacks import EarlyStopping, TerminateOnNaN
from handloom.errors import HandloomWarning
from tests.callbacks.scripted import INF, NAN, Scripted, at, run
from tests.models import fit


def steps_taken(values, *callbacks, epochs=1):
    """Trains with one example a step; returns the number of steps."""
    model = Scripted(values)
    fit(model, np.zeros((len(values) // epochs, 1), "float32"), batch_size=1, epochs=epochs, callbacks=callbacks)
    return float(model.count)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize(
    ("at", "every", "epoch", "stops"), [(2, 1, 1, 3), (2, 3, 1, 3), (3, 3, 1, 6), (0, 100, 1, 8), (9, 2, 2, 10)]
)
def test_terminate_on_nan_stops_at_its_next_check_and_warns_once(bad, at, every, epoch, stops):
    script = [1.0] * 16
    script[at] = bad
    words = f"stops in epoch {epoch} after step {stops}: loss is {bad}.*lower learning rate.*HL702"
    with pytest.warns(HandloomWarning, match=words) as warned:
        assert steps_taken(script, TerminateOnNaN(hl.every(steps=every)), epochs=2) == stops
    assert len(warned) == 1


def test_terminate_on_nan_warns_also_if_another_callback_stops_first():
    with pytest.warns(HandloomWarning, match="loss is nan"):
        run(Scripted([NAN, NAN, 1]), EarlyStopping("loss", baseline=-1.0), TerminateOnNaN())


def test_terminate_on_nan_gives_no_warning_for_finite_values():
    assert steps_taken([1.0] * 8, TerminateOnNaN(hl.every(steps=1)), epochs=2) == 8


def test_terminate_on_nan_takes_a_time_in_seconds():
    with pytest.warns(HandloomWarning):
        assert steps_taken([1.0, NAN, 1, 1], TerminateOnNaN(hl.every(seconds=1e-9))) == 2


def test_terminate_on_nan_checks_validation():
    model = Scripted([1, 2, 3])
    model.test_step = lambda data: {"off": ops.mean(data)}
    with pytest.warns(HandloomWarning, match="val_off is nan"):
        assert len(run(model, TerminateOnNaN(), validation_data=(np.full((4, 1), NAN, "float32"),))["loss"]) == 1


def test_terminate_on_nan_checks_arrays_and_ignores_words_and_integers():
    add = {"table": np.array([[1, 2], [3, 4]]), "word": "nan", "flag": True, "number": np.int64(3)}

    def epochs():
        report = at("on_epoch_end", lambda epoch, logs: logs.update(add))
        return len(run(Scripted([1, 2]), report, TerminateOnNaN())["loss"])

    assert epochs() == 2
    add["table"] = np.array([1.0, NAN, INF])
    with pytest.warns(HandloomWarning, match="table is an array with 2 of 3 not finite"):
        assert epochs() == 1


def test_terminate_on_nan_does_not_wait_for_the_device_between_its_checks(reads):
    steps_taken([1.0] * 8, TerminateOnNaN(hl.every(steps=4)), reads)
    assert reads.before_step == [False, False, False, False, True, False, False, False]


def test_terminate_on_nan_lets_the_model_be_trained_again():
    model = Scripted([NAN, 1, 1])
    with pytest.warns(HandloomWarning):
        run(model, TerminateOnNaN())
    assert run(model, TerminateOnNaN(), epochs=2)["loss"] == [1, 1]


def test_terminate_on_nan_takes_a_schedule():
    with pytest.raises(TypeError, match=r"every takes hl.every\(steps=100\), or None; received 5"):
        TerminateOnNaN(every=5)
