"""Compiled functions: state, versions, arguments, results, errors."""

import collections
import contextlib
import copy
import functools
import random
import re

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.errors import HandloomWarning, RetraceWarning, TraceError, VariableError
from tests.models import built, compiled, subclassed
from tests.numbers import close, numpy, ones, same

X = np.arange(6, dtype="float32").reshape(2, 3)
ONE, TWO, THREE = (np.float32(n) for n in (1, 2, 3))


# ------------------------------------------------------------------------ state


def test_function_writes_variables_that_layers_and_other_functions_read_at_once(eagerly):
    layer = built(layers.Dense(1, kernel_initializer="zeros"))
    fill = hl.function(lambda value: layer.kernel.assign(ops.full((3, 1), value)))
    call = hl.function(layer)
    for value in (2, 3):
        fill(np.float32(value))
        close(layer(ones(1, 3)), [[3 * value]])
        close(call(ones(1, 3)), [[3 * value]])


def test_function_reads_the_last_value_assigned_within_a_call(eagerly):
    a, b = keras.Variable(ones(2)), keras.Variable(2 * ones(2))

    @hl.function
    def swap_and_double():
        old = ops.copy(a.value)
        a.assign(b)
        b.assign(old)
        a.assign(a * 2)
        return a + 0

    close([swap_and_double()[0] for _ in range(3)], [4, 2, 8])
    close([a, b], [[8, 8], [2, 2]])


# -------------------------------------------------------------------- the function


class Remembering(layers.Layer):
    """Keeps a tensor of the last call."""

    last = None

    def call(self, x):
        before, self.last = self.last, x * 1.0
        return x if before is None else x + before


def test_function_refuses_a_tensor_that_a_layer_keeps_from_an_earlier_trace():
    step = hl.function(Remembering())
    with pytest.raises(TraceError, match=r"outside of the function that computed it.*attribute.*HL102") as raised:
        [step(x) for x in (ones(3), ones(1, 3))]
    if keras.backend.backend() != "torch":  # Its graphs do not know the line of every use.
        assert "return x if before is None else x + before" in str(raised.value)


class MadeInCall(layers.Layer):
    """Makes a table when it is first called, which may be on shapes alone."""

    table = None

    def call(self, x):
        if self.table is None:
            self.table = ops.arange(1, x.shape[-1] + 1, dtype="float32")
        return x * self.table


def test_fit_names_the_line_that_uses_a_tensor_which_an_unbuilt_layer_has_made_on_shapes():
    model = compiled(hl.Sequential([MadeInCall(), layers.Dense(1, kernel_initializer="ones")]))
    with (
        contextlib.nullcontext()
        if keras.backend.backend() == "jax"
        else pytest.raises(
            TraceError,
            match=r"outside of the function that computed it \(.*: return x \* self\.table\).*`build`.*HL102",
        )
    ):
        close(model.fit(ones(4, 2), ones(4, 1), verbose=0).history["loss"], [(3 - 1) ** 2])


class RowByRow(layers.Layer):
    """Uses a tensor as Python's sequences are used."""

    def call(self, x):
        first, *_ = x
        return ops.stack([row - first for row in x]) * len(x)


@pytest.mark.parametrize("call", ["predict", "function"])
def test_function_and_predict_compile_a_layer_that_iterates_over_a_tensor_and_takes_its_length(call, eagerly):
    model, x = subclassed(RowByRow(), inputs=None), X.reshape(3, 2)
    result = hl.function(model)(x) if call == "function" else compiled(model).predict(x, verbose=0)
    close(result, 3 * (x - x[0]))


def test_function_looks_like_the_original():
    def cube(x):
        """To the third."""
        return x**3

    compiled = hl.function(cube)
    assert (compiled.__name__, compiled.__doc__, compiled.__wrapped__) == ("cube", "To the third.", cube)
    assert isinstance(compiled, hl.Function)


@pytest.mark.parametrize("jit_compile", [True, False, "auto"])
def test_function_gives_the_same_numbers_for_every_jit_compile(jit_compile):
    v = keras.Variable(ones(3))

    @hl.function(jit_compile=jit_compile)  # On PyTorch, Inductor compiles for some seconds.
    def step(x):
        v.assign_add(ops.sin(x))
        return ops.sum(v * x)

    x = np.array([1, 2, 3], "float32")
    for _ in range(2):
        result = step(x)
    close(v, 1 + 2 * np.sin(x))
    close(result, np.sum((1 + 2 * np.sin(x)) * x))


