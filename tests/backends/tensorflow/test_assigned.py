"""TensorFlow: gradients through assigned variables, by all ways to read and assign, and the internals needed."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops
from tensorflow.python.eager import record

import handloom as hl
from handloom.backends.tensorflow import assigned as ours
from tests.numbers import close
from tests.threads import in_a_thread


def gradient_after(assign, read, v, w):
    def loss():
        assign(v.value, w * 3)
        return read(v.value) * w

    return hl.function(hl.grad(loss, wrt=w))()


# ---------------------------------------------------------------- in TensorFlow's own words

ASSIGN = {
    "assign": lambda variable, value: variable.assign(value),
    "assign_add": lambda variable, value: variable.assign_add(value - 2.0),
    "assign_sub": lambda variable, value: variable.assign_sub(2.0 - value),
    "after another": lambda variable, value: variable.assign(7.0).assign_add(value - 7.0),
    "without a read": lambda variable, value: variable.assign(value, read_value=False),
}
READ = {
    "converted": tf.convert_to_tensor,
    "value": lambda variable: variable.value(),
    "read_value": lambda variable: variable.read_value(),
    "identity": tf.identity,
    "an operation": tf.negative,
    "an operator": lambda variable: variable * 1.0,
}


@pytest.mark.parametrize("assign", ASSIGN.values(), ids=ASSIGN)
def test_grad_sees_every_way_to_assign(assign, v, w, eagerly):
    close(gradient_after(assign, tf.convert_to_tensor, v, w), 30)
    close(v, 15)


@pytest.mark.parametrize("read", READ.values(), ids=READ)
def test_grad_sees_every_way_to_read(read, v, w, eagerly):
    close(abs(gradient_after(ASSIGN["assign"], read, v, w)), 30)


@pytest.mark.parametrize("assign", ASSIGN.values(), ids=ASSIGN)
def test_grad_through_the_result_of_an_assignment(assign, v, w, eagerly):
    def loss():
        returned = assign(v.value, w * 3)
        return tf.identity(returned if isinstance(returned, tf.Variable) else v.value) * w

    close(hl.function(hl.grad(loss, wrt=w))(), 30)


@pytest.mark.parametrize("look_up", [tf.gather, tf.gather_nd, tf.nn.embedding_lookup], ids=lambda fn: fn.__name__)
def test_grad_sees_rows_that_are_looked_up(look_up, w, eagerly):
    table = keras.Variable(np.ones((3, 1)))

    def loss():
        table.value.assign(table * w**2)
        return tf.reduce_sum(look_up(table.value, [[0], [2]]))

    of_table, of_w = hl.function(hl.grad(loss, wrt=[table, w]))()
    close(of_table, [[25], [0], [25]])
    close(of_w, 20)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_grad_through_assignments_compiled_by_xla_or_not(jit_compile, v, w):
    def loss(x):
        v.assign(w * 3)
        return ops.cond(x > 0, lambda: v * w, lambda: -w) + v**2

    step = hl.function(lambda x: hl.grad(lambda: loss(x), wrt=w)(), jit_compile=jit_compile)
    close([step(np.float32(1)), step(np.float32(-1))], [30 + 90, -1 + 90])
    close(v, 15)


def test_grad_through_a_python_loop_that_reads_an_assigned_value(v, w):
    def loss(count):
        v.assign(w * 3)
        product = w * 1.0
        for _ in tf.range(count):
            product *= v
        return product

    close(hl.function(lambda count: hl.grad(lambda: loss(count), wrt=w)())(np.int32(2)), 27 * 25)


def test_grad_takes_a_value_assigned_in_a_branch_as_a_constant(v, w):
    def loss(x):
        if x > 0:
            v.assign(w * 3)
        return v * w

    step = hl.function(lambda x: hl.value_and_grad(lambda: loss(x), wrt=w)())
    close(step(np.float32(1)), [75, 15])


def test_grad_takes_a_value_read_in_a_tf_function_as_a_constant(v, w, eagerly):
    read = tf.function(lambda: v * 1.0)

    def loss():
        v.assign(w * 3)
        return read() * w

    step = hl.function(hl.value_and_grad(loss, wrt=w))
    close(step()[0], 75)
    w.assign(2.0)
    close(step()[0], 12)
    v.assign(1.0)
    close(read(), 1)


def test_grad_keeps_the_order_of_reads_and_writes(v, w, eagerly):
    @hl.function
    def step():
        seen = []

        def loss():
            for _ in range(3):
                v.assign(v + w)
                seen.append(v + 0)
            return v * w

        gradient = hl.grad(loss, wrt=w)()
        seen.append(v + 0)
        v.assign(1.0)
        seen.append(v + 0)
        return [*seen, gradient]

    for start in (2, 1):
        close(step(), [start + 5, start + 10, start + 15, start + 15, 1, start + 30])


def test_assignments_noted_add_nothing_to_a_graph_without_a_later_read(v, w):
    def operations(fn):
        with tf.__internal__.FuncGraph("counted").as_default() as graph, ours.assignments_noted():
            fn()
        return [operation.type for operation in graph.get_operations()]

    def assign():
        v.assign(v + 1)
        return w * 2

    def count():
        number.assign(number + 1)
        return number * 2

    number = keras.Variable(1, dtype="int32", trainable=False)
    assert "IdentityN" not in operations(assign) + operations(count)
    assert "IdentityN" in operations(lambda: assign() * v)


# -------------------------------------------------------------------------- coming and going


def test_grad_gives_a_variable_its_own_handle_back(v, w):
    handle = v.value.handle

    def loss():
        v.assign(w * 3)
        assert v.value.handle is not handle
        return v * w

    close(hl.grad(loss, wrt=w)(), 30)
    assert v.value.handle is handle

    def fail():
        v.assign(w * 3)
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        hl.grad(fail, wrt=w)()
    assert v.value.handle is handle
    close(v, 15)


def test_gradient_tape_outside_of_grad_notes_no_assignment(v, w):
    with tf.GradientTape() as tape:
        v.value.assign(w * 3)
        value = v * w
    assert [float(found) for found in tape.gradient(value, [v.value, w.value])] == [5, 15]


def test_grad_ignores_assignments_outside_of_the_graph(v, w):
    handle = v.value.handle

    def loss():
        with tf.init_scope():
            v.assign(3.0)
        assert v.value.handle is handle
        return v * w

    close(hl.function(hl.grad(loss, wrt=w))(), 3)


def test_grad_through_an_assigned_complex_number(w, eagerly):
    turned = tf.Variable(tf.complex(0.0, 0.0))

    def loss():
        turned.assign(tf.complex(w * 1.0, w**2))
        return tf.math.imag(turned)

    close(hl.function(hl.grad(loss, wrt=w))(), 10)


def test_grad_ignores_assignments_of_another_thread(v, w):
    def loss():
        v.assign(w * 3)
        handle = w.value.handle
        in_a_thread(lambda: w.assign_add(0.0))
        assert w.value.handle is handle
        return v * w

    close(hl.grad(loss, wrt=w)(), 30)


# ---------------------------------------------------------------- internals of TensorFlow's own


def test_record_operation_tells_tapes():
    x = tf.constant(2.0)
    with tf.GradientTape() as tape:
        tape.watch(x)
        with record.stop_recording():
            y = x * 3
        record.record_operation("Ours", [y], [x], lambda gradient: [gradient * 7])
    close(tape.gradient(y, x), 7)
