"""Compiled functions: state, versions, arguments, results, errors."""

import collections
import contextlib
import copy
import functools

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers, ops

import handloom as hl
from handloom.errors import RetraceWarning, TraceError, VariableError

X = np.arange(6, dtype="float32").reshape(2, 3)


def close(actual, expected, rtol=1e-6):
    np.testing.assert_allclose(ops.convert_to_numpy(actual), ops.convert_to_numpy(expected), rtol=rtol, atol=1e-7)


def ones(*shape):
    return np.ones(shape, "float32")


# ------------------------------------------------------------------------ state


def test_a_bare_variable_is_read_and_written(eagerly):
    total = keras.Variable(ones(3))

    @hl.function
    def add(x):
        total.assign_add(x)
        return total * 2

    close(add(ones(3)), 4 * ones(3))
    close(add(ones(3)), 6 * ones(3))
    close(total, 3 * ones(3))


class Trainer:
    """Every kind of state that a step can have."""

    def __init__(self):
        keras.utils.set_random_seed(7)
        self.net = keras.Sequential(
            [layers.Dense(4, "tanh"), layers.BatchNormalization(), layers.Dropout(0.3, seed=1), layers.Dense(1)]
        )
        self.net.build((None, 3))
        self.optimizer = keras.optimizers.Adam(0.1)
        self.metric = keras.metrics.Mean()
        self.seed = keras.random.SeedGenerator(5)
        self.calls = keras.Variable(0, trainable=False, dtype="int32")

    def step(self, x, y):
        x = x + 0.1 * keras.random.normal(ops.shape(x), seed=self.seed)
        x = x + 0.1 * keras.random.uniform(ops.shape(x))
        loss = hl.minimize(lambda: ops.mean((self.net(x, training=True) - y) ** 2), self.net, self.optimizer)
        self.metric.update_state(loss)
        self.calls.assign_add(1)
        return {"loss": loss, "mean": self.metric.result()}

    def state(self):
        holders = (self.net, self.optimizer, self.metric)
        return [*(v for holder in holders for v in holder.variables), self.seed.state, self.calls]


def test_layers_optimizers_metrics_and_seeds_change_as_op_by_op():
    x, y = np.random.default_rng(0).normal(size=(2, 8, 3)).astype("float32")
    compiled, plain = Trainer(), Trainer()
    step = hl.function(compiled.step)
    keras.utils.set_random_seed(8)
    one = [step(x, y[:, :1]) for _ in range(2)]
    keras.utils.set_random_seed(8)
    with hl.run_eagerly(True):
        two = [hl.function(plain.step)(x, y[:, :1]) for _ in range(2)]
    for a, b in zip(one, two, strict=True):
        close(a["loss"], b["loss"], rtol=1e-4)
        close(a["mean"], b["mean"], rtol=1e-4)
    for a, b in zip(compiled.state(), plain.state(), strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-3, atol=1e-5, err_msg=a.path)
    assert len(step.traces) == 1
    assert step.traces[0].compiled


def test_a_change_from_outside_is_seen_by_the_next_call(eagerly):
    factor = keras.Variable(2.0)
    times = hl.function(lambda x: factor * x)
    close(times(ones(2)), 2 * ones(2))
    factor.assign(5.0)
    close(times(ones(2)), 5 * ones(2))


def test_a_change_from_inside_is_seen_at_once_outside(eagerly):
    layer = layers.Dense(1, kernel_initializer="zeros")
    layer.build((None, 3))

    @hl.function
    def fill(value):
        layer.kernel.assign(ops.full((3, 1), value))

    fill(np.float32(2))
    close(layer(ones(1, 3)), [[6]])
    fill(np.float32(3))
    close(layer(ones(1, 3)), [[9]])


def test_functions_share_their_variables(eagerly):
    shared = keras.Variable(1.0)
    double = hl.function(lambda: shared.assign(shared * 2))
    read = hl.function(lambda: shared + 0)
    double()
    close(read(), 2)
    double()
    close(read(), 4)


def test_within_a_call_a_variable_has_the_value_last_assigned(eagerly):
    v = keras.Variable(1.0)

    @hl.function
    def twice():
        v.assign(v * 3)
        first = v + 0
        v.assign(v + 1)
        return first, v + 0

    first, second = twice()
    close([first, second], [3, 4])
    close(v, 4)


def test_variables_can_change_places(eagerly):
    a, b = keras.Variable(ones(2)), keras.Variable(2 * ones(2))

    @hl.function
    def swap():
        old = ops.copy(a.value)
        a.assign(b)
        b.assign(old)

    for _ in range(3):
        swap()
    close(a, 2 * ones(2))
    close(b, ones(2))


def test_a_learning_rate_set_between_calls_counts_at_once_and_compiles_nothing(eagerly):
    w, optimizer = keras.Variable(1.0), keras.optimizers.SGD(0.1)
    step = hl.function(lambda: hl.minimize(lambda: 1.0 * w, w, optimizer))
    step()
    optimizer.learning_rate = 0.5
    step()
    close(w, 1 - 0.1 - 0.5)
    assert len(step.traces) <= 1