@pytest.mark.backend("jax")
def test_function_without_xla_runs_eagerly_on_jax_and_its_trace_says_why():
    double = hl.function(jit_compile=False)(lambda x: x * 2)
    close(double(ones(2)), 2 * ones(2))
    [trace] = double.traces
    assert not trace.compiled
    assert trace.reason == "eager: jit_compile=False, and JAX has no other compiler"


def test_function_refuses_another_jit_compile_and_anything_but_a_callable():
    with pytest.raises(ValueError, match="jit_compile takes True, False or \"auto\"; received 'xla'"):
        hl.function(jit_compile="xla")
    with pytest.raises(TypeError, match=r"hl\.function compiles a function; received 3"):
        hl.function(3)


def test_function_compiles_a_layer_and_a_partial(eagerly):
    close(hl.function(layers.Dense(1, kernel_initializer="ones"))(ones(1, 3)), [[3]])
    close(hl.function(functools.partial(ops.multiply, 3.0))(ones(2)), 3 * ones(2))


# -------------------------------------------------------------------------- traces


def test_function_has_a_trace_for_each_version():
    @hl.function
    def scale(x, factor, *, training=False):
        return x * factor

    scale(ones(32, 8), 2, training=True)
    [trace] = scale.traces
    assert trace.signature == "x: float32[32,8], factor=2, training=True"
    assert trace.reason == "first call"
    assert trace.seconds > 0
    assert trace.compiled


def test_function_has_one_version_for_arrays_and_tensors_of_one_shape_and_dtype():
    double = hl.function(lambda x: x * 2)
    for value in (ones(2, 3), X, ops.convert_to_tensor(X), X.astype("float64"), X.T.copy().T):
        close(double(value), 2 * numpy(value))
    assert len(double.traces) == 1


CHANGES = {
    "shape": ((ones(2),), (ones(3),), "x: float32[2] -> float32[3]"),
    "rank": ((ones(2),), (ones(2, 1),), "x: float32[2] -> float32[2,1]"),
    "dtype": ((ones(2),), (np.ones(2, "int32"),), "x: float32[2] -> int32[2]"),
    "value": ((2,), (3,), "x: 2 -> 3"),
    "type of a value": ((2,), (2.0,), "x: 2 -> 2.0"),
    "value to array": ((2,), (TWO,), "x: 2 -> float32[]"),
    "true is not one": ((1,), (True,), "x: 1 -> True"),
    "an argument more": ((2,), (2, 5), "y=5 is new"),
    "an argument less": ((2, 5), (2,), "y=5 is gone"),
    "inside a structure": (({"a": [2]},), ({"a": [3]},), "x['a'][0]: 2 -> 3"),
    "kind of a structure": (((ONE, TWO),), ([ONE, TWO],), "another structure, type or strategy of the same arguments"),
}


@pytest.mark.parametrize(("first", "second", "reason"), CHANGES.values(), ids=list(CHANGES))
def test_function_says_what_differs_in_another_version(first, second, reason):
    function = hl.function(lambda x, y=0: "done")
    for arguments in (first, second, first, second):
        function(*arguments)
    assert [trace.reason for trace in function.traces] == ["first call", reason]


def test_function_compares_another_version_with_the_most_similar_one():
    function = hl.function(lambda x, n: x * n)
    function(ones(2), 1)
    function(ones(3), 2)
    function(ones(3), 1)
    assert function.traces[-1].reason in ("n: 2 -> 1", "x: float32[2] -> float32[3]")


def test_function_ignores_the_order_of_keywords_and_keys():
    minus = hl.function(lambda a, b, options: a - b - options["c"] - options["d"])
    close(minus(a=ONE, b=TWO, options={"c": ONE, "d": TWO}), -4)
    close(minus(b=TWO, options={"d": TWO, "c": ONE}, a=ONE), -4)
    assert len(minus.traces) == 1


def test_function_warns_at_the_sixth_value_of_an_argument_and_only_then():
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


def test_function_counts_the_values_of_each_argument_and_no_shapes():
    add, double = hl.function(lambda a, b: a + b), hl.function(lambda x: x * 2)
    for n in range(5):
        add(n, 0)
        add(0, n)
    for n in range(8):
        double(ones(n))  # Shapes have a limit of their own.


