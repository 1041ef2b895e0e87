"""What observers are told of Keras, and that Keras is as it was afterwards."""

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
from tests.numbers import close, ones, same
from tests.threads import alternating, in_a_thread

X = np.array([[1.0, 2.0], [3.0, 4.0]], "float32")


class Recorder(Observer):
    """Writes down what it is told."""

    def __init__(self):
        self.told = []

    def created(self, variable):
        self.told.append(("created", variable))

    def read(self, variable):
        self.told.append(("read", variable))

    def assigned(self, variable):
        self.told.append(("assigned", variable))

    def metric_updated(self, metric):
        self.told.append(("metric_updated", metric))

    def metric_result(self, metric, result):
        self.told.append(("metric_result", metric))
        return result

    def loss_called(self, loss, value, y_pred, sample_weight):
        self.told.append(("loss_called", loss))

    def loss_added(self, layer, loss):
        self.told.append(("loss_added", layer))

    def losses_read(self, layer):
        self.told.append(("losses_read", layer))

    def layer_called(self, layer, outputs):
        self.told.append(("layer_called", layer))

    def applied(self, optimizer, variables):
        self.told.append(("applied", optimizer, *variables))

    def about(self, event):
        """What an event was about, each once."""
        return list({id(told[1]): told[1] for told in self.told if told[0] == event}.values())


def everything():
    """Does all that observers are told of; returns what it does it with."""
    layer = layers.Dense(1, kernel_regularizer="l2", activity_regularizer="l2")
    layer.build((None, 2))
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
    """What is replaced in Keras, as it stands in the classes themselves."""
    places = [(keras.Variable, "__init__ value assign"), (keras.Metric, "__getattribute__"), (keras.Loss, "__call__")]
    places += [(keras.Layer, "add_loss losses __call__"), (keras.optimizers.Optimizer, "apply")]
    return [vars(owner).get(name) for owner, names in places for name in names.split()]


def unchanged(before):
    return all(now is then for now, then in zip(patched(), before, strict=True))


def test_an_observer_is_told_of_each_event_with_its_object():
    recorder = Recorder()
    with observing(recorder):
        layer, metric, optimizer, loss = everything()
    kernel = layer.kernel
    assert {id(kernel), id(metric.total)} <= set(map(id, recorder.about("created")))
    assert id(kernel) in map(id, recorder.about("read"))
    assert id(layer.bias) in map(id, recorder.about("assigned"))
    assert recorder.about("metric_updated") == recorder.about("metric_result") == [metric]
    assert recorder.about("loss_called") == [loss]
    assert recorder.about("loss_added") == recorder.about("losses_read") == recorder.about("layer_called") == [layer]
    [(_, applied, *variables)] = [told for told in recorder.told if told[0] == "applied"]
    assert applied is optimizer
    assert [id(variable) for variable in variables] == [id(kernel)]


def test_what_is_observed_is_as_without_observers():
    plain = everything()
    with observing(Recorder()):
        observed = everything()
    close(plain[1].result(), plain[1].result())
    assert [variable.shape for variable in observed[0].variables] == [variable.shape for variable in plain[0].variables]


def test_keras_is_the_very_same_after_observing_after_an_error_and_after_nesting():
    before = patched()
    with pytest.raises(KeyboardInterrupt), observing(Recorder()):
        raise KeyboardInterrupt
    assert unchanged(before)
    with observing(Recorder()):
        with pytest.raises(KeyError), observing(Recorder()):
            raise KeyError
        assert not unchanged(before)
    assert unchanged(before)


def test_outer_and_inner_observers_are_told_of_what_happens_in_the_inner_block():
    outer, inner = Recorder(), Recorder()
    with observing(outer):
        first = keras.Variable(1.0)
        with observing(inner):
            second = keras.Variable(2.0)
        third = keras.Variable(3.0)
    assert list(map(id, outer.about("created"))) == [id(first), id(second), id(third)]
    assert list(map(id, inner.about("created"))) == [id(second)]


def test_observers_that_overlap_in_two_threads_are_told_of_their_own_and_keras_is_the_same_after():
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


def test_an_observer_is_not_told_of_other_threads():
    recorder = Recorder()
    with observing(recorder):
        in_a_thread(everything)
    assert recorder.told == []


def test_while_layers_are_built_only_those_are_told_that_want_to_know():
    recorder, use = Recorder(), VariableUse()
    with observing(recorder, use), building():
        variable = keras.Variable(1.0)
        assert innermost(Recorder) is None
    assert recorder.told == []
    assert [id(made) for made in use.made] == [id(variable)]


def test_the_innermost_observer_of_a_kind_is_the_last_that_began():
    one, other = Recorder(), Recorder()
    assert innermost(Recorder) is None
    with observing(one):
        with observing(VariableUse(), other):
            assert innermost(Recorder) is other
        assert innermost(Recorder) is one


def test_layer_called_is_for_layers_that_no_other_layer_calls():
    recorder = Recorder()
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1)])
    with observing(recorder):
        model(X)
    assert recorder.about("layer_called") == [model]


def test_metric_result_may_give_another_result():
    class Doubling(Observer):
        def metric_result(self, metric, result):
            return 2 * result

    metric = keras.metrics.Mean()
    metric.update_state(3.0)
    with observing(Doubling(), Doubling()):
        close(metric.result(), 12)
    close(metric.result(), 3)


def test_variable_use_lists_what_is_made_read_and_written_and_not_handlooms_own():
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
def test_a_variable_created_while_observed_is_the_one_it_would_have_been(args, options):
    expected = keras.Variable(*args, **options)
    with observing(VariableUse()):
        observed = keras.Variable(*args, **options)
    same(observed, expected)
    assert (observed.shape, observed.dtype) == (expected.shape, expected.dtype)
    assert observed.trainable == expected.trainable


def test_assignments_are_undone():
    kept, other = keras.Variable(1.0), keras.Variable(5.0)
    with assignments_undone():
        kept.assign(2.0)
        kept.assign(3.0)
        close(kept, 3)
    close([kept, other], [1, 5])


def test_observers_see_a_metric_of_the_users_own_whatever_its_result():
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
