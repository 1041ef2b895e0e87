"""TensorFlow: gradients through assigned variables, in TensorFlow's own words and as its internals have it."""

import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops
from tensorflow.python.eager import record
from tensorflow.python.ops import resource_variable_ops
from tensorflow.python.ops.control_flow_v2_func_graphs import ControlFlowFuncGraph

import handloom as hl
from handloom.backends.tensorflow import assigned as ours


def close(actual, expected):
    np.testing.assert_allclose(ops.convert_to_numpy(actual), expected, rtol=1e-6)


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
def test_every_way_to_assign_is_seen(assign, v, w, eagerly):
    close(gradient_after(assign, tf.convert_to_tensor, v, w), 30)
    close(v, 15)


@pytest.mark.parametrize("read", READ.values(), ids=READ)
def test_every_way_to_read_is_seen(read, v, w, eagerly):
    close(abs(gradient_after(ASSIGN["assign"], read, v, w)), 30)


@pytest.mark.parametrize("assign", ASSIGN.values(), ids=ASSIGN)
def test_what_an_assignment_returns_is_what_was_assigned(assign, v, w, eagerly):
    def loss():
        returned = assign(v.value, w * 3)
        return tf.identity(returned if isinstance(returned, tf.Variable) else v.value) * w

    close(hl.function(hl.grad(loss, wrt=w))(), 30)


@pytest.mark.parametrize("look_up", [tf.gather, tf.gather_nd, tf.nn.embedding_lookup], ids=lambda fn: fn.__name__)
def test_looking_up_is_reading(look_up, w, eagerly):
    table = keras.Variable(np.ones((3, 1)))

    def loss():
        table.value.assign(table * w**2)
        return tf.reduce_sum(look_up(table.value, [[0], [2]]))

    of_table, of_w = hl.function(hl.grad(loss, wrt=[table, w]))()
    close(of_table, [[25], [0], [25]])
    close(of_w, 20)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_xla_compiles_it(jit_compile, v, w):
    def loss(x):
        v.assign(w * 3)
        return ops.cond(x > 0, lambda: v * w, lambda: -w) + v**2

    step = hl.function(lambda x: hl.grad(lambda: loss(x), wrt=w)(), jit_compile=jit_compile)
    close([step(np.float32(1)), step(np.float32(-1))], [30 + 90, -1 + 90])
    close(v, 15)


def test_a_loop_of_pythons_over_tensors_reads_what_was_assigned_before_it(v, w):
    def loss(count):
        v.assign(w * 3)
        product = w * 1.0
        for _ in tf.range(count):
            product *= v
        return product

    close(hl.function(lambda count: hl.grad(lambda: loss(count), wrt=w)())(np.int32(2)), 27 * 25)


def test_what_a_branch_assigns_is_a_constant_change_to_what_follows(v, w):
    def loss(x):
        if x > 0:
            v.assign(w * 3)
        return v * w

    step = hl.function(lambda x: hl.value_and_grad(lambda: loss(x), wrt=w)())
    close(step(np.float32(1)), [75, 15])


def test_a_function_of_tensorflows_reads_the_present_value(v, w, eagerly):
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


def test_reads_and_writes_keep_their_order(v, w, eagerly):
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


def test_without_a_read_after_an_assignment_nothing_is_added_to_the_graph(v, w):
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


def fails(v, w):
    v.assign(w * 3)
    raise RuntimeError("broken")


def test_a_variable_has_its_own_handle_back_afterwards(v, w):
    handle = v.value.handle

    def loss():
        v.assign(w * 3)
        assert v.value.handle is not handle
        return v * w

    close(hl.grad(loss, wrt=w)(), 30)
    assert v.value.handle is handle
    with pytest.raises(RuntimeError, match="broken"):
        hl.grad(lambda: fails(v, w), wrt=w)()
    assert v.value.handle is handle
    close(v, 15)


def test_outside_of_differentiated_functions_nothing_is_noted(v, w):
    with tf.GradientTape() as tape:
        v.value.assign(w * 3)
        value = v * w
    assert [float(found) for found in tape.gradient(value, [v.value, w.value])] == [5, 15]


def test_what_a_trace_assigns_outside_of_its_graph_is_not_noted(v, w):
    handle = v.value.handle

    def loss():
        with tf.init_scope():
            v.assign(3.0)
        assert v.value.handle is handle
        return v * w

    close(hl.function(hl.grad(loss, wrt=w))(), 3)


def test_complex_numbers_flow(w, eagerly):
    turned = tf.Variable(tf.complex(0.0, 0.0))

    def loss():
        turned.assign(tf.complex(w * 1.0, w**2))
        return tf.math.imag(turned)

    close(hl.function(hl.grad(loss, wrt=w))(), 10)


def test_another_thread_has_nothing_to_do_with_it(v, w):
    def loss():
        v.assign(w * 3)
        handle = w.value.handle
        thread = threading.Thread(target=lambda: w.assign_add(0.0))
        thread.start()
        thread.join()
        assert w.value.handle is handle
        return v * w

    close(hl.grad(loss, wrt=w)(), 30)


# ---------------------------------------------------------------- internals of TensorFlow's own


def test_operations_run_op_by_op_look_at_the_handle(v, w):
    v.value._handle = w.value._handle
    close(tf.raw_ops.AddV2(x=v.value, y=0.0), 5)


def test_a_new_handle_knows_the_shape_behind_it():
    handle = keras.Variable(np.ones((3, 2))).value.handle
    new = ours._new_handle(handle, tf.ones((3, 2)))
    assert new is not handle
    assert new._handle_data == handle._handle_data


def test_assigning_has_two_doors():
    """`ResourceVariable` holds functions of its own for it, so that both classes have to be told."""
    resource, base = resource_variable_ops.ResourceVariable, resource_variable_ops.BaseResourceVariable
    for name in ("assign", "assign_add", "assign_sub"):
        assert name in vars(resource)
        assert vars(resource)[name] is not vars(base)[name]


def test_tapes_can_be_told_of_an_operation():
    x = tf.constant(2.0)
    with tf.GradientTape() as tape:
        tape.watch(x)
        with record.stop_recording():
            y = x * 3
        record.record_operation("Ours", [y], [x], lambda gradient: [gradient * 7])
    close(tape.gradient(y, x), 7)


def test_a_tape_takes_a_handle_with_a_mark_for_a_variable(v):
    with tf.GradientTape() as tape:
        source = ours.watch(tape, v.value)
        value = v**2
    close(tape.gradient(value, source), 4)


@pytest.mark.parametrize(("run", "expected"), [(tf.cond, True), (None, False)], ids=["cond", "function"])
def test_graphs_of_branches_are_known(run, expected):
    graphs = []

    def note():
        graphs.append(tf.compat.v1.get_default_graph())
        return 1.0

    @tf.function
    def outer(x):
        return tf.cond(x > 0, note, note) if run else tf.function(note)()

    outer(tf.constant(1.0))
    assert all(isinstance(graph, ControlFlowFuncGraph) is expected for graph in graphs)
    assert all(graph.outer_graph is not None for graph in graphs)