def test_function_names_a_sixth_value_inside_a_structure():
    function = hl.function(lambda config: config["rate"] * 2)
    for n in range(5):
        function({"rate": n})
    with pytest.warns(RetraceWarning, match=r"the argument \"config\['rate'\]\""):
        function({"rate": 5})


def test_function_warns_at_the_tenth_shape_names_the_argument_and_only_then():
    total = hl.function(lambda x, y, flag: ops.sum(x) + ops.sum(y))
    for n in range(1, 10):
        total(ones(n, 3), ones(2), flag=True)
    total(ones(1), ones(2), flag=False)  # Not only another shape.
    words = r"lambda> has been compiled for 10 shapes of its arguments: x: float32\[1,3\], .*, float32\[10,3\]\. Each"
    with pytest.warns(RetraceWarning, match=rf"{words}.* pad .*drop_remainder=True.*HL129") as warned:
        last = total(ones(10, 3), ones(2), flag=True)
    close(last, 32)
    assert (len(warned), warned[0].filename) == (1, __file__)
    for n in range(11, 23):  # From here on, a warning would be an error.
        close(total(ones(n, 3), ones(2), flag=True), 3 * n + 2)


def test_fit_warns_of_the_tenth_shape_of_a_batch_and_not_when_it_runs_eagerly():
    batches = lambda: (ones(n, 2) for n in range(1, 13))  # noqa: E731
    with hl.run_eagerly(True):
        hl.fit(lambda x: {"sum": ops.sum(x)}, batches, verbose=0)
    with pytest.warns(RetraceWarning, match=r"10 shapes of its arguments: x: float32\[1,2\]") as warned:
        hl.fit(lambda x: {"sum": ops.sum(x)}, batches, verbose=0)
    assert len(warned) == 1


# ------------------------------------------------------------------------ arguments


def test_function_takes_arguments_in_any_structure(eagerly):
    Pair = collections.namedtuple("Pair", "left right")

    @hl.function
    def total(pair, more, *, last):
        assert all(map(ops.is_tensor, (pair.left, pair.right["a"], *more, last)))
        return pair.left + pair.right["a"] + sum(more) + last

    close(total(Pair(ONE, {"a": ONE}), [ones(2), (ops.ones(2))], last=ONE), [5, 5])


def test_function_takes_defaults_and_gathered_arguments_as_python_does(eagerly):
    @hl.function
    def gather(x, *others, scale=2.0, **named):
        return (x + sum(others) + sum(named.values())) * scale

    close([gather(ONE), gather(ONE, ONE, ONE), gather(ONE, ONE, a=ONE, scale=3.0)], [2, 6, 9])
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        gather()


def test_function_takes_arrays_of_any_memory_layout(eagerly):
    read_only = X.copy()
    read_only.setflags(write=False)
    flat = hl.function(lambda x: ops.reshape(x * 2, (-1,)))
    for array in (X[:, ::-1], X.T, np.broadcast_to(X[0], (4, 3)), X.astype(">f4"), X[:0], read_only):
        close(flat(array), np.ravel(array * 2))


def test_function_takes_tensors_of_another_memory_layout_than_the_traced_one():
    flat = hl.function(lambda x: ops.reshape(x, (-1,)))
    square = ops.reshape(ops.arange(9), (3, 3))
    close(flat(square), np.arange(9))
    close(flat(ops.transpose(square)), np.arange(9).reshape(3, 3).T.ravel())
    close(flat(square), np.arange(9))


def test_function_takes_variables(eagerly):
    a, b = keras.Variable(ones(2)), keras.Variable(2 * ones(2))

    @hl.function
    def bump(x, v):
        v.assign_add(ones(2))
        return v * x

    for v, expected in ((a, 20), (b, 30), (a, 30), (b, 40)):
        close(bump(np.float32(10), v), expected * ones(2))
    close(a, 3 * ones(2))


def test_function_takes_layers_and_optimizers(eagerly):
    @hl.function
    def step(layer, optimizer, x):
        return hl.minimize(lambda: ops.sum(layer(x)), layer, optimizer)

    for _ in range(2):
        layer = built(layers.Dense(1, use_bias=False, kernel_initializer="ones"))
        step(layer, keras.optimizers.SGD(0.5), ones(1, 3))
        close(layer.kernel, 0.5 * ones(3, 1))