def test_a_metric_can_be_reset_between_calls(eagerly):
    mean = keras.metrics.Mean()

    @hl.function
    def update(x):
        mean.update_state(x)
        return mean.result()

    close(update(np.float32(1)), 1)
    close(update(np.float32(2)), 1.5)
    mean.reset_state()
    close(update(np.float32(5)), 5)


# -------------------------------------------------------------------- the function


def test_the_original_is_kept_and_the_function_looks_like_it():
    def cube(x):
        """To the third."""
        return x**3

    compiled = hl.function(cube)
    assert compiled.python_function is cube
    assert compiled.python_function(2) == 8
    assert (compiled.__name__, compiled.__doc__, compiled.__wrapped__) == ("cube", "To the third.", cube)
    assert isinstance(compiled, hl.Function)


def test_options_are_given_before_the_function():
    @hl.function(jit_compile="auto")
    def cube(x):
        return x**3

    close(cube(np.float32(2)), 8)


@pytest.mark.parametrize("jit_compile", [True, False, "auto"])
def test_every_way_to_compile_gives_the_same_numbers(jit_compile):
    v = keras.Variable(ones(3))

    @hl.function(jit_compile=jit_compile)  # On PyTorch, Inductor compiles for some seconds.
    def step(x):
        v.assign_add(ops.sin(x))
        return ops.sum(v * x)

    x = np.array([1, 2, 3], "float32")
    for _ in range(2):
        result = step(x)
    close(v, 1 + 2 * np.sin(x), rtol=1e-5)
    close(result, np.sum((1 + 2 * np.sin(x)) * x), rtol=1e-5)


@pytest.mark.backend("jax")
def test_without_xla_jax_runs_op_by_op_and_the_trace_says_why():
    double = hl.function(jit_compile=False)(lambda x: x * 2)
    close(double(ones(2)), 2 * ones(2))
    [trace] = double.traces
    assert not trace.compiled
    assert trace.reason == "eager: jit_compile=False, and JAX has no other compiler than XLA"


def test_another_value_of_jit_compile_is_an_error():
    with pytest.raises(ValueError, match="jit_compile takes True, False or \"auto\"; received 'xla'"):
        hl.function(jit_compile="xla")


def test_what_cannot_be_called_cannot_be_compiled():
    with pytest.raises(TypeError, match=r"hl\.function compiles a function; received 3"):
        hl.function(3)


def test_a_layer_and_a_partial_can_be_compiled(eagerly):
    layer = layers.Dense(1, kernel_initializer="ones")
    close(hl.function(layer)(ones(1, 3)), [[3]])
    close(hl.function(functools.partial(ops.multiply, 3.0))(ones(2)), 3 * ones(2))


# -------------------------------------------------------------------------- traces


def test_each_version_has_a_trace():
    @hl.function
    def scale(x, factor, *, training=False):
        return x * factor

    scale(ones(32, 8), 2, training=True)
    [trace] = scale.traces
    assert trace.signature == "x: float32[32,8], factor=2, training=True"
    assert trace.reason == "first call"
    assert trace.seconds > 0
    assert trace.compiled


def test_the_same_shapes_and_dtypes_are_one_version():
    double = hl.function(lambda x: x * 2)
    for value in (ones(2, 3), X, ops.convert_to_tensor(X), X.astype("float64"), X.T.copy().T):
        close(double(value), 2 * np.asarray(value))
    assert len(double.traces) == 1


CHANGES = {
    "shape": ((ones(2),), (ones(3),), "x: float32[2] -> float32[3]"),
    "rank": ((ones(2),), (ones(2, 1),), "x: float32[2] -> float32[2,1]"),
    "dtype": ((ones(2),), (np.ones(2, "int32"),), "x: float32[2] -> int32[2]"),
    "value": ((2,), (3,), "x: 2 -> 3"),
    "type of a value": ((2,), (2.0,), "x: 2 -> 2.0"),
    "value to array": ((2,), (np.float32(2),), "x: 2 -> float32[]"),
    "true is not one": ((1,), (True,), "x: 1 -> True"),
    "an argument more": ((2,), (2, 5), "y=5 is new"),
    "an argument less": ((2, 5), (2,), "y=5 is gone"),
    "inside a structure": (({"a": [2]},), ({"a": [3]},), "x['a'][0]: 2 -> 3"),
}


@pytest.mark.parametrize(("first", "second", "reason"), CHANGES.values(), ids=list(CHANGES))
def test_another_version_says_what_differs(first, second, reason):
    function = hl.function(lambda x, y=0: "done")
    for arguments in (first, second, first, second):
        function(*arguments)
    assert [trace.reason for trace in function.traces] == ["first call", reason]


