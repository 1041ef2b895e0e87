"""Rows E: compiled functions."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.errors import TraceError
from tests.numbers import close, each_close, same, values_of
from tests.rows.figures import below
from tests.rows.real_data import diabetes


def cube(x):
    return x**3


@pytest.mark.parametrize("number", [2, 2.0, np.float32(2), np.int32(2)])
def test_e1_function_cubes_2(eagerly, number, shown):
    found = hl.function(cube)(number)
    assert float(found) == 8
    shown(f"{float(found):.0f} for 2 and for 2.0")


def test_e1_function_keeps_the_original_and_has_one_trace_for_each_shape_and_dtype(shown):
    compiled = hl.function(cube)
    assert compiled.python_function is cube
    assert compiled.python_function(2) == 8
    assert compiled.traces == []
    new = {"float32[]": np.float32(2), "int32[]": np.int32(2), "float32[3]": np.ones(3, "float32")}
    for signature, x in new.items():
        same(compiled(x), x**3)
        assert compiled.traces[-1].signature == f"x: {signature}"
    for x in new.values():
        same(compiled(x + 1), (x + 1) ** 3)
        compiled(ops.convert_to_tensor(x))
    assert len(compiled.traces) == len(new)
    assert all(trace.compiled for trace in compiled.traces)
    shown(f"{len(compiled.traces)} traces for {len(new)} shapes and dtypes")


def squares_up_to(n):
    return n * (n + 1) * (2 * n + 1) // 6


def by_while_loop(n, seen):
    def add(i, total):
        seen.append(i)
        return i + 1, total + i * i

    return ops.while_loop(lambda i, total: i <= n, add, (ops.ones_like(n), ops.zeros_like(n)))[1]


def by_fori_loop(n, seen):
    def add(i, total):
        seen.append(i)
        return total + i * i

    return ops.fori_loop(0, n + 1, add, ops.zeros_like(n))


@pytest.mark.parametrize("loop", [by_while_loop, by_fori_loop])
def test_e2_function_compiles_a_loop_over_tensors_and_does_not_unroll_it(loop, shown):
    seen = []
    compiled = hl.function(lambda n: loop(n, seen))
    assert [int(compiled(np.int32(n))) for n in (3, 1000, 0)] == [squares_up_to(n) for n in (3, 1000, 0)]
    [trace] = compiled.traces
    assert trace.compiled
    assert len(seen) < 10  # The body runs while it is traced, not once an iteration.
    with hl.run_eagerly(True):
        assert int(compiled(np.int32(100))) == squares_up_to(100)
    shown(f"squares up to 1000: {int(compiled(np.int32(1000)))}, in {len(compiled.traces)} trace")


def test_e2_function_compiles_a_loop_in_a_step_that_builds_its_layers():
    layer, optimizer = layers.Dense(1), keras.optimizers.SGD(0.1)

    @hl.function
    def step(x, n):
        hl.minimize(lambda: ops.mean(layer(x) ** 2), layer, optimizer)
        return by_fori_loop(n, [])

    assert [int(step(np.ones((2, 3), "float32"), np.int32(n))) for n in (3, 4)] == [squares_up_to(n) for n in (3, 4)]
    assert len(step.traces) == 1


def test_e2_function_compiles_a_branch_over_tensors(eagerly):
    seen = []

    def note(branch, value):
        seen.append(branch)
        return value

    @hl.function
    def absolute(x):
        return ops.cond(x < 0, lambda: note("below", -x), lambda: note("above", x))

    values = [-3.0, 3.0, 0.0, -5.0]
    assert [float(absolute(np.float32(value))) for value in values] == [3, 3, 0, 5]
    if not eagerly:
        assert set(seen) == {"below", "above"}
        assert len(absolute.traces) == 1


def by_python_for(n):
    total = 0 * n
    for i in range(n + 1):
        total = total + i * i
    return total


def by_python_while(n):
    i, total = 0 * n, 0 * n
    while i < n:
        i = i + 1
        total = total + i * i
    return total


def by_python_if(n):
    total = 0 * n
    if n > 0:
        total = n * (n + 1) * (2 * n + 1) // 6
    return total


# With the line that needs the value of a tensor, the second of each function.
python_control_flow = pytest.mark.parametrize(
    ("by_python", "line"),
    [(by_python_for, "for i in range(n + 1):"), (by_python_while, "while i < n:"), (by_python_if, "if n > 0:")],
)


@python_control_flow
@pytest.mark.backend("tensorflow")
def test_e2_function_compiles_python_loops_and_branches_on_tensorflow(by_python, line, shown):
    compiled = hl.function(by_python)
    assert [int(compiled(np.int32(n))) for n in (3, 1000, 0)] == [squares_up_to(n) for n in (3, 1000, 0)]
    [trace] = compiled.traces
    assert trace.compiled
    shown("for, while and if of Python are compiled")


@python_control_flow
@pytest.mark.backend("jax", "torch")
def test_e2_function_refuses_python_loops_and_branches_and_names_the_line(by_python, line, refused):
    with pytest.raises(TraceError) as raised:
        hl.function(by_python)(np.int32(3))
    message = str(raised.value)
    for alternative in ("keras.ops.cond", "keras.ops.while_loop", "keras.ops.fori_loop", "hl.run_eagerly(True)"):
        assert alternative in message
    assert f"{__file__}, line {by_python.__code__.co_firstlineno + 2}: {line}" in message
    refused("for, while and if of Python over tensors")


@python_control_flow
def test_e2_run_eagerly_runs_python_loops_and_branches(by_python, line):
    with hl.run_eagerly(True):
        assert int(hl.function(by_python)(np.int32(10))) == squares_up_to(10)


class Trainer:
    """Has every kind of state that a step can have; starts from the same values each time."""

    def __init__(self):
        keras.utils.set_random_seed(0)
        dense = layers.Dense(8, use_bias=False)  # Normalization would cancel a bias; Adam amplifies its rounding.
        parts = [dense, layers.BatchNormalization(), layers.ReLU(), layers.Dropout(0.3, seed=1)]
        self.net = keras.Sequential([keras.Input((10,)), *parts, layers.Dense(1)])
        self.optimizer, self.metric = keras.optimizers.Adam(0.01), keras.metrics.MeanAbsoluteError()
        self.seed = keras.random.SeedGenerator(5)
        self.calls = keras.Variable(0, trainable=False, dtype="int32")
        self.seen = []

    def step(self, x, y):
        x = x + 0.1 * keras.random.normal(ops.shape(x), seed=self.seed)
        x = x + 0.1 * keras.random.uniform(ops.shape(x))

        def loss_fn():
            y_pred = self.net(x, training=True)
            return ops.mean((y_pred - y) ** 2), y_pred

        loss, y_pred = hl.minimize(loss_fn, self.net, self.optimizer, has_aux=True)
        self.metric.update_state(y, y_pred)
        self.calls.assign_add(1)
        self.seen.append(loss)
        return loss, self.metric.result()

    def run(self):
        """Ten steps: the reported values, all variables, and the traces."""
        (x, y), step = (array[:64] for array in diabetes()), hl.function(self.step)
        history = [[float(value) for value in step(x, y)] for _ in range(10)]
        return history, [*values_of(self.net, self.optimizer, self.metric), self.seed.state, self.calls], step.traces


def test_e4_run_eagerly_gives_the_same_numbers(shown):
    compiled, expected, traces = Trainer().run()
    with hl.run_eagerly(True):
        trainer = Trainer()
        eager, variables, no_traces = trainer.run()
    assert (len(traces), no_traces) == (1, [])
    assert traces[0].compiled
    close(eager, compiled, rtol=1e-4)
    each_close(variables, expected, rtol=1e-3, atol=1e-5)
    assert [float(loss) for loss in trainer.seen] == [loss for loss, _ in eager]  # As `print` and `pdb` see them.
    shown(f"10 losses differ by {below(np.abs(np.subtract(eager, compiled)).max())}")