def test_function_takes_the_value_of_a_variable_as_data(eagerly):
    v = keras.Variable(1.0)
    double = hl.function(lambda x: x * 2)
    close(double(v.value), 2)
    v.assign(4.0)
    close(double(v.value), 8)
    assert len(double.traces) <= 1


def test_function_refuses_an_argument_that_is_neither_data_nor_hashable(eagerly):
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


def test_function_as_a_method_has_versions_for_each_instance(eagerly):
    one, two = Counter(0), Counter(10)
    for _ in range(2):
        one.step(ONE)
        two.step(TWO)
    close([one.count, two.count], [2, 14])
    assert one.step is one.step
    assert one.step is not two.step
    assert len(one.step.traces) == (0 if eagerly else 1)
    assert isinstance(Counter.step, hl.Function)
    assert Counter.step.__doc__ == "Counts."
    close(Counter.step(Counter(1), TWO), 3)


def test_function_as_a_method_may_call_the_method_that_it_overrides(eagerly):
    class Loud(Counter):
        @hl.function
        def step(self, x):
            return super().step(x) * 100

    loud = Loud(0)
    close([loud.step(ONE) for _ in range(3)], [100, 200, 300])


def test_function_as_a_method_leaves_the_original_under_another_name():
    class Both:
        def plain(self, x):
            return x * 2

        fast = hl.function(plain)

    both = Both()
    close(both.fast(TWO), 4)
    assert not isinstance(both.plain, hl.Function)
    assert both.fast is both.fast


def test_function_as_a_method_may_be_replaced():
    class Changing:
        pass

    changing = Changing()
    for n in range(20):
        Changing.step = hl.function(lambda self, n=n: n)
        if n % 2 == 0:  # An unused one is freed at once, and the next one may take its address.
            close(changing.step(), n)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_function_as_a_method_of_a_copied_instance_belongs_to_the_copy(copied):
    first = Counter(0)
    first.step(ONE)
    second = copied(first)
    second.count = keras.Variable(10.0)
    close(second.step(ONE), 11)
    close(first.count, 1)


@pytest.mark.parametrize("base", [layers.Layer, hl.Model])
def test_function_as_a_method_of_a_layer_builds_it_and_is_not_a_part_of_it(base, eagerly):
    class Scale(base):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(1, use_bias=False, kernel_initializer="ones")

        def call(self, x):
            return self.dense(x)

        @hl.function
        def step(self, x):
            return ops.sum(self(x))

    layer = Scale()
    close(layer.step(ones(2, 3)), 6)
    layer.dense.kernel.assign(2 * ones(3, 1))
    close(layer.step(ones(2, 3)), 12)
    assert len(layer.weights) == 1


def test_function_as_a_static_method_needs_no_instance():
    class Tools:
        @staticmethod
        @hl.function
        def double(x):
            return x * 2

        @hl.function
        @staticmethod
        def triple(x):
            return x * 3

    close([Tools.double(ONE), Tools().double(ONE), Tools().triple(ONE)], [2, 2, 3])


# --------------------------------------------------------- variables that are created


@pytest.mark.parametrize("value", [2.5, [1.0, 2.0], np.array([[1.5]], "float32"), THREE, 7, True])
def test_function_creates_a_variable_of_a_known_value_in_its_first_call(value, eagerly):
    outside, made = keras.Variable(value, trainable=False), []

    @hl.function
    def read():
        if not made:
            made.append(keras.Variable(value, trainable=False))
        return made[0].value

    close(read(), value)
    close(read(), value)
    assert (made[0].dtype, tuple(made[0].shape)) == (outside.dtype, tuple(outside.shape))


def test_function_creates_a_layer_an_optimizer_and_a_metric_in_its_first_call(eagerly):
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

    close([step(ones(1, 1)), step(ones(1, 1))], [1, 0.75])  # The mean of 1 and 0.5.
    close(parts["layer"].kernel, [[1 - 0.5 - 0.75]])


def test_function_refuses_a_variable_created_later_and_works_on():
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


def make_layer(x):
    return layers.Dense(2)(x)


@pytest.mark.parametrize("make", [lambda x: keras.Variable(1.0) * x, make_layer])
def test_function_refuses_a_variable_created_on_every_call(make):
    with pytest.raises(VariableError, match=r"creates variables on every call.*Create them once, outside"):
        hl.function(make)(ones(2, 3))