def test_the_reason_is_the_difference_from_the_version_most_like_it():
    function = hl.function(lambda x, n: x * n)
    function(ones(2), 1)
    function(ones(3), 2)
    function(ones(3), 1)
    assert function.traces[-1].reason in ("n: 2 -> 1", "x: float32[2] -> float32[3]")


def test_the_kind_of_a_structure_makes_another_version():
    first = hl.function(lambda pair: pair[0])
    close(first((np.float32(1), np.float32(2))), 1)
    close(first([np.float32(1), np.float32(2)]), 1)
    assert first.traces[1].reason == "another structure or type of the same arguments"


def test_the_order_of_keywords_and_keys_makes_no_version():
    minus = hl.function(lambda a, b, options: a - b - options["c"] - options["d"])
    one, two = np.float32(1), np.float32(2)
    close(minus(a=one, b=two, options={"c": one, "d": two}), -4)
    close(minus(b=two, options={"d": two, "c": one}, a=one), -4)
    assert len(minus.traces) == 1


@settings(max_examples=5, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["float32", "int32"])), max_size=6))
def test_there_is_one_version_for_each_shape_and_dtype(kinds):
    double = hl.function(lambda x: x * 2)
    for size, dtype in kinds:
        close(double(np.arange(size, dtype=dtype)), 2 * np.arange(size))
    assert len(double.traces) == len(set(kinds))


def test_a_version_for_two_is_not_used_for_two_point_zero():
    cube = hl.function(lambda x: x**3)
    dtypes = [keras.backend.standardize_dtype(cube(x).dtype) for x in (2, 2.0, np.float32(2), 2, 2.0, np.float32(3))]
    assert dtypes == ["int32", "float32", "float32"] * 2
    assert len(cube.traces) == 3


# ---------------------------------------------------------------- the sixth value


def test_the_sixth_value_of_one_argument_warns_and_only_that():
    power = hl.function(lambda x, n: x**n)
    for n in range(5):
        power(ones(2), n)
    with pytest.warns(RetraceWarning, match=r"compiled for 6 values of the argument 'n': 0, 1, 2, 3, 4, 5\.") as warned:
        power(ones(2), 5)
    assert "np.float32(n)" in str(warned[0].message)
    assert "keras.Variable" in str(warned[0].message)
    assert warned[0].filename == __file__
    # From here on, a warning would be an error.
    power(ones(3), 5)
    power(ones(3), 0)
    power(ones(2), 6)


def test_values_of_two_arguments_are_counted_apart():
    add = hl.function(lambda a, b: a + b)
    for n in range(5):
        add(n, 0)
        add(0, n)


def test_arrays_never_warn():
    double = hl.function(lambda x: x * 2)
    for n in range(8):
        double(np.zeros(n, "float32"))


def test_a_value_inside_a_structure_is_named():
    function = hl.function(lambda config: config["rate"] * 2)
    for n in range(5):
        function({"rate": n})
    with pytest.warns(RetraceWarning, match=r"the argument \"config\['rate'\]\""):
        function({"rate": 5})


# ------------------------------------------------------------------------ arguments


def test_arguments_come_in_any_structure(eagerly):
    Pair = collections.namedtuple("Pair", "left right")

    @hl.function
    def total(pair, more, *, last):
        return pair.left + pair.right["a"] + sum(more) + last

    one = np.float32(1)
    close(total(Pair(one, {"a": one}), [one, (one)], last=one), 5)


def test_defaults_and_gathered_arguments_are_pythons_own(eagerly):
    @hl.function
    def gather(x, *others, scale=2.0, **named):
        return (x + sum(others) + sum(named.values())) * scale

    one = np.float32(1)
    close(gather(one), 2)
    close(gather(one, one, one), 6)
    close(gather(one, one, a=one, scale=3.0), 9)


def test_a_wrong_call_is_pythons_own_error(eagerly):
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        hl.function(lambda x: x)()


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8", "int32", "uint8", "bool"])
def test_a_dtype_is_kept(dtype, eagerly):
    result = hl.function(lambda x: x)(np.ones(2, dtype))
    assert keras.backend.standardize_dtype(result.dtype) == dtype


def test_floats_of_64_bits_become_the_usual_ones(eagerly):
    for value in (np.ones(2), np.float64(1)):
        result = hl.function(lambda x: x)(value)
        assert keras.backend.standardize_dtype(result.dtype) == "float32"


def test_inside_all_data_are_tensors(eagerly):
    seen = []

    @hl.function
    def look(x, y, z):
        seen.append([ops.is_tensor(leaf) for leaf in (x, y, z)])

    look(X, np.float32(1), ops.ones(2))
    assert seen[-1] == [True, True, True]


LAYOUTS = {
    "reversed": X[:, ::-1],
    "transposed": X.T,
    "strided": np.arange(12, dtype="float32").reshape(2, 6)[:, ::2],
    "broadcast": np.broadcast_to(X[0], (4, 3)),
    "foreign byte order": X.astype(X.dtype.newbyteorder()),
    "empty": X[:0],
}


