"""Programs: single calls, `pure`, `fused` and `cost`, on the backend of this process."""

import contextlib
import signal

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.backends import backend
from handloom.backends.program import Cost
from tests.backends.programs import run, tensors, traced
from tests.numbers import close, each_close, each_same, normal, numpy, ones, same

BATCHES = [normal(3, 4, 2, seed=k) for k in range(5)]


def training(net):
    """A training step with batch normalization, dropout, momentum and a metric, and all its variables."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([net(), layers.BatchNormalization(), layers.Dropout(0.5, seed=1)])
    optimizer, metric = keras.optimizers.SGD(0.1, momentum=0.9), keras.metrics.Mean()

    def step(x):
        loss = hl.minimize(lambda: ops.mean((model(x, training=True) - 1) ** 2), model, optimizer)
        metric.update_state(loss)
        return [loss]

    model.build((None, 4, 2))
    optimizer.build(model.trainable_variables)
    return step, [*model.variables, *optimizer.variables, *metric.variables]


# ---------------------------------------------------------------------------- a call


def test_program_takes_and_returns_nothing_or_one_tensor_twice():
    variable = keras.Variable(1.0)
    x = np.arange(6, dtype="float32")

    def double():
        variable.assign(variable * 2)
        return []

    assert list(traced(double)([])) == []
    close(variable, 2)
    close(run(traced(lambda x: [x, x, x + 0], x), x), [x, x, x])


def test_program_reads_and_writes_its_variables():
    total, factor, other = keras.Variable(1.0), keras.Variable(2.0), keras.Variable(3.0)

    def step(x):
        total.assign(total + factor * x)
        return [total * 1]

    program = traced(step, np.float32(1))
    assert [id(variable) for variable in program.written] == [id(total)]
    assert [id(variable) for variable in program.read] == [id(factor)]
    close([total, other], [1, 3])  # A trace changes nothing.


# TensorFlow's own Python code may lose parts of a call that is interrupted; the loop never interrupts a call.
@pytest.mark.backend("jax", "torch")
def test_program_that_is_interrupted_leaves_each_variable_with_its_old_or_its_new_value():
    one, two = keras.Variable(np.zeros(64, "float32")), keras.Variable(np.zeros(64, "float32"))

    def step(x):
        one.assign_add(x)
        two.assign_add(x)
        return [ops.sum(one)]

    program, arguments, armed = traced(step, ones(64)), tensors(ones(64)), []
    program(arguments)  # A first call may build what the later ones use; the loop never interrupts it.

    def interrupt(*_):
        if armed:
            armed.clear()
            raise KeyboardInterrupt

    def until_interrupted(seconds):
        armed.append(True)
        # Repeatedly: an exception that is raised in a hook of the garbage collector is lost.
        signal.setitimer(signal.ITIMER_REAL, seconds, 1e-3)
        while armed:
            program(arguments)

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for attempt in range(100):
            one.assign(np.zeros(64))
            two.assign(np.zeros(64))
            with contextlib.suppress(KeyboardInterrupt):
                until_interrupted(1e-4 + attempt * 1e-5)
            first, second = one.numpy(), two.numpy()
            assert len(set(first)) == len(set(second)) == 1
            assert abs(first[0] - second[0]) <= 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    one.assign(np.zeros(64))
    program(arguments)
    close(one, ones(64))


# ------------------------------------------------------------------------------ pure


def test_program_pure_returns_the_values_that_a_call_assigns_and_changes_nothing():
    step, variables = training(lambda: layers.Dense(2))
    program, before = traced(step, BATCHES[0]), [numpy(variable) for variable in variables]
    written, read = ([numpy(variable) for variable in group] for group in (program.written, program.read))
    given, fixed = tensors(*written), tensors(*read)
    news, results = program.pure(given, fixed, tensors(BATCHES[0]))
    each_same([*variables, *given, *fixed], [*before, *written, *read])
    each_same(results, run(program, BATCHES[0]))
    each_same(program.written, news)
    assert any((numpy(new) != old).any() for new, old in zip(news, written, strict=True))


def test_program_pure_takes_other_values_than_those_of_the_variables():
    total, factor = keras.Variable(1.0), keras.Variable(2.0)

    def step(x):
        total.assign(total + factor * x)
        return [total * 10]

    program = traced(step, np.float32(1))
    (new,), (result,) = program.pure(*(tensors(np.float32(value)) for value in (100, 3, 5)))
    close([new, result, total, factor], [115, 1150, 1, 2])


# ----------------------------------------------------------------------------- fused


def fused(fn, *examples, steps):
    """A function that runs `fn` on several batches in one dispatch; step by step on PyTorch, which gains nothing."""
    program = traced(fn, *examples)
    run_all = program.fused(steps) or (lambda batches: [program(batch) for batch in batches][-1])
    return lambda *batches: run_all([tensors(*batch) for batch in batches])


def test_program_fused_takes_batches_in_order_and_returns_the_last_results():
    value, factor = keras.Variable(1.0), keras.Variable(2.0)

    def step(x, y):
        value.assign(factor * value + ops.sum(x))
        return [value * 1, y + 1]

    run_all = fused(step, ones(2), np.int32(0), steps=4)
    close(value, 1)  # A trace changes nothing.
    for start in (1.0, 5.0):
        value.assign(start)
        last, other = run_all(*((k * ones(2), np.int32(k)) for k in range(4)))
        expected = start
        for k in range(4):
            expected = 2 * expected + 2 * k
        same([value, last, other], [expected, expected, 4])
    factor.assign(0.0)  # Each call reads it.
    run_all(*((ones(2), np.int32(0)) for _ in range(4)))
    close(value, 2)


def test_program_fused_takes_and_returns_nothing():
    value = keras.Variable(1.0)

    def triple():
        value.assign(value * 3)
        return []

    assert list(fused(triple, steps=3)([], [], [])) == []
    close(value, 27)


# On JAX, the second runs unrolled, where XLA may combine operations of several steps, and round differently.
@pytest.mark.parametrize(
    ("net", "agree"),
    [(lambda: layers.Dense(2), each_same), (lambda: layers.Conv1D(2, 2, padding="same"), each_close)],
    ids=["in a loop", "unrolled"],
)
def test_program_fused_trains_as_single_calls(net, agree):
    step, together = training(net)
    fused(step, BATCHES[0], steps=5)(*([batch] for batch in BATCHES))
    step, one_by_one = training(net)
    program = traced(step, BATCHES[0])
    for batch in BATCHES:
        run(program, batch)
    agree(together, one_by_one)


# ------------------------------------------------------------------------------ cost


def test_program_cost_counts_the_operations_of_a_matrix_product_where_the_compiler_tells():
    cost = traced(lambda x, y: [ops.matmul(x, y)], ones(8, 16), ones(16, 4)).cost()
    if backend.name == "jax":
        assert cost.flops >= 2 * 8 * 16 * 4
        assert cost.bytes >= 4 * (8 * 16 + 16 * 4 + 8 * 4)
        assert cost.peak_bytes > 0
    else:
        assert cost == Cost()