# ---------------------------------------------------------------------------- nesting


def test_function_inside_another_becomes_part_of_it(eagerly):
    count = keras.Variable(0.0)

    @hl.function
    def inner(x):
        count.assign_add(1.0)
        return x * 2

    @hl.function
    def outer(x):
        return inner(inner(x)) + count

    close([outer(ONE), outer(ONE), count], [4 + 2, 4 + 4, 4])
    if not eagerly:
        assert inner.traces == []


def test_function_is_differentiated_like_any_function(eagerly):
    factor = keras.Variable(2.0)
    square = hl.function(lambda x: factor * x**2)
    close([hl.grad(square)(3.0), hl.grad(hl.grad(square))(3.0)], [12, 4])
    close(hl.grad(lambda: square(THREE), wrt=factor)(), 9)
    close(hl.function(hl.grad(square))(THREE), 12)
    assert square.traces == []


def test_function_and_grad_nest(eagerly):
    v = keras.Variable(2.0)

    @hl.function
    def cube(x):
        v.assign_add(1.0)
        return v * x**3

    slope = hl.function(hl.grad(cube))
    both = hl.function(hl.value_and_grad(slope))
    close(both(TWO), [3 * 3 * 4, 3 * 6 * 2])
    close(v, 3)


# ---------------------------------------------------------------------------- results


def test_function_returns_numbers_as_tensors_and_the_rest_as_it_is(eagerly):
    marker = object()
    Pair = collections.namedtuple("Pair", "left right")

    @hl.function
    def answer(x):
        numbers = [1, 2.5, True, np.arange(3)]
        return {"pair": Pair(x, numbers), "word": "yes", "nothing": None, "object": marker, "empty": ()}

    result = answer(ones(2))
    assert isinstance(result["pair"], Pair)
    numbers = result["pair"].right
    assert all(map(ops.is_tensor, [result["pair"].left, *numbers]))
    assert [keras.backend.standardize_dtype(n.dtype) for n in numbers[:3]] == ["int32", "float32", "bool"]
    close(numbers[1], 2.5)
    close(numbers[3], [0, 1, 2])
    assert (result["word"], result["nothing"], result["object"], result["empty"]) == ("yes", None, marker, ())
    assert hl.function(lambda: None)() is None


def test_function_returns_a_variable_as_its_value_at_that_time(eagerly):
    v = keras.Variable(ones(2))

    @hl.function
    def bump():
        v.assign_add(ones(2))
        return v, v.value

    first, second = bump(), bump()
    v.assign(np.zeros(2))
    for leaf in first:
        assert ops.is_tensor(leaf)
        assert not isinstance(leaf, keras.Variable)
        close(leaf, 2 * ones(2))
    close(second[0], 3 * ones(2))


def test_function_returns_results_that_later_calls_leave_alone(eagerly):
    v, total = keras.Variable(np.zeros(1000, "float32")), keras.metrics.Sum()

    @hl.function
    def step(x):
        v.assign_add(x)
        total.update_state(x)
        return x, v.value, v * 1, ops.reshape(v, (10, 100)), total.result()

    array = ones(1000)
    results = [step(array), step(2 * ones(1000)), step(3 * ones(1000))]
    if keras.backend.backend() != "jax":  # JAX itself may share the memory of an aligned array.
        array[:] = 5
    for n, (x, value, times, reshaped, summed) in zip((1, 2, 3), results, strict=True):
        running = n * (n + 1) / 2
        close(x, n * ones(1000))
        close([value, times], running * ones(2, 1000))
        close(reshaped, running * ones(10, 100))
        close(summed, running * 1000)


def test_function_leaves_values_read_before_a_call_alone(eagerly):
    v = keras.Variable(ones(1000))
    step = hl.function(lambda: v.assign_add(ones(1000)))
    kept = v.numpy()
    step()
    again = v.numpy()
    step()
    close([kept, again], [ones(1000), 2 * ones(1000)])


def test_function_neither_changes_nor_loses_an_argument_kept_in_a_variable(eagerly):
    v = keras.Variable(np.zeros(1000, "float32"))
    keep, step = hl.function(v.assign), hl.function(lambda: v.assign_add(ones(1000)))
    array, tensor = ones(1000), ops.ones(1000)
    for data in (array, tensor):
        keep(data)
        step()
        close([data, v], [ones(1000), 2 * ones(1000)])
    keep(array)
    array[:] = 9
    close(v, ones(1000))