@pytest.mark.parametrize("array", LAYOUTS.values(), ids=list(LAYOUTS))
def test_an_array_may_lie_in_memory_as_it_likes(array, eagerly):
    flat = hl.function(lambda x: ops.reshape(x * 2, (-1,)))
    close(flat(array), np.ravel(array * 2))


def test_a_read_only_array_is_data_like_any_other(eagerly):
    array = X.copy()
    array.setflags(write=False)
    close(hl.function(lambda x: x + 1)(array), X + 1)


def test_a_tensor_may_lie_otherwise_than_the_one_compiled_for():
    flat = hl.function(lambda x: ops.reshape(x, (-1,)))
    square = ops.reshape(ops.arange(9), (3, 3))
    close(flat(square), np.arange(9))
    close(flat(ops.transpose(square)), np.arange(9).reshape(3, 3).T.ravel())
    close(flat(square), np.arange(9))


def test_variables_are_arguments_too(eagerly):
    a, b = keras.Variable(ones(2)), keras.Variable(2 * ones(2))

    @hl.function
    def bump(v):
        v.assign_add(ones(2))
        return v * 10

    for v, expected in ((a, 20), (b, 30), (a, 30), (b, 40)):
        close(bump(v), expected * ones(2))
    close(a, 3 * ones(2))


def test_variables_and_data_mix_as_arguments(eagerly):
    a, b = keras.Variable(1.0), keras.Variable(2.0)
    times = hl.function(lambda x, v: x * v)
    for v, expected in ((a, 3), (b, 6), (a, 3), (b, 6)):
        close(times(np.float32(3), v), expected)


def test_layers_and_optimizers_are_arguments_too(eagerly):
    @hl.function
    def step(layer, optimizer, x):
        return hl.minimize(lambda: ops.sum(layer(x)), layer, optimizer)

    for _ in range(2):
        layer = layers.Dense(1, use_bias=False, kernel_initializer="ones")
        layer.build((None, 3))
        step(layer, keras.optimizers.SGD(0.5), ones(1, 3))
        close(layer.kernel, 0.5 * ones(3, 1))


def test_the_value_of_a_variable_is_data(eagerly):
    v = keras.Variable(1.0)
    double = hl.function(lambda x: x * 2)
    close(double(v.value), 2)
    v.assign(4.0)
    close(double(v.value), 8)
    assert len(double.traces) <= 1


def test_an_argument_that_cannot_be_told_from_others_is_an_error(eagerly):
    function = hl.function(lambda x, names: x)
    with pytest.raises(TypeError, match=r"neither data nor hashable.*Pass tensors, arrays, numbers, strings"):
        function(ones(2), {"a", "b"})


# --------------------------------------------------------------------------- methods


class Counter:
    def __init__(self, start):
        self.count = keras.Variable(float(start))

    @hl.function
    def step(self, x):
        """Counts."""
        self.count.assign_add(x)
        return self.count + 0


def test_a_method_has_versions_of_its_own_for_each_instance(eagerly):
    one, two = Counter(0), Counter(10)
    for _ in range(2):
        one.step(np.float32(1))
        two.step(np.float32(2))
    close([one.count, two.count], [2, 14])
    assert one.step is one.step
    assert one.step is not two.step
    assert len(one.step.traces) == (0 if eagerly else 1)


def test_on_the_class_a_method_is_the_function_itself():
    assert isinstance(Counter.step, hl.Function)
    assert Counter.step.__doc__ == "Counts."
    close(Counter.step(Counter(1), np.float32(2)), 3)


def test_a_method_may_call_the_one_it_overrides(eagerly):
    class Loud(Counter):
        @hl.function
        def step(self, x):
            return super().step(x) * 100

    loud = Loud(0)
    for expected in (100, 200, 300):
        close(loud.step(np.float32(1)), expected)


def test_a_method_under_two_names_is_compiled_under_one():
    class Both:
        def plain(self, x):
            return x * 2

        fast = hl.function(plain)

    both = Both()
    close(both.fast(np.float32(2)), 4)
    assert not isinstance(both.plain, hl.Function)
    assert both.fast is both.fast


def test_a_method_may_be_defined_anew():
    class Changing:
        pass

    changing = Changing()
    for n in range(20):
        Changing.step = hl.function(lambda self, n=n: n)
        if n % 2 == 0:  # What is not used is gone at once, and the next one may be where it was.
            close(changing.step(), n)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copied_instance_has_functions_of_its_own(copied):
    first = Counter(0)
    first.step(np.float32(1))
    second = copied(first)
    second.count = keras.Variable(10.0)
    close(second.step(np.float32(1)), 11)
    close(first.count, 1)


def test_a_layers_method_is_no_part_of_the_layer(eagerly):
    class Scale(layers.Layer):
        def __init__(self):
            super().__init__()
            self.factor = self.add_weight(shape=(), initializer="ones")

        @hl.function
        def step(self, x):
            self.factor.assign_add(1.0)
            return self(x)

        def call(self, x):
            return x * self.factor

    layer = Scale()
    close(layer.step(np.float32(3)), 6)
    close(layer.step(np.float32(3)), 9)
    assert len(layer.weights) == 1


