"""Notices of functions that are still traced or compiled, and traces that are too long."""

import threading
import time

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom._trace import slow
from handloom.backends import backend
from handloom.errors import FallbackWarning
from tests.models import functional
from tests.numbers import close, ones


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(slow, "FIRST", 0.05)


def noticed(caplog):
    return [record.args[0].finding for record in caplog.records if record.name == "handloom"]


def wait(until):
    """Waits half a minute, or until something has happened."""
    for _ in range(600):
        if until():
            break
        time.sleep(0.05)


class Slow(layers.Layer):
    """Waits in its call."""

    def __init__(self, until, **kwargs):
        super().__init__(**kwargs)
        self.until = until

    def call(self, x):
        wait(self.until)
        return 2 * x


def test_function_tells_that_tracing_takes_long_and_names_the_layer_and_the_line(caplog):
    def found():
        return [one for one in noticed(caplog) if "the layer 'slowest' (Slow)" in one.saw]

    layer = Slow(found, name="slowest")
    double = hl.function(lambda x: 1 * layer(x))
    close(double(ones(2)), [2, 2])
    assert (found()[0].code, found()[0].filename) == ("HL150", __file__)
    assert "time.sleep(0.05)" in found()[0].saw
    count = len(noticed(caplog))
    double(ones(2))  # It is compiled now: nothing watches.
    assert len(noticed(caplog)) == count
    assert not any("run" in thread.name for thread in threading.enumerate())


def test_function_tells_that_compiling_takes_long(caplog, monkeypatch):
    original = backend.trace

    def found():
        return [one for one in noticed(caplog) if one.code == "HL151"]

    def trace(*args, **kwargs):
        program = original(*args, **kwargs)
        wait(found)
        return program

    monkeypatch.setattr(backend, "trace", trace)
    hl.function(ops.square)(ones(2))
    assert f"{backend.title} has been compiling square" in found()[0].saw


def test_notice_of_a_slow_trace_is_silenced_and_no_error_if_strict(caplog):
    with hl.checks.strict():
        hl.function(Slow(lambda: noticed(caplog)))(ones(2))
    assert noticed(caplog)
    caplog.clear()
    with hl.checks.silence("HL150"), hl.checks.silence("HL151"):
        ends = time.monotonic() + 0.3
        hl.function(Slow(lambda: time.monotonic() > ends))(ones(2))
    assert noticed(caplog) == []


@pytest.mark.backend("tensorflow")
def test_function_watches_the_first_run_where_xla_compiles_in_it():
    function = hl.function(ops.square, jit_compile=True)
    version, tensors = function.resolve((ones(2),))
    watched = version.run
    close(version.run(tensors)[0], [1, 1])
    assert watched != version.run == version._program.__call__


@pytest.mark.backend("torch")
def test_fit_falls_back_with_the_name_of_the_layer_whose_trace_is_too_long(monkeypatch):
    class Loop(layers.Layer):
        def call(self, x):
            for _ in range(700):
                x = x + 1
            return x - 700

    monkeypatch.setattr("handloom.backends.torch.program._MOST_CALLS", 500)
    monkeypatch.setattr("handloom.backends.torch.program._SAMPLED", 50)
    model = functional(layers.Dense(1, kernel_initializer="ones"), Loop(name="counts"))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    with pytest.warns(FallbackWarning, match=r"the layer 'counts' \(Loop\) has more than 500 operations"):
        model.fit(ones(4, 3), np.zeros((4, 1), "float32"), verbose=0)
    close(model.layers[1].kernel, 0.4 * ones(3, 1), rtol=1e-3)  # 1 - 0.1 * 2 * 3


@pytest.mark.backend("torch")
def test_fit_compiles_a_layer_although_torch_calls_itself_often_in_its_trace(monkeypatch):
    monkeypatch.setattr("handloom.backends.torch.program._MOST_CALLS", 30)
    monkeypatch.setattr("handloom.backends.torch.program._SAMPLED", 1)
    model = functional(layers.Dense(1))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(ones(4, 3), ones(4, 1), verbose=0)  # A warning would be an error.