def test_function_changes_only_one_of_two_variables_from_one_array(eagerly):
    array = ones(1000)
    one, two = keras.Variable(array), keras.Variable(array)
    one.assign(two)
    step = hl.function(lambda: one.assign_add(ones(1000)))
    step()
    step()
    close([array, one, two], [ones(1000), 3 * ones(1000), ones(1000)])


# ------------------------------------------------------------------------- run_eagerly


def test_run_eagerly_is_a_function_and_a_context_manager():
    function = hl.function(lambda x: x * 2)
    with hl.run_eagerly(True):
        close(function(ones(2)), 2 * ones(2))
        with hl.run_eagerly(False):
            function(ones(3))
        function(ones(4))
    function(ones(5))
    hl.run_eagerly(True)
    function(ones(6))
    hl.run_eagerly(False)
    with contextlib.suppress(RuntimeError), hl.run_eagerly(True):
        raise RuntimeError
    function(ones(7))
    assert [trace.signature for trace in function.traces] == [f"x: float32[{size}]" for size in (3, 5, 7)]


def test_run_eagerly_keeps_the_versions_compiled_before():
    v = keras.Variable(0.0)
    step = hl.function(v.assign_add)
    step(ONE)
    with hl.run_eagerly(True):
        step(TWO)
    step(THREE)
    close(v, 6)
    assert len(step.traces) == 1


@pytest.mark.parametrize("value", [1, "yes", None])
def test_run_eagerly_takes_a_bool(value):
    with pytest.raises(TypeError, match=r"hl\.run_eagerly takes True or False; received"):
        hl.run_eagerly(value)


# ---------------------------------------------------------------------------- errors


class CustomError(Exception):
    """An error that cannot be created again from its text."""

    def __init__(self, code, what):
        super().__init__(code, what)
        self.code = code


def test_function_raises_an_error_of_the_step_as_it_is(eagerly):
    @hl.function
    def step(x):
        raise CustomError(42, "broken")

    with pytest.raises(CustomError, match="broken") as raised:
        step(ones(2))
    assert raised.value.code == 42


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_function_and_the_layers_that_it_built_work_after_an_error(error, eagerly):
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
    close(step(ones(2, 3)), 2 * before.sum())
    close(layer.kernel, before - 0.1, rtol=1e-4)
    assert [trace.compiled for trace in step.traces] == ([] if eagerly else [True])


@pytest.mark.backend("jax", "tensorflow")
def test_function_leaves_variables_as_they_were_after_an_error_in_tracing():
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


def test_function_keeps_its_versions_after_an_error_in_another_one(eagerly):
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


def to_numpy(x):
    return x + ops.convert_to_numpy(x).sum()


@pytest.mark.backend("jax", "tensorflow")
def test_function_names_the_line_that_turns_a_tensor_into_numpy():
    with pytest.raises(TraceError) as raised:
        hl.function(lambda x: to_numpy(x + 1))(ones(2))
    assert f"{__file__}, line {to_numpy.__code__.co_firstlineno + 1}: return x + ops.conv" in str(raised.value)


def test_function_says_where_a_value_is_read_by_numpy_and_how_to_look_at_it():
    dense = built(layers.Dense(1))

    def step(x):
        return dense(x).numpy()

    with pytest.raises(TraceError, match=r"hl\.run_eagerly\(True\).*HL1(04|26)") as raised:
        hl.function(step)(ones(2, 3))
    assert f"{__file__}, line {step.__code__.co_firstlineno + 1}: return dense(x).numpy()" in str(raised.value)


# ------------------------------------------------------------------------ randomness

DRAWS = {
    "normal": lambda seed: keras.random.normal((4,), seed=seed),
    "uniform": lambda seed: keras.random.uniform((4,), seed=seed),
    "randint": lambda seed: keras.random.randint((8,), 0, 1000, seed=seed),
    "truncated normal": lambda seed: keras.random.truncated_normal((4,), seed=seed),
    "categorical": lambda seed: keras.random.categorical(ops.ones((2, 1000)), 4, seed=seed),
    "dropout": lambda seed: keras.random.dropout(ops.ones(64), 0.5, seed=seed),
    "shuffle": lambda seed: keras.random.shuffle(ops.arange(64), seed=seed),
    "layer": lambda seed: seed(ops.ones(64), training=True),
}


