"""The events that observers receive, and that Keras is the same afterwards."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from handloom._trace.observe import (
    Observer,
    OwnVariable,
    VariableUse,
    assignments_undone,
    building,
    innermost,
    observing,
)
from tests.models import built
from tests.numbers import close, ones, same
from tests.threads import alternating, in_a_thread

X = np.array([[1.0, 2.0], [3.0, 4.0]], "float32")
EVENTS = (
    *("created", "read", "assigned", "metric_updated", "metric_result"),
    *("loss_called", "loss_added", "penalty_read", "layer_called", "applied"),
)


def recording(event):
    def record(self, subject, *others):
        self.events.append((event, subject, *others))
        return others[0] if event in ("metric_result", "penalty_read") else None

    return record


class Recorder(type("AllEvents", (Observer,), {event: recording(event) for event in EVENTS})):
    """Records all events."""

    def __init__(self):
        self.events = []

    def about(self, event):
        """The objects of an event, each once."""
        return list({id(each[1]): each[1] for each in self.events if each[0] == event}.values())


def everything():
    """Causes every event; returns the objects of the events."""
    layer = built(layers.Dense(1, kernel_regularizer="l2", activity_regularizer="l2"), 2)
    metric, optimizer, loss = keras.metrics.Mean(), keras.optimizers.SGD(0.1), keras.losses.MeanSquaredError()
    optimizer.build([layer.kernel])
    outputs = layer(X)
    metric.update_state(loss(ones(2, 1), outputs))
    metric.result()
    _ = layer.losses
    optimizer.apply([ops.ones((2, 1))], [layer.kernel])
    layer.bias.assign(ones(1))
    return layer, metric, optimizer, loss


def patched():
    """The attributes of the classes of Keras that are replaced."""
    places = [(keras.Variable, "__init__ value assign"), (keras.Metric, "__getattribute__"), (keras.Loss, "__call__")]
    places += [(keras.Layer, "add_loss losses __call__"), (keras.optimizers.Optimizer, "apply")]
    return [vars(owner).get(name) for owner, names in places for name in names.split()]


def unchanged(before):
    return all(now is then for now, then in zip(patched(), before, strict=True))


def test_observing_reports_each_event_with_its_object():
    recorder = Recorder()
    with observing(recorder):
        layer, metric, optimizer, loss = everything()
    kernel = layer.kernel
    assert {id(kernel), id(metric.total)} <= set(map(id, recorder.about("created")))
    assert id(kernel) in map(id, recorder.about("read"))
    assert id(layer.bias) in map(id, recorder.about("assigned"))
    assert recorder.about("metric_updated") == recorder.about("metric_result") == [metric]
    assert recorder.about("loss_called") == [loss]
    assert recorder.about("loss_added") == recorder.about("layer_called") == [layer]
    [added] = [each[2] for each in recorder.events if each[0] == "loss_added"]
    assert list(map(id, recorder.about("penalty_read"))) == [id(added), id(kernel)]
    [(_, applied, variables)] = [each for each in recorder.events if each[0] == "applied"]
    assert applied is optimizer
    assert [id(variable) for variable in variables] == [id(kernel)]


def test_observing_leaves_keras_the_same_after_an_error_and_after_nesting():
    before = patched()
    with pytest.raises(KeyboardInterrupt), observing(Recorder()):
        raise KeyboardInterrupt
    assert unchanged(before)
    with observing(Recorder()):
        with pytest.raises(KeyError), observing(Recorder()):
            raise KeyError
        assert not unchanged(before)
    assert unchanged(before)


def test_observing_reports_an_inner_block_to_outer_and_inner_observers():
    outer, inner = Recorder(), Recorder()
    with observing(outer):
        first = keras.Variable(1.0)
        with observing(inner):
            second = keras.Variable(2.0)
        third = keras.Variable(3.0)
    assert list(map(id, outer.about("created"))) == [id(first), id(second), id(third)]
    assert list(map(id, inner.about("created"))) == [id(second)]


def test_observing_in_two_overlapping_threads_reports_to_each_its_own_and_leaves_keras_the_same():
    before, recorders = patched(), [Recorder(), Recorder()]
    made = [[], []]

    def work(index):
        with observing(recorders[index]):
            made[index].append(keras.Variable(1.0))
            yield
            made[index].append(keras.Variable(2.0))
            yield
            made[index].append(keras.Variable(3.0))
        keras.Variable(4.0)
        yield

    def late():
        yield
        yield from work(1)

    alternating(lambda: work(0), late)
    for recorder, variables in zip(recorders, made, strict=True):
        assert list(map(id, recorder.about("created"))) == list(map(id, variables))
    assert unchanged(before)


def test_observing_reports_neither_other_threads_nor_except_on_request_the_building_of_layers():
    recorder, use = Recorder(), VariableUse()
    with observing(recorder):
        in_a_thread(everything)
    with observing(recorder, use), building():
        variable = keras.Variable(1.0)
        assert innermost(Recorder) is None
    assert recorder.events == []
    assert [id(made) for made in use.made] == [id(variable)]


def test_innermost_gives_the_observer_of_a_kind_that_began_last():
    one, other = Recorder(), Recorder()
    assert innermost(Recorder) is None
    with observing(one):
        with observing(VariableUse(), other):
            assert innermost(Recorder) is other
        assert innermost(Recorder) is one


def test_observing_reports_only_layers_that_no_other_layer_calls():
    recorder = Recorder()
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1)])
    with observing(recorder):
        model(X)
    assert recorder.about("layer_called") == [model]


def test_observing_lets_metric_result_replace_the_result():
    class Doubling(Observer):
        def metric_result(self, metric, result):
            return 2 * result

    metric = keras.metrics.Mean()
    metric.update_state(3.0)
    with observing(Doubling(), Doubling()):
        close(metric.result(), 12)
    close(metric.result(), 3)


def test_variable_use_lists_variables_created_read_and_written_but_not_those_of_handloom():
    read, written, own = keras.Variable(1.0), keras.Variable(2.0), OwnVariable(3.0)
    use = VariableUse()
    with observing(use):
        made, _ = keras.Variable(read.value), OwnVariable(1.0)
        written.assign(own.value)
    assert [id(variable) for variable in use.made] == [id(made)]
    assert {id(read), id(written)} <= set(use.touched)
    assert id(own) not in use.touched
    assert id(own) in use.known
    assert set(use.written) == {id(written)}


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ((np.array([1.0, 2.0], "float32"),), {}),
        (([1.0, 2.0],), {"dtype": "float32"}),
        (("ones",), {"shape": (2,)}),
        (("ones", (2,), "float32", False), {}),
        (([1, 2], None, "int32"), {"trainable": False}),
        ((), {"initializer": [1.0, 2.0], "trainable": False, "name": "named"}),
        ((3.0,), {}),
    ],
    ids=["array", "list", "initializer", "by position", "integers", "by name", "number"],
)
def test_observing_leaves_a_created_variable_the_same(args, options):
    expected = keras.Variable(*args, **options)
    with observing(VariableUse()):
        observed = keras.Variable(*args, **options)
    same(observed, expected)
    assert (observed.shape, observed.dtype) == (expected.shape, expected.dtype)
    assert observed.trainable == expected.trainable


def test_assignments_undone_restores_variables():
    kept, other = keras.Variable(1.0), keras.Variable(5.0)
    with assignments_undone():
        kept.assign(2.0)
        kept.assign(3.0)
        close(kept, 3)
    close([kept, other], [1, 5])


def test_observing_reports_a_custom_metric_with_any_result():
    class Count(keras.metrics.Metric):
        def __init__(self):
            super().__init__()
            self.count = self.add_variable((), "zeros", name="count")

        def update_state(self, values):
            self.count.assign_add(ops.sum(ops.ones_like(values)))

        def result(self):
            return {"count": ops.copy(self.count.value)}

    metric, recorder = Count(), Recorder()
    with observing(recorder):
        metric.update_state(ops.ones(3))
        close(metric.result()["count"], 3)
    assert recorder.about("metric_updated") == recorder.about("metric_result") == [metric]
