"""Stops when what is reported is no number any more."""

import keras
import numpy as np
import pytest
from keras import ops

import handloom as hl
from handloom.callbacks import TerminateOnNaN
from handloom.errors import HandloomWarning
from tests.callbacks.scripted import Scripted, run

NAN, INF = np.nan, np.inf


def steps_taken(values, *callbacks, epochs=1, **options):
    """Runs one example a step; how many steps were taken."""
    model = Scripted(values)
    x = np.zeros((len(values) // epochs, 1), "float32")
    model.fit(x, batch_size=1, epochs=epochs, callbacks=callbacks, verbose=0, **options)
    return float(model.count)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize(("at", "every", "stops"), [(2, 1, 3), (2, 3, 3), (3, 3, 6), (0, 100, 8)])
def test_terminate_on_nan_stops_at_its_next_look(bad, at, every, stops):
    script = [1.0] * 16
    script[at] = bad
    with pytest.warns(HandloomWarning, match=f"epoch 1 after step {stops}: loss is {bad}.*lower learning rate"):
        assert steps_taken(script, TerminateOnNaN(hl.every(steps=every)), epochs=2) == stops


def test_it_warns_once_and_names_epoch_and_step():
    script = [1.0, 1, 1, 1, 1, NAN, 1, 1]
    with pytest.warns(HandloomWarning, match="stops in epoch 2 after step 6: loss is nan") as warned:
        assert steps_taken(script, TerminateOnNaN(hl.every(steps=2)), epochs=2) == 6
    assert len(warned) == 1


def test_it_says_so_also_where_another_callback_stops_first():
    with pytest.warns(HandloomWarning, match="loss is nan"):
        run(Scripted([NAN, NAN, 1]), hl.callbacks.EarlyStopping("loss", baseline=-1.0), TerminateOnNaN())


def test_while_all_is_well_it_says_nothing():
    assert steps_taken([1.0] * 8, TerminateOnNaN(hl.every(steps=1)), epochs=2) == 8


def test_a_time_in_seconds_will_do():
    with pytest.warns(HandloomWarning):
        assert steps_taken([1.0, NAN, 1, 1], TerminateOnNaN(hl.every(seconds=1e-9))) == 2


def test_validation_counts():
    model = Scripted([1, 2, 3])
    validate = {"validation_data": (np.full((4, 1), NAN, "float32"),)}
    model.test_step = lambda data: {"off": ops.mean(data)}
    with pytest.warns(HandloomWarning, match="val_off is nan"):
        assert len(run(model, TerminateOnNaN(), **validate)["loss"]) == 1


def test_arrays_and_whole_numbers_and_words_are_looked_at_rightly():
    def step(x):
        return {"count": ops.cast(3, "int32"), "loss": ops.mean(x)}

    add = {"table": np.array([[1, 2], [3, 4]]), "word": "nan", "flag": True, "number": np.int64(3)}
    x = np.zeros((2, 1), "float32")
    listen = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(add))
    assert len(hl.fit(step, x, epochs=2, callbacks=[listen, TerminateOnNaN()], verbose=0).epoch) == 2
    add["table"] = np.array([1.0, NAN, INF])
    with pytest.warns(HandloomWarning, match="table is an array with 2 of 3 not finite"):
        assert len(hl.fit(step, x, epochs=2, callbacks=[listen, TerminateOnNaN()], verbose=0).epoch) == 1


def test_between_its_looks_it_does_not_wait_for_the_device(reads):
    steps_taken([1.0] * 8, TerminateOnNaN(hl.every(steps=4)), reads)
    assert reads.before_step == [False, False, False, False, True, False, False, False]


def test_weights_stay_as_they_were_and_train_on():
    model = Scripted([NAN, 1, 1])
    with pytest.warns(HandloomWarning):
        run(model, TerminateOnNaN())
    assert run(model, TerminateOnNaN(), epochs=2)["loss"] == [1, 1]


def test_when_must_be_a_time():
    with pytest.raises(TypeError, match=r"every takes hl.every\(steps=100\), or None; received 5"):
        TerminateOnNaN(every=5)