@pytest.mark.parametrize(("name", "seed"), [*((name, 11) for name in DRAWS), ("normal", None), ("dropout", None)])
def test_function_draws_new_random_numbers_on_each_call_and_the_same_as_run_eagerly(name, seed):
    def run():
        keras.utils.set_random_seed(3)
        generator = None if seed is None else keras.random.SeedGenerator(seed)
        source = layers.Dropout(0.5, seed=2) if name == "layer" else generator
        function = hl.function(lambda: (DRAWS[name](source), DRAWS[name](source)))
        return [numpy(drawn) for _ in range(3) for drawn in function()]

    compiled = run()
    with hl.run_eagerly(True):
        close(compiled, run())
    assert len({drawn.tobytes() for drawn in compiled}) == 6


def test_function_draws_the_same_numbers_for_a_number_as_seed(eagerly):
    draw = hl.function(lambda: keras.random.normal((4,), seed=5))
    close([draw(), draw()], [keras.random.normal((4,), seed=5)] * 2)


def test_function_draws_from_the_state_of_a_seed_generator(eagerly):
    seed = keras.random.SeedGenerator(1)
    draw = hl.function(lambda: keras.random.normal((4,), seed=seed))
    first = [numpy(draw()), numpy(draw())]
    seed.state.assign([1, 0])
    same([draw(), draw()], first)


class Noisy(hl.Model):
    def __init__(self):
        super().__init__()
        self.rng = np.random.default_rng(0)

    def train_step(self, x):
        return {"loss": ops.sum(x) * self.rng.random()}


def test_function_warns_of_random_numbers_that_are_constants_of_its_program():
    rng, numbers = np.random.default_rng(0), random.Random(0)
    sources = {
        "random": lambda x: x * random.random(),
        "np.random": lambda x: x * np.random.rand(),
        "rng": lambda x: x * rng.random(),
        "numbers": lambda x: x * numbers.random(),
        "np.random.default_rng()": lambda x: x * np.random.default_rng().random(),
    }
    for name, step in sources.items():
        with pytest.warns(HandloomWarning, match=rf"drew numbers from {re.escape(name)} while .*HL108"):
            first = numpy((function := hl.function(step))(ONE))
        same(function(ONE), first)
        function(ones(2))  # Another version: a second warning would be an error.
        with hl.run_eagerly(True):
            assert numpy(function(ONE)) != numpy(function(ONE))

    def helper(x):
        return sources["rng"](x) if x is None else x * rng.random()

    for random_step in (
        hl.grad(lambda x: x * rng.random()),
        functools.partial(sources["rng"]),
        lambda x: helper(x) + 0,
    ):
        with pytest.warns(HandloomWarning, match="drew numbers from rng while"):
            hl.function(random_step)(ONE)


def test_fit_warns_of_a_generator_that_is_an_attribute_of_the_model():
    model = Noisy()
    model.compile()
    with pytest.warns(HandloomWarning, match=r"drew numbers from self\.rng while"):
        model.fit(ones(2, 1), verbose=0)
    step = lambda x: {"loss": ops.sum(x) * random.random()}  # noqa: E731
    with pytest.warns(HandloomWarning, match="drew numbers from random while"):
        hl.fit(step, ones(2, 1), verbose=0)


def test_function_does_not_warn_of_the_default_seeds_of_keras_nor_of_seeded_or_untouched_generators():
    rng = np.random.default_rng(0)
    parts = {}

    def step(x):
        if not parts:
            parts["layers"] = [layers.Dense(2), layers.Dropout(0.5)]
        scale = np.random.default_rng(0).random() + (rng.random() if x is None else 0)
        return sum(ops.sum(layer(x)) for layer in parts["layers"]) * scale

    hl.function(step)(ones(2, 2))  # A warning would be an error.


@pytest.mark.backend("tensorflow")
def test_function_assigns_a_variable_of_tensorflow_among_its_arguments(eagerly):
    import tensorflow as tf  # noqa: PLC0415

    @hl.function
    def add(total, x):
        total.assign_add(x)
        return ops.sum(total)

    one, other = tf.Variable([1.0, 2.0]), tf.Variable([10.0, 20.0])
    close([add(one, ones(2)), add(other, ones(2)), add(one, ones(2))], [5, 32, 7])
    close([one, other], [[3, 4], [11, 21]])
