"""Variable values during one trace."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from handloom.backends.scope import Recorder, Scope, refuse
from handloom.errors import VariableError


def number(value):
    return float(ops.convert_to_numpy(value))


def tensor(value):
    return ops.convert_to_tensor(value, dtype="float32")


def test_a_variable_has_in_a_scope_the_value_it_is_bound_to():
    variable = keras.Variable(1.0)
    with Scope([(variable, tensor(5))]):
        assert number(variable.value) == 5
        assert number(variable + 1) == 6
    assert number(variable.value) == 1


def test_what_is_assigned_in_a_scope_stays_in_it():
    variable = keras.Variable(1.0)
    with Scope() as scope:
        variable.assign(tensor(7))
        assert number(variable.value) == 7
    assert number(variable.value) == 1
    assert number(scope.get_current_value(variable)) == 7
    assert [written is variable for written in scope.written] == [True]


def test_what_a_scope_does_not_hold_it_asks_of_the_one_around_it():
    outer_variable, inner_variable, free = keras.Variable(1.0), keras.Variable(2.0), keras.Variable(3.0)
    with Scope([(outer_variable, tensor(10))]), Scope([(inner_variable, tensor(20))]):
        assert [number(v.value) for v in (outer_variable, inner_variable, free)] == [10, 20, 3]


def test_the_innermost_of_two_values_counts_and_writes_go_no_further():
    variable = keras.Variable(1.0)
    with Scope([(variable, tensor(10))]) as outer:
        with Scope([(variable, tensor(20))]) as inner:
            variable.assign_add(tensor(1))
        assert number(variable.value) == 10
    assert number(inner.get_current_value(variable)) == 21
    assert outer.written == []


def test_a_scope_of_kerass_around_one_of_ours_is_asked_too():
    variable = keras.Variable(1.0)
    with keras.StatelessScope([(variable, tensor(5))]), Scope():
        assert number(variable.value) == 5


def test_written_are_the_assigned_in_the_order_of_the_first_time():
    a, b, c = (keras.Variable(float(n)) for n in range(3))
    with Scope([(c, tensor(9))]) as scope:
        b.assign(tensor(1))
        a.assign(tensor(2))
        b.assign(tensor(3))
        number(c.value)
    assert list(map(id, scope.written)) == [id(b), id(a)]
    assert number(scope.get_current_value(b)) == 3


def test_a_regularizer_sees_the_value_in_the_scope():
    layer = layers.Dense(1, use_bias=False, kernel_regularizer=keras.regularizers.L2(1.0))
    layer.build((None, 1))
    with Scope([(layer.kernel, tensor([[3.0]]))]):
        assert number(layer.losses[0]) == 9


def test_added_losses_are_collected():
    class Penalty(layers.Layer):
        def call(self, x):
            self.add_loss(ops.sum(x))
            return x

    layer = Penalty()
    with Scope():
        layer(np.ones(3, "float32"))
        assert number(layer.losses[0]) == 3


def test_variables_made_inside_are_initialized_when_a_creating_scope_closes():
    with Scope(creates=True) as scope:
        variable = keras.Variable("ones", shape=(2,))
        assert not scope.incomplete
    np.testing.assert_array_equal(variable.numpy(), np.ones(2))


def test_only_the_outermost_scope_initializes():
    with Scope(creates=True):
        with Scope(creates=True):
            variable = keras.Variable("ones", shape=(2,))
        assert variable._value is None
    np.testing.assert_array_equal(variable.numpy(), np.ones(2))


def test_an_initializer_that_fails_fails_once():
    def broken(shape, dtype=None):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"), Scope(creates=True):
        keras.Variable(broken, shape=(2,))
    with Scope(creates=True):
        variable = keras.Variable("ones", shape=(2,))
    np.testing.assert_array_equal(variable.numpy(), np.ones(2))


def test_it_is_noted_when_a_value_is_read_that_does_not_exist_yet():
    with Scope(creates=True) as scope:
        variable = keras.Variable("ones", shape=(2,))
        assert tuple(variable.value.shape) == (2,)
        assert scope.incomplete
    with Scope() as scope:
        variable.value  # noqa: B018
    assert not scope.incomplete


def test_an_outer_reader_takes_the_place_of_the_scope_around():
    variable = keras.Variable(1.0)
    with Scope([(variable, tensor(10))]), Scope(outer=lambda _: tensor(99)):
        assert number(variable.value) == 99


def test_a_recorder_reads_each_variable_once_and_remembers_the_order():
    a, b, read = keras.Variable(1.0), keras.Variable(2.0), []

    def reader(variable):
        read.append(variable)
        return tensor(len(read))

    recorder = Recorder(reader)
    with Scope(outer=recorder):
        assert [number(v.value) for v in (b, a, b, a)] == [1, 2, 1, 2]
    assert list(map(id, read)) == list(map(id, recorder.variables)) == [id(b), id(a)]


def test_a_variable_that_was_not_there_before_is_refused_by_name():
    variable = keras.Variable(1.0, name="late")
    with (
        pytest.raises(VariableError, match=r"'late' appeared only when.*second time.*outside of the step"),
        Scope(outer=refuse),
    ):
        variable.value  # noqa: B018


def test_after_an_error_no_scope_is_open():
    variable = keras.Variable(1.0)
    with pytest.raises(RuntimeError), Scope([(variable, tensor(5))]):
        raise RuntimeError
    assert number(variable.value) == 1


def test_keras_asks_the_scope_and_tells_it():
    """What of Keras's `StatelessScope` Handloom relies on."""
    variable, asked, told = keras.Variable(1.0), [], []

    class Own(keras.StatelessScope):
        def get_current_value(self, variable):
            asked.append(variable)
            return super().get_current_value(variable)

        def add_update(self, update):
            told.append(update)
            super().add_update(update)

    with keras.StatelessScope() as outer, Own() as scope:
        assert scope.original_scope is outer
        variable.assign(tensor(2))
        number(variable.value)
        assert number(scope.state_mapping[id(variable)]) == 2
    assert told[0][0] is variable
    assert all(one is variable for one in asked)
    assert asked