def test_a_models_method_makes_its_layers(eagerly):
    class Net(hl.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(1, kernel_initializer="ones")

        def call(self, x):
            return self.dense(x)

        @hl.function
        def score(self, x):
            return ops.sum(self(x))

    net = Net()
    close(net.score(ones(2, 3)), 6)
    net.dense.kernel.assign(2 * ones(3, 1))
    close(net.score(ones(2, 3)), 12)


def test_a_static_method_needs_no_instance():
    class Tools:
        @staticmethod
        @hl.function
        def double(x):
            return x * 2

        @hl.function
        @staticmethod
        def triple(x):
            return x * 3

    close([Tools.double(np.float32(1)), Tools().double(np.float32(1)), Tools().triple(np.float32(1))], [2, 2, 3])


# --------------------------------------------------------- variables that are created


def test_layers_are_made_in_the_first_call(eagerly):
    layer = layers.Dense(2, kernel_initializer="ones")
    function = hl.function(layer)
    close(function(X), X.sum(axis=1, keepdims=True) * ones(2, 2))
    close(function(X), X.sum(axis=1, keepdims=True) * ones(2, 2))
    assert len(layer.variables) == 2


def test_optimizer_slots_are_made_in_the_first_call(eagerly):
    w, optimizer = keras.Variable(ones(2)), keras.optimizers.Adam(0.1)

    @hl.function
    def step():
        optimizer.apply([ops.ones(2)], [w])

    for _ in range(3):
        step()
    # With a constant gradient Adam goes down by the learning rate at each step.
    close(w, 0.7 * ones(2), rtol=1e-4)
    close(optimizer.iterations, 3)


@pytest.mark.parametrize("value", [2.5, [1.0, 2.0], np.array([[1.5]], "float32"), np.float32(3), 7, True])
def test_a_variable_of_a_known_value_may_be_made_in_the_first_call(value, eagerly):
    outside = keras.Variable(value, trainable=False)
    made = []

    @hl.function
    def read():
        if not made:
            made.append(keras.Variable(value, trainable=False))
        return made[0].value

    close(read(), value)
    close(read(), value)
    assert (made[0].dtype, tuple(made[0].shape)) == (outside.dtype, tuple(outside.shape))


def test_a_whole_trainer_may_be_made_in_the_first_call(eagerly):
    parts = {}

    @hl.function
    def step(x):
        if not parts:
            parts["layer"] = layers.Dense(1, use_bias=False, kernel_initializer="ones")
            parts["optimizer"] = keras.optimizers.SGD(0.5, momentum=0.5)
            parts["metric"] = keras.metrics.Mean()
        loss = hl.minimize(lambda: ops.sum(parts["layer"](x)), parts["layer"], parts["optimizer"])
        parts["metric"].update_state(loss)
        return parts["metric"].result()

    close(step(ones(1, 1)), 1)
    close(step(ones(1, 1)), 0.75)  # The mean of 1 and 0.5.
    close(parts["layer"].kernel, [[1 - 0.5 - 0.75]])


def test_a_variable_made_later_is_an_error_and_the_function_goes_on():
    made = []

    @hl.function
    def step(x):
        if x.shape[0] > 2:
            made.append(keras.Variable(1.0, name="late"))
        return x * 2

    close(step(ones(2)), 2 * ones(2))
    with pytest.raises(VariableError, match=r"step creates variables after its first call: late\..*outside of the"):
        step(ones(3))
    close(step(ones(2)), 2 * ones(2))


def make_variable(x):
    return keras.Variable(1.0) * x


def make_layer(x):
    return layers.Dense(2)(x)


@pytest.mark.parametrize("make", [make_variable, make_layer])
def test_a_variable_made_on_every_call_is_an_error(make):
    with pytest.raises(VariableError, match=r"creates variables on every call.*Create them once, outside"):
        hl.function(make)(ones(2, 3))


# ---------------------------------------------------------------------------- nesting


def test_inside_another_function_it_becomes_part_of_that(eagerly):
    count = keras.Variable(0.0)

    @hl.function
    def inner(x):
        count.assign_add(1.0)
        return x * 2

    @hl.function
    def outer(x):
        return inner(inner(x)) + count

    close(outer(np.float32(1)), 4 + 2)
    close(outer(np.float32(1)), 4 + 4)
    close(count, 4)
    if not eagerly:
        assert inner.traces == []


def test_it_is_differentiated_like_any_function(eagerly):
    factor = keras.Variable(2.0)
    square = hl.function(lambda x: factor * x**2)
    close(hl.grad(square)(3.0), 12)
    close(hl.grad(hl.grad(square))(3.0), 4)
    close(hl.grad(lambda: square(np.float32(3)), wrt=factor)(), 9)
    close(hl.function(hl.grad(square))(np.float32(3)), 12)
    assert square.traces == []


def test_functions_and_gradients_nest_at_will(eagerly):
    v = keras.Variable(2.0)

    @hl.function
    def cube(x):
        v.assign_add(1.0)
        return v * x**3

    @hl.function
    def slope(x):
        return hl.grad(cube)(x)

    @hl.function
    def both(x):
        return hl.value_and_grad(slope)(x)

    value, curvature = both(np.float32(2))
    close(v, 3)
    close([value, curvature], [3 * 3 * 4, 3 * 6 * 2])


@pytest.mark.backend("tensorflow")
def test_python_control_flow_is_compiled_in_a_nested_function_too():
    @hl.function
    def positive(x):
        if ops.sum(x) > 0:
            return x
        return -x

    outer = hl.function(lambda x: positive(x) * 2)
    close(outer(ones(2)), 2 * ones(2))
    close(outer(-ones(2)), 2 * ones(2))


# ---------------------------------------------------------------------------- results


def test_numbers_become_tensors_and_the_rest_stays_what_it_is(eagerly):
    marker = object()
    Pair = collections.namedtuple("Pair", "left right")

    @hl.function
    def answer(x):
        return {"pair": Pair(x, [1, 2.5, True]), "word": "yes", "nothing": None, "object": marker, "empty": ()}

    result = answer(ones(2))
    assert isinstance(result["pair"], Pair)
    numbers = result["pair"].right
    assert all(map(ops.is_tensor, [result["pair"].left, *numbers]))
    assert [keras.backend.standardize_dtype(n.dtype) for n in numbers] == ["int32", "float32", "bool"]
    close(numbers[1], 2.5)
    assert (result["word"], result["nothing"], result["object"], result["empty"]) == ("yes", None, marker, ())


def test_nothing_may_be_returned(eagerly):
    v = keras.Variable(0.0)

    @hl.function
    def step():
        v.assign(5.0)

    assert step() is None
    close(v, 5)


def test_an_array_that_is_returned_becomes_a_tensor(eagerly):
    result = hl.function(lambda: np.arange(3))()
    assert ops.is_tensor(result)
    close(result, [0, 1, 2])


def test_a_variable_that_is_returned_comes_out_as_its_value_then(eagerly):
    v = keras.Variable(ones(2))

    @hl.function
    def bump():
        v.assign_add(ones(2))
        return v, v.value

    first = bump()
    second = bump()
    v.assign(np.zeros(2))
    for leaf in first:
        assert ops.is_tensor(leaf)
        assert not isinstance(leaf, keras.Variable)
        close(leaf, 2 * ones(2))
    close(second[0], 3 * ones(2))


def test_results_are_not_changed_by_later_calls(eagerly):
    v, total = keras.Variable(np.zeros(1000, "float32")), keras.metrics.Sum()

    @hl.function
    def step(x):
        v.assign_add(x)
        total.update_state(x)
        return x, v.value, v * 1, ops.reshape(v, (10, 100)), total.result()

    results = [step(n * ones(1000)) for n in (1, 2, 3)]
    for n, (x, value, times, reshaped, summed) in zip((1, 2, 3), results, strict=True):
        running = n * (n + 1) / 2
        close(x, n * ones(1000))
        close(value, running * ones(1000))
        close(times, running * ones(1000))
        close(reshaped, running * ones(10, 100))
        close(summed, running * 1000)


def test_a_result_does_not_follow_the_array_it_came_from(eagerly):
    array = ones(1000)
    result = hl.function(lambda x: x)(array)
    array[:] = 5
    close(result, ones(1000))


def test_values_read_before_a_call_stay(eagerly):
    v = keras.Variable(ones(1000))
    step = hl.function(lambda: v.assign_add(ones(1000)))
    kept = v.numpy()
    step()
    again = v.numpy()
    step()
    close(kept, ones(1000))
    close(again, 2 * ones(1000))


def test_an_argument_kept_in_a_variable_is_neither_changed_nor_lost(eagerly):
    v = keras.Variable(np.zeros(1000, "float32"))
    keep = hl.function(v.assign)
    step = hl.function(lambda: v.assign_add(ones(1000)))
    array, tensor = ones(1000), ops.ones(1000)
    for data in (array, tensor):
        keep(data)
        step()
        close(data, ones(1000))
        close(v, 2 * ones(1000))
    keep(array)
    array[:] = 9
    close(v, ones(1000))


def test_variables_made_from_one_array_go_their_own_ways(eagerly):
    array = ones(1000)
    one, two = keras.Variable(array), keras.Variable(array)
    one.assign(two)
    step = hl.function(lambda: one.assign_add(ones(1000)))
    step()
    step()
    close(array, ones(1000))
    close(one, 3 * ones(1000))
    close(two, ones(1000))


# ------------------------------------------------------------------------- op by op


def test_run_eagerly_is_a_function():
    known = []
    look = hl.function(lambda x: known.append(is_known(x)))
    look(ones(2))
    hl.run_eagerly(True)
    look(ones(2))
    hl.run_eagerly(False)
    look(ones(3))
    assert known[0] is False
    assert known[-1] is False
    assert known.count(True) == 1


def is_known(x):
    try:
        return bool(ops.convert_to_numpy(x).sum() > 0)
    except Exception:
        return False


def test_run_eagerly_is_a_context_manager():
    function = hl.function(lambda x: x * 2)
    with hl.run_eagerly(True):
        close(function(ones(2)), 2 * ones(2))
        with hl.run_eagerly(False):
            function(ones(3))
        function(ones(4))
    function(ones(5))
    assert [trace.signature for trace in function.traces] == ["x: float32[3]", "x: float32[5]"]


def test_run_eagerly_ends_with_its_block_even_by_an_error():
    with contextlib.suppress(RuntimeError), hl.run_eagerly(True):
        raise RuntimeError
    function = hl.function(lambda x: x)
    function(ones(2))
    assert len(function.traces) == 1


def test_a_version_compiled_before_is_used_again_after():
    v = keras.Variable(0.0)
    step = hl.function(v.assign_add)
    step(np.float32(1))
    with hl.run_eagerly(True):
        step(np.float32(2))
    step(np.float32(3))
    close(v, 6)
    assert len(step.traces) == 1


@pytest.mark.parametrize("value", [1, "yes", None])
def test_run_eagerly_takes_a_bool(value):
    with pytest.raises(TypeError, match=r"hl\.run_eagerly takes True or False; received"):
        hl.run_eagerly(value)


def test_python_runs_when_a_step_is_traced_and_each_time_op_by_op():
    calls = []
    step = hl.function(lambda x: calls.append(1))
    step(ones(2))
    traced = len(calls)
    step(ones(2))
    assert len(calls) == traced
    with hl.run_eagerly(True):
        step(ones(2))
        step(ones(2))
    assert len(calls) == traced + 2


# ---------------------------------------------------------------------------- errors


class OwnError(Exception):
    """Of a kind that cannot be made anew from its text."""

    def __init__(self, code, what):
        super().__init__(code, what)
        self.code = code


def test_an_error_of_the_steps_own_comes_out_as_it_was_raised(eagerly):
    @hl.function
    def step(x):
        raise OwnError(42, "broken")

    with pytest.raises(OwnError, match="broken") as raised:
        step(ones(2))
    assert raised.value.code == 42


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_error_the_function_and_what_it_made_are_usable(error, eagerly):
    layer, optimizer, broken = layers.Dense(1, use_bias=False), keras.optimizers.Adam(0.1), [True]

    @hl.function
    def step(x):
        y = layer(x)
        if broken:
            raise error("broken")
        optimizer.apply([ops.ones((3, 1))], layer.trainable_variables)
        return ops.sum(y)

    with pytest.raises(error, match="broken"):
        step(ones(2, 3))
    before = layer.kernel.numpy()
    assert np.isfinite(before).all()
    broken.clear()
    close(step(ones(2, 3)), 2 * before.sum(), rtol=1e-5)
    close(layer.kernel, before - 0.1, rtol=1e-4)
    assert [trace.compiled for trace in step.traces] == ([] if eagerly else [True])


@pytest.mark.backend("jax", "tensorflow")
def test_an_error_while_tracing_leaves_variables_as_they_were():
    v = keras.Variable(1.0)

    @hl.function
    def step(x):
        v.assign_add(1.0)
        return ops.matmul(x, ones(4, 2))

    with pytest.raises(Exception, match=r"(?i)dimension|shape"):
        step(ones(2, 3))
    close(v, 1)
    step(ones(2, 4))
    close(v, 2)


def test_an_error_in_a_later_version_leaves_the_others_usable(eagerly):
    v = keras.Variable(0.0)

    @hl.function
    def step(x):
        if x.shape[0] == 3:
            raise ValueError("three")
        v.assign_add(1.0)

    step(ones(2))
    with pytest.raises(ValueError, match="three"):
        step(ones(3))
    step(ones(2))
    step(ones(4))
    close(v, 3)


# --------------------------------------------------------------- Python over tensors


def branch(x):
    if ops.sum(x) > 0:
        return x
    return -x


def loop(x):
    while ops.sum(x) < 100:
        x = x * 2
    return x


def count(n):
    total = n * 0
    for i in range(n):
        total = total + i * i
    return total


PYTHON = {
    "if": (branch, ones(2), -ones(2), "if ops.sum(x) > 0:"),
    "while": (loop, ones(2), 50 * ones(2), "while ops.sum(x) < 100:"),
    "range": (count, np.int32(5), np.int32(7), "for i in range(n):"),
}


@pytest.mark.backend("jax", "torch")
@pytest.mark.parametrize(("python", "one", "two", "line"), PYTHON.values(), ids=list(PYTHON))
def test_python_control_flow_over_a_tensor_is_an_error_that_names_the_line(python, one, two, line):
    with pytest.raises(TraceError) as raised:
        hl.function(python)(one)
    message = str(raised.value)
    first = python.__code__.co_firstlineno
    assert any(f"{__file__}, line {number}: {line}" in message for number in range(first, first + 5))
    for cure in ("keras.ops.cond", "keras.ops.while_loop", "keras.ops.fori_loop", "hl.run_eagerly(True)"):
        assert cure in message


@pytest.mark.backend("tensorflow")
@pytest.mark.parametrize(("python", "one", "two", "line"), PYTHON.values(), ids=list(PYTHON))
def test_python_control_flow_over_a_tensor_is_compiled(python, one, two, line):
    compiled = hl.function(python)
    for value in (one, two):
        with hl.run_eagerly(True):
            expected = compiled(value)
        close(compiled(value), expected)
    assert len(compiled.traces) == 1


def test_python_control_flow_over_a_tensor_works_op_by_op():
    with hl.run_eagerly(True):
        close(hl.function(count)(np.int32(4)), 0 + 1 + 4 + 9)


def to_numpy(x):
    return x + ops.convert_to_numpy(x).sum()


@pytest.mark.backend("jax", "tensorflow")
def test_a_tensor_turned_into_numpy_is_an_error_that_names_the_line():
    with pytest.raises(TraceError) as raised:
        hl.function(to_numpy)(ones(2))
    assert f"{__file__}, line {to_numpy.__code__.co_firstlineno + 1}: return x + ops.conv" in str(raised.value)


def test_control_flow_by_operations_is_compiled(eagerly):
    @hl.function
    def mixed(x, n):
        a = ops.cond(ops.sum(x) > 0, lambda: x, lambda: -x)
        _, b = ops.while_loop(lambda i, s: i < n, lambda i, s: (i + 1, s + i * i), (0, 0))
        c = ops.fori_loop(0, n, lambda i, s: s + i, ops.zeros((), "int32"))
        return a, b, c

    for sign, n in ((1, 4), (-1, 6)):
        a, b, c = mixed(sign * ones(2), np.int32(n))
        close(a, ones(2))
        close(b, sum(i * i for i in range(n)))
        close(c, sum(range(n)))
    assert len(mixed.traces) == (0 if eagerly else 1)


# ------------------------------------------------------------------------ randomness

DRAWS = {
    "normal": lambda seed: keras.random.normal((4,), seed=seed),
    "uniform": lambda seed: keras.random.uniform((4,), seed=seed),
    "randint": lambda seed: keras.random.randint((8,), 0, 1000, seed=seed),
    "truncated normal": lambda seed: keras.random.truncated_normal((4,), seed=seed),
    "categorical": lambda seed: keras.random.categorical(ops.ones((2, 1000)), 4, seed=seed),
    "dropout": lambda seed: keras.random.dropout(ops.ones(64), 0.5, seed=seed),
    "shuffle": lambda seed: keras.random.shuffle(ops.arange(64), seed=seed),
}


@pytest.mark.parametrize(("name", "seed"), [*((name, 11) for name in DRAWS), ("normal", None), ("dropout", None)])
def test_random_numbers_are_new_in_each_call_and_the_same_as_op_by_op(name, seed):
    draw = DRAWS[name]

    def run():
        keras.utils.set_random_seed(3)
        generator = None if seed is None else keras.random.SeedGenerator(seed)
        function = hl.function(lambda: (draw(generator), draw(generator)))
        return [ops.convert_to_numpy(drawn) for _ in range(3) for drawn in function()]

    compiled = run()
    with hl.run_eagerly(True):
        plain = run()
    np.testing.assert_allclose(compiled, plain, rtol=1e-5, atol=1e-7)
    assert len({drawn.tobytes() for drawn in compiled}) == 6


def test_a_number_as_seed_gives_the_same_each_time(eagerly):
    draw = hl.function(lambda: keras.random.normal((4,), seed=5))
    close(draw(), draw())
    close(draw(), keras.random.normal((4,), seed=5))


def test_a_dropout_layer_drops_anew_in_each_call_and_as_op_by_op():
    def run():
        layer = layers.Dropout(0.5, seed=2)
        function = hl.function(lambda x: layer(x, training=True))
        return np.stack([ops.convert_to_numpy(function(ones(64))) for _ in range(3)])

    compiled = run()
    with hl.run_eagerly(True):
        np.testing.assert_array_equal(compiled, run())
    assert set(np.unique(compiled)) == {0, 2}
    assert len({drawn.tobytes() for drawn in compiled}) == 3


def test_the_state_of_a_seed_goes_on_where_it_was(eagerly):
    seed = keras.random.SeedGenerator(1)
    draw = hl.function(lambda: keras.random.normal((4,), seed=seed))
    first, second = ops.convert_to_numpy(draw()), ops.convert_to_numpy(draw())
    seed.state.assign([1, 0])
    np.testing.assert_array_equal([ops.convert_to_numpy(draw()), ops.convert_to_numpy(draw())], [first, second])
