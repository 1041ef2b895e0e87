"""Scopes: the values of variables during a trace."""

import keras
import pytest
from keras import layers, ops

from handloom.backends.scope import Recorder, Scope, refuse
from handloom.errors import VariableError
from tests.models import built
from tests.numbers import close, numpy, ones, same


def number(value):
    return float(numpy(value))


def tensor(value):
    return ops.convert_to_tensor(value, dtype="float32")


def test_scope_gives_a_variable_its_bound_value():
    variable = keras.Variable(1.0)
    with Scope([(variable, tensor(5))]):
        assert number(variable.value) == 5
        close(variable + 1, 6)
    assert number(variable.value) == 1


def test_scope_keeps_assigned_values_to_itself():
    variable = keras.Variable(1.0)
    with Scope() as scope:
        variable.assign(tensor(7))
        assert number(variable.value) == 7
    assert number(variable.value) == 1
    assert number(scope.get_current_value(variable)) == 7
    assert [written is variable for written in scope.written] == [True]


def test_scope_asks_the_enclosing_scope_or_the_outer_reader_for_other_values():
    a, b, c = (keras.Variable(n) for n in (1.0, 2.0, 3.0))
    with keras.StatelessScope([(a, tensor(10))]):
        with Scope([(b, tensor(20))]):
            assert [number(variable.value) for variable in (a, b, c)] == [10, 20, 3]
        with Scope([(b, tensor(20))], outer=lambda _: tensor(99)):
            assert [number(variable.value) for variable in (a, b)] == [99, 20]
    with pytest.raises(KeyError), Scope([(a, tensor(10))]):
        raise KeyError
    assert number(a.value) == 1  # No scope is open after an error.


def test_scope_inside_another_takes_its_own_value_first_and_writes_to_itself_only():
    variable = keras.Variable(1.0)
    with Scope([(variable, tensor(10))]) as outer:
        with Scope([(variable, tensor(20))]) as inner:
            variable.assign_add(tensor(1))
        assert number(variable.value) == 10
    assert number(inner.get_current_value(variable)) == 21
    assert outer.written == []


def test_scope_written_lists_variables_in_the_order_of_their_first_assignment():
    a, b, c = (keras.Variable(number(n)) for n in range(3))
    with Scope([(c, tensor(9))]) as scope:
        b.assign(tensor(1))
        a.assign(tensor(2))
        b.assign(tensor(3))
        number(c.value)
    assert list(map(id, scope.written)) == [id(b), id(a)]
    assert number(scope.get_current_value(b)) == 3


def test_scope_gives_a_regularizer_the_bound_value():
    layer = built(layers.Dense(1, use_bias=False, kernel_regularizer=keras.regularizers.L2(1.0)), 1)
    with Scope([(layer.kernel, tensor([[3.0]]))]):
        assert number(layer.losses[0]) == 9


def test_scope_collects_added_losses():
    class Penalty(layers.Layer):
        def call(self, x):
            self.add_loss(ops.sum(x))
            return x

    layer = Penalty()
    with Scope():
        layer(ones(3))
        assert number(layer.losses[0]) == 3


def test_scope_that_creates_initializes_variables_when_it_closes():
    with Scope(creates=True) as scope:
        variable = keras.Variable("ones", shape=(2,))
        assert not scope.incomplete
    same(variable, ones(2))


def test_scope_inside_another_initializes_nothing():
    with Scope(creates=True):
        with Scope(creates=True):
            variable = keras.Variable("ones", shape=(2,))
        assert variable._value is None
    same(variable, ones(2))


def test_scope_forgets_an_initializer_that_failed():
    def broken(shape, dtype=None):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"), Scope(creates=True):
        keras.Variable(broken, shape=(2,))
    with Scope(creates=True):
        variable = keras.Variable("ones", shape=(2,))
    same(variable, ones(2))


def test_scope_is_incomplete_after_a_read_of_a_variable_without_a_value():
    with Scope(creates=True) as scope:
        variable = keras.Variable("ones", shape=(2,))
        assert tuple(variable.value.shape) == (2,)
        assert scope.incomplete
    with Scope() as scope:
        variable.value  # noqa: B018
    assert not scope.incomplete


def test_recorder_reads_each_variable_once_and_keeps_their_order():
    a, b, read = keras.Variable(1.0), keras.Variable(2.0), []

    def reader(variable):
        read.append(variable)
        return tensor(len(read))

    recorder = Recorder(reader)
    with Scope(outer=recorder):
        assert [number(v.value) for v in (b, a, b, a)] == [1, 2, 1, 2]
    assert list(map(id, read)) == list(map(id, recorder.variables)) == [id(b), id(a)]


def test_refuse_names_the_variable():
    variable = keras.Variable(1.0, name="late")
    with (
        pytest.raises(VariableError, match=r"'late' appeared only when.*second time.*outside of the step"),
        Scope(outer=refuse),
    ):
        variable.value  # noqa: B018
