"""Gradients, against closed forms and PyTorch."""

import keras
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from keras import layers, ops

import handloom as hl
from handloom.errors import GradientError, TraceError
from tests.models import built, functional
from tests.numbers import close, numpy, ones, same

a_few = settings(max_examples=20, deadline=None, derandomize=True)

TRANSFORMS = [hl.value_and_grad, hl.grad, hl.jacobian, hl.hessian]
each_transform = pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda transform: transform.__name__)


def f(w1, w2):
    return 3 * w1**2 + 2 * w1 * w2


def wave(x):
    """A damped sine, and the square of the largest number."""
    return ops.sum(ops.sin(x) * ops.exp(-0.5 * x)) + ops.max(x) ** 2


def square(x):
    return ops.sum(x**2)


def dtype_of(tensor):
    return keras.backend.standardize_dtype(tensor.dtype)


# ---------------------------------------------------------------------- of arguments


@pytest.mark.parametrize(("wrt", "expected"), [(1, 10), (-1, 10), ((0,), (36,)), ((1, 0), (10, 36))])
def test_grad_mirrors_positions(wrt, expected):
    found = hl.grad(f, wrt=wrt)(5.0, 3.0)
    assert isinstance(found, tuple) is isinstance(wrt, tuple)
    close(found, expected)


def test_grad_passes_other_arguments_of_any_kind():
    def scaled(x, how, *, power):
        return {"double": 2, "triple": 3}[how] * x**power

    close(hl.grad(scaled)(2.0, "triple", power=2), 12)
    w = keras.Variable(3.0)
    close(hl.grad(lambda x, power: ops.sum(x) * w**power, wrt=w)(ops.ones(2), power=2), 12)


@pytest.mark.parametrize("three", [3.0, np.float32(3), np.float64(3), np.array(3.0), np.array(3, "float32")], ids=repr)
def test_grad_of_floats_and_numpy_arrays_is_in_floatx(three):
    gradient = hl.grad(lambda x: x**2)(three)
    assert dtype_of(gradient) == "float32"
    close(gradient, 6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_grad_has_the_dtype_of_its_source(dtype):
    assert dtype_of(hl.grad(lambda x: ops.sum(ops.cast(x, "float32") ** 2))(ops.ones((2,), dtype))) == dtype


def test_grad_takes_a_variable_as_an_argument_and_passes_it_on():
    variable = keras.Variable(5.0)

    def fn(w1, w2):
        assert w1 is variable
        return f(w1, w2)

    close(hl.grad(fn, wrt=(0, 1))(variable, 3.0), [36, 10])
    close(hl.grad(lambda x: x**2)(variable.value), 10)


def test_grad_of_structures_has_the_same_structures():
    parameters = {"w": [np.array([1.0, 2.0]), keras.Variable(3.0)], "b": (4.0,)}
    by_p, by_q = hl.grad(lambda p, q: ops.sum(p["w"][0] ** 2) * p["w"][1] + p["b"][0] ** 2 * q[0], wrt=(0, 1))(
        parameters, [1.0, 7.0]
    )
    close(by_p["w"][0], [6, 12])
    close([by_p["w"][1], by_p["b"][0], by_q[0]], [5, 8, 16])
    assert isinstance(by_p["b"], tuple)
    assert by_q[1] is None


def test_grad_differentiates_the_argument_and_not_the_same_tensor_elsewhere():
    x = ops.convert_to_tensor([1.0, 2.0])
    close(hl.grad(lambda argument: ops.sum(argument * x))(x), [1, 2])
    close(hl.grad(lambda a, b: ops.sum(a**2 * b), wrt=(0, 1))(x, x), [[2, 8], [1, 4]])


@a_few
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=5), st.floats(-2, 2, width=32))
def test_grad_of_any_polynomial(coefficients, x):
    polynomial = np.polynomial.Polynomial(coefficients)
    gradient = hl.grad(lambda x: sum((c * x**k for k, c in enumerate(coefficients) if k), 0 * x))(x)
    close(gradient, polynomial.deriv()(x), rtol=1e-4, atol=1e-4)


vectors = hnp.arrays("float32", 3, elements=st.floats(-2, 2, width=32))


# ---------------------------------------------------------------------- of variables


@pytest.mark.parametrize("trainable", [True, False])
def test_grad_with_respect_to_a_variable_trainable_or_not(trainable):
    w = keras.Variable([1.0, 2.0], trainable=trainable)
    close(hl.grad(lambda: ops.sum(w**3), wrt=w)(), [3, 12])


def test_grad_with_respect_to_a_layer_is_a_list_of_its_trainable_variables():
    dense = built(layers.Dense(2))
    by_kernel, by_bias = hl.grad(lambda x: ops.sum(dense(x)), wrt=dense)(np.array([[1.0, 2.0, 3.0]]))
    close(by_kernel, [[1, 1], [2, 2], [3, 3]])
    close(by_bias, [1, 1])


def test_grad_with_respect_to_a_model_leaves_out_frozen_layers():
    model = functional(layers.Dense(2, activation="tanh"), layers.Dense(1))
    for shapes in ([(3, 2), (2,), (2, 1), (1,)], [(2, 1), (1,)]):
        gradients = hl.grad(lambda: ops.sum(model(np.ones((4, 3)))), wrt=model)()
        assert [tuple(gradient.shape) for gradient in gradients] == shapes
        close(gradients[-1], [4])
        model.layers[1].trainable = False


def test_grad_with_respect_to_a_structure_of_variables_mirrors_it():
    a, b = keras.Variable(2.0), keras.Variable(3.0)
    for wrt in ([a, b], (a, b)):
        found = hl.grad(lambda: a**2 * b, wrt=wrt)()
        assert type(found) is type(wrt)
        close(found, [12, 4])
    dense = built(layers.Dense(1, use_bias=False), 2)
    found = hl.grad(lambda: ops.sum(dense(np.ones((1, 2)))) * a, wrt={"net": [dense, dense.kernel], "a": a})()
    (of_layer,), of_kernel = found["net"]  # The kernel is there twice.
    close([of_layer, of_kernel], [[[2], [2]]] * 2)
    close(found["a"], np.sum(numpy(dense.kernel)))


def test_grad_with_respect_to_an_embedding_is_dense():
    embedding = built(layers.Embedding(4, 2))
    (gradient,) = hl.grad(lambda: ops.sum(embedding(np.array([1, 1, 2]))), wrt=embedding)()
    close(gradient, [[0, 0], [2, 2], [1, 1], [0, 0]])


def test_grad_with_respect_to_float32_variables_is_float32_under_mixed_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    dense = built(layers.Dense(1), 2)
    gradients = hl.grad(lambda: ops.sum(dense(ones(3, 2))), wrt=dense)()
    assert set(map(dtype_of, gradients)) == {"float32"}
    close(gradients[0], [[3], [3]])


def test_grad_with_respect_to_a_layer_that_the_function_builds_draws_its_numbers_once():
    keras.utils.set_random_seed(1)
    dense = layers.Dense(1)
    by_kernel, by_bias = hl.grad(lambda x: ops.sum(dense(x)), wrt=dense)(np.ones((2, 3)))
    close(by_kernel, [[2], [2], [2]])
    close(by_bias, [2])
    keras.utils.set_random_seed(1)
    close(dense.kernel, built(layers.Dense(1)).kernel)


@pytest.mark.parametrize("transform", [hl.grad, hl.jacobian])
def test_grad_and_jacobian_of_a_function_that_builds_a_layer_have_their_effects_once(transform):
    dense = layers.Dense(1, kernel_initializer="ones")
    counter = keras.Variable(0.0, trainable=False)

    def fn(x):
        counter.assign_add(1.0)
        return ops.sum(dense(x) ** 2)

    close(transform(fn)(np.array([[1.0, 2.0]])), [[6, 6]])
    close(counter, 1)


# ---------------------------------------------------------------------- aux


def test_has_aux_returns_anything_beside_the_value():
    marker = object()

    def fn(x):
        return x**2, {"doubled": 2 * x, "rest": ("text", None, 5, marker), "place": ops.argmax(ops.stack([x, 2 * x]))}

    (value, aux), gradient = hl.value_and_grad(fn, has_aux=True)(3.0)
    close([value, gradient, aux["doubled"]], [9, 6, 6])
    assert aux["rest"] == ("text", None, 5, marker)
    assert int(aux["place"]) == 1
    gradient, aux = hl.grad(lambda x: (x**2, None), has_aux=True)(3.0)
    close(gradient, 6)
    assert aux is None


def test_has_aux_is_differentiable_outside(eagerly):
    def squared_aux(x):
        return hl.grad(lambda x: (x**2, x**3), has_aux=True)(x)[1] ** 2

    close(hl.function(hl.grad(squared_aux))(np.float32(2)), 6 * 2.0**5)


def test_has_aux_requires_a_pair():
    with pytest.raises(GradientError, match=r"must return a pair \(value, aux\).*shape \(\)"):
        hl.grad(lambda x: x**2, has_aux=True)(3.0)


# ---------------------------------------------------------------------- not reached


def test_grad_is_none_in_its_place_where_the_value_is_not_reached(eagerly):
    dense, w = built(layers.Dense(2)), keras.Variable(3.0)
    found = hl.function(hl.grad(lambda p, q: p["a"][0] ** 2 + ops.stop_gradient(q), wrt=(0, 1)))(
        {"a": [np.float32(3), np.float32(4)], "b": (ones(2),)}, np.float32(5)
    )
    close(found[0]["a"][0], 6)
    assert (found[0]["a"][1], found[0]["b"], found[1]) == (None, (None,), None)
    by_kernel, by_bias = hl.grad(lambda: ops.sum(dense.bias), wrt=dense)()
    assert by_kernel is None
    close(by_bias, [1, 1])
    assert hl.grad(lambda: ops.stop_gradient(w.value) ** 2, wrt=w)() is None
    value, gradient = hl.value_and_grad(lambda x: 7.0)(3.0)
    close(value, 7)
    assert gradient is None


@pytest.mark.backend("jax", "tensorflow")  # On PyTorch the value of a variable is its memory.
def test_value_and_grad_returns_a_variable_as_its_value_at_that_time():
    w = keras.Variable(3.0)
    (value, aux), gradient = hl.value_and_grad(lambda: (w, w.value), wrt=w, has_aux=True)()
    w.assign(5.0)
    close([value, aux, gradient], [3, 3, 1])


WITHOUT_GRADIENT = {
    "argmax": lambda x: ops.cast(ops.argmax(x), "float32"),
    "argsort": lambda x: ops.sum(ops.cast(ops.argsort(x), "float32")),
    "ceil": lambda x: ops.sum(ops.ceil(x)),
    "comparison": lambda x: ops.sum(ops.cast(x > 1.5, "float32")),
    "floor": lambda x: ops.sum(ops.floor(x)),
    "integer cast": lambda x: ops.sum(ops.cast(ops.cast(x, "int32"), "float32")),
    "one_hot": lambda x: ops.sum(ops.one_hot(ops.cast(x, "int32"), 4)),
    "ones_like": lambda x: ops.sum(ops.ones_like(x)),
    "round": lambda x: ops.sum(ops.round(x)),
    "trunc": lambda x: ops.sum(ops.trunc(x)),
}


@pytest.mark.parametrize("fn", WITHOUT_GRADIENT.values(), ids=WITHOUT_GRADIENT.keys())
def test_grad_is_none_through_operations_without_a_gradient(fn):
    assert hl.grad(fn)(np.array([1.0, 2.0, 3.0])) is None


@pytest.mark.backend("jax", "torch")  # TensorFlow's own gradient of sign is zero.
def test_grad_is_none_through_sign():
    assert hl.grad(lambda x: ops.sum(ops.sign(x)))(np.array([1.0, -2.0])) is None


def test_grad_is_zero_and_not_none_where_the_value_is_reached():
    close(hl.grad(lambda x: ops.sum(ops.relu(x)))(np.array([-1.0, -2.0])), [0, 0])
    close(hl.grad(lambda x: ops.sum(0 * x))(np.array([1.0, 2.0])), [0, 0])
    close(hl.grad(lambda x: ops.sum(ops.round(x) * x))(np.array([1.2, 2.8])), [1, 3])  # One path of two is reached.


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "outside of a function"])
def test_grad_through_an_updated_slice(compiled):
    weights = np.arange(1.0, 13.0, dtype="float32").reshape(3, 4)

    def loss(inputs, updates):
        return ops.sum(ops.multiply(weights, ops.slice_update(inputs, (1, 2), updates) ** 2))

    gradients = hl.grad(loss, wrt=(0, 1))
    found = (hl.function(gradients) if compiled else gradients)(5 * ones(3, 4), 7 * ones(2, 2))
    outside = np.ones((3, 4))
    outside[1:, 2:] = 0
    close(found[0], 10 * weights * outside)
    close(found[1], 14 * weights[1:, 2:])


def counted(weights):
    return ops.sum(ops.convert_to_tensor([1.0, 10.0, 100.0]) * ops.bincount(np.array([2, 0, 2]), weights=weights))


@pytest.mark.backend("jax", "tensorflow")
def test_grad_with_respect_to_the_weights_of_bincount():
    close(hl.grad(counted)(ones(3)), [100.0, 1.0, 100.0])


@pytest.mark.backend("torch")
@pytest.mark.parametrize("transform", [hl.grad, lambda fn: hl.function(hl.grad(fn))], ids=["eager", "compiled"])
def test_grad_names_an_operation_that_cannot_be_differentiated(transform):
    with pytest.raises(GradientError, match=r"no derivative of the operation \S*bincount\S*\. .*custom_gradient"):
        transform(counted)(ones(3))


# ---------------------------------------------------------------------- wrong values


@pytest.mark.parametrize("transform", [hl.value_and_grad, hl.grad, hl.hessian])
def test_grad_of_a_value_that_is_not_a_scalar_shows_its_shape_and_two_fixes(transform):
    with pytest.raises(GradientError, match=r"shape \(2, 3\).*keras\.ops\.sum.*hl\.jacobian"):
        transform(lambda x: x**2)(np.ones((2, 3)))
    with pytest.raises(GradientError, match=r"shape \(1,\)"):
        transform(lambda x: x**2)(np.ones(1))


@each_transform
def test_grad_of_an_integer_value_names_its_dtype(transform):
    with pytest.raises(GradientError, match="floating-point tensor; it returned one of dtype int32"):
        transform(lambda x: ops.sum(ops.cast(x, "int32")))(np.ones(3))


@each_transform
@pytest.mark.parametrize("value", [None, "text", [1.0]], ids=repr)
def test_grad_of_a_value_that_is_not_a_tensor_shows_it(transform, value):
    with pytest.raises(GradientError, match=r"must return a floating-point tensor; it returned .* \(of type "):
        transform(lambda x: value)(3.0)


def test_grad_of_two_values_offers_has_aux():
    with pytest.raises(GradientError, match="use has_aux=True"):
        hl.grad(lambda x: (x**2, x))(3.0)


# ---------------------------------------------------------------------- wrong sources

REFUSED_ARGUMENTS = {
    "int": (3, r"square cannot be differentiated .* 3 \(of type int\)\. Pass 3\.0\."),
    "integer array": (np.array([1, 2], "int32"), r"square .* dtype int32.*keras\.ops\.cast\(x, 'float32'\)"),
    "text": ("text", r"not a tensor, array or float: 'text' \(of type str\)"),
}


@pytest.mark.parametrize(("argument", "words"), REFUSED_ARGUMENTS.values(), ids=REFUSED_ARGUMENTS)
def test_grad_refuses_an_argument_that_is_not_a_float(argument, words):
    with pytest.raises(GradientError, match=words):
        hl.grad(square)(argument)


def test_grad_refuses_a_position_without_an_argument():
    with pytest.raises(GradientError, match=r"wrt=1, but square was called with 1 .*0 to 0"):
        hl.grad(square, wrt=1)(3.0)
    with pytest.raises(GradientError, match="Pass the argument by position"):
        hl.grad(square)(x=3.0)


NO_WRT = [None, "kernel", 1.5, True, [0, 1], {"x": object()}]


@pytest.mark.parametrize("wrt", NO_WRT, ids=lambda wrt: repr(wrt).split(" at ")[0])  # Without an address.
def test_grad_refuses_another_wrt_and_says_what_it_takes(wrt):
    with pytest.raises(GradientError, match=r"wrt takes positions of arguments .* or Keras variables.*received"):
        hl.grad(square, wrt=wrt)(3.0)


@pytest.mark.parametrize("wrt", [[], (), {}], ids=repr)
def test_grad_refuses_an_empty_wrt(wrt):
    with pytest.raises(GradientError, match="nothing to differentiate with respect to"):
        hl.grad(square, wrt=wrt)(3.0)


def test_grad_says_how_to_unfreeze_or_build_a_layer_without_trainable_variables():
    cold, idle = built(layers.Dense(1, name="cold"), 2), layers.Dense(1, name="idle")
    cold.trainable = False
    with pytest.raises(GradientError, match=r"name=cold.*frozen.*layer\.trainable = True"):
        hl.grad(lambda: ops.sum(cold(np.ones((1, 2)))), wrt=cold)()
    with pytest.raises(GradientError, match=r"name=idle.*before it is built.*Call it once on data"):
        hl.grad(square, wrt=idle)(3.0)


def test_grad_refuses_one_variable_as_two_arguments():
    w = keras.Variable(1.0, name="w")
    with pytest.raises(GradientError, match="two arguments that are the same variable"):
        hl.grad(f, wrt=(0, 1))(w, w)


def test_function_compiles_after_an_error_of_grad():
    compiled = hl.function(lambda x: x**2)
    with pytest.raises(GradientError):
        hl.grad(lambda x: ops.stack([x, x]))(3.0)
    close(compiled(np.float32(3)), 9)
    assert compiled.traces  # It did not run as a part of a function that is still being differentiated.


# ---------------------------------------------------------------------- jacobians


def test_jacobian_has_the_shape_of_the_value_and_then_of_the_source():
    matrix = np.arange(6.0, dtype="float32").reshape(2, 3)
    close(hl.jacobian(lambda x: ops.matmul(matrix, x))(np.ones(3)), matrix)
    found = hl.jacobian(lambda x: ops.matmul(matrix, x))(np.ones((3, 4)))
    close(found, np.einsum("ik,jl->ijkl", matrix, np.eye(4)))


def test_jacobian_of_a_scalar_is_its_gradient():
    x = np.array([0.5, 1.0, 2.0])
    close(hl.jacobian(wave)(x), hl.grad(wave)(x))


def test_jacobian_with_respect_to_a_layer():
    dense, x = built(layers.Dense(2)), np.array([[1.0, 2.0, 3.0]])
    by_kernel, by_bias = hl.jacobian(lambda x: dense(x)[0], wrt=dense)(x)
    close(by_kernel, np.einsum("ij,k->ikj", np.eye(2), x[0]))
    close(by_bias, np.eye(2))


def test_jacobian_mirrors_structures_and_positions_with_none_where_not_reached():
    by_p, by_scale = hl.jacobian(lambda p, scale: scale * p["a"] ** 2, wrt=(0, 1))(
        {"a": np.array([1.0, 2.0]), "b": 3.0}, 3.0
    )
    close(by_p["a"], np.diag([6.0, 12.0]))
    assert by_p["b"] is None
    close(by_scale, [1, 4])


@pytest.mark.parametrize("layer", [layers.Conv2D(2, 2), layers.LSTM(2)], ids=["convolution", "recurrent"])
def test_jacobian_with_respect_to_a_layer_sums_up_to_the_gradient_of_the_sum(layer):
    # Operations that each backend vectorizes in its own way, a loop among them.
    shape = (1, 3, 3, 1) if isinstance(layer, layers.Conv2D) else (1, 3, 2)
    x = np.linspace(-1, 1, int(np.prod(shape)), dtype="float32").reshape(shape)
    layer.build(shape)
    jacobians = hl.function(hl.jacobian(lambda: ops.reshape(layer(x), (-1,)), wrt=layer))()
    gradients = hl.function(hl.grad(lambda: ops.sum(layer(x)), wrt=layer))()
    for jacobian, gradient in zip(jacobians, gradients, strict=True):
        close(np.sum(numpy(jacobian), axis=0), gradient, atol=1e-5)


# ---------------------------------------------------------------------- hessians


def test_hessian_of_a_quadratic_form():
    matrix = np.array([[1.0, 2.0], [5.0, -3.0]], "float32")
    close(hl.hessian(lambda x: ops.sum(x * ops.matmul(matrix, x)))(np.ones(2)), matrix + matrix.T)


def test_hessian_mirrors_wrt_twice_with_none_where_not_reached():
    a, b = keras.Variable([1.0, 2.0]), keras.Variable(3.0)
    second = hl.hessian(lambda: ops.sum(a**2) * b, wrt={"a": a, "b": b})()
    close(second["a"]["a"], 6 * np.eye(2))
    close([second["a"]["b"], second["b"]["a"]], [[2, 4]] * 2)
    assert second["b"]["b"] is None
    second = hl.hessian(lambda a, b: a**3, wrt=(0, 1))(2.0, 5.0)
    close(second[0][0], 12)
    assert second[0][1] is None
    assert second[1] == (None, None)
    assert hl.hessian(lambda x: ops.sum(3 * x))(np.ones(2)) is None  # A linear function.


@settings(a_few, max_examples=5)
@given(vectors)
def test_hessian_is_symmetric(x):
    hessian = numpy(hl.hessian(lambda x: x[0] * x[1] * x[2] + ops.sum(ops.sin(x[:2] * x[1:])))(x))
    close(hessian, hessian.T, atol=1e-5)


# ---------------------------------------------------------------------- nesting


def fourth_power(x):
    return x**4


NESTED = {
    "grad of grad of grad": (hl.grad(hl.grad(hl.grad(fourth_power))), 48),
    "grad of jacobian": (hl.grad(lambda x: ops.sum(hl.jacobian(fourth_power)(ops.stack([x, 2 * x])))), 12 * 4 * 9),
    "grad of hessian": (hl.grad(hl.hessian(fourth_power)), 48),
    "jacobian of grad": (hl.jacobian(hl.grad(fourth_power)), 48),
    "jacobian of jacobian": (hl.jacobian(hl.jacobian(fourth_power)), 48),
    "grad of value_and_grad": (hl.grad(lambda x: sum(hl.value_and_grad(fourth_power)(x))), 80),
}


@pytest.mark.parametrize(("nested", "expected"), NESTED.values(), ids=NESTED.keys())
def test_grad_jacobian_and_hessian_nest_in_a_function_and_out_of_it(nested, expected, eagerly):
    close(nested(2.0), expected)
    close(hl.function(nested)(np.float32(2)), expected)


def test_grad_of_a_gradient_by_variables_or_by_something_else():
    w = keras.Variable([1.0, 2.0])

    def slope(x):
        return ops.sum(hl.grad(lambda: ops.sum(w**3 * x), wrt=w)())

    x = ops.ones(2)
    close(hl.grad(slope, wrt=w)(x), [6, 12])
    close(hl.grad(slope)(x), [3, 12])


# ---------------------------------------------------------------------- control flow


def test_grad_through_a_branch_follows_the_chosen_one(eagerly):
    slope = hl.function(hl.grad(lambda x: ops.cond(x > 0, lambda: x**2, lambda: -x)))
    close([slope(np.float32(3)), slope(np.float32(-3))], [6, -1])


def test_grad_through_a_loop_of_fixed_length_and_a_scan(eagerly):
    power = hl.grad(lambda x: ops.fori_loop(0, 3, lambda _, power: power * x, x))
    close(hl.function(power)(np.float32(2)), 4 * 2.0**3)
    product = hl.grad(lambda x: ops.scan(lambda carry, item: (carry * item, carry), 1.0 * x[0], x)[0])
    close(hl.function(product)(np.array([1, 2, 3], "float32")), [12, 3, 2])


# ---------------------------------------------------------------------- exactly once


@each_transform
def test_grad_jacobian_and_hessian_have_the_effects_of_a_function_once(transform, eagerly):
    counter, total = keras.Variable(0, dtype="int32", trainable=False), keras.metrics.Sum()
    normalize, seeds = built(layers.BatchNormalization(momentum=0.5), 2), keras.random.SeedGenerator(7)
    noted, before = keras.Variable(np.zeros(2), trainable=False), numpy(seeds.state)
    data = np.array([[1.0, 2.0], [3.0, 6.0]], "float32")

    def fn(x):
        counter.assign_add(1)
        total.update_state(x)
        noise = keras.random.uniform((2,), seed=seeds)
        noted.assign(noise)
        return ops.sum(normalize(x * ops.convert_to_tensor(data), training=True) ** 3) * x + ops.sum(noise) * x**3

    step = hl.function(transform(fn))
    step(np.float32(2))
    close(normalize.moving_mean, 0.5 * np.mean(2 * data, axis=0))
    close(normalize.moving_variance, 0.5 + 0.5 * np.var(2 * data, axis=0))
    close(noted, keras.random.uniform((2,), seed=keras.random.SeedGenerator(7)))
    same(numpy(seeds.state) - before, [0, 1])
    step(np.float32(5))
    close([counter, total.result()], [2, 7])


def test_grad_of_a_gradient_has_the_effects_of_both_functions_once(eagerly):
    inside, outside = keras.Variable(0.0, trainable=False), keras.Variable(0.0, trainable=False)

    def inner(x):
        inside.assign_add(1.0)
        return x**3

    def outer(x):
        outside.assign_add(1.0)
        return hl.grad(inner)(x)

    hl.function(hl.grad(outer))(np.float32(2))
    close([inside, outside], [1, 1])


def test_value_and_grad_keeps_a_value_assigned_after_its_use(eagerly):
    w = keras.Variable(3.0)

    def fn():
        loss = w**2
        w.assign_add(1.0)
        return loss

    value, gradient = hl.function(hl.value_and_grad(fn, wrt=w))()
    close([value, gradient, w], [9, 6, 4])


# ---------------------------------------------------------------------- custom gradients


@ops.custom_gradient
def log1pexp(z):
    """log(1 + exp(z)) with a gradient that does not overflow."""

    def backward(*args, upstream=None):
        # On PyTorch Keras passes the inputs, and `upstream` by name.
        point, upstream = (z, args[0]) if upstream is None else (args[0], upstream)
        return upstream * ops.sigmoid(point)

    return ops.log(1 + ops.exp(z)), backward


def test_custom_gradient_is_used_by_grad_and_jacobian(eagerly):
    w, slope = keras.Variable(100.0), hl.function(hl.grad(log1pexp))
    close([slope(np.float32(100)), slope(np.float32(0))], [1, 0.5])
    close(hl.grad(lambda z: 3 * log1pexp(z**2))(0.5), 3 / (1 + np.exp(-0.25)))
    close(hl.grad(lambda: log1pexp(w.value), wrt=w)(), 1)
    close(hl.jacobian(log1pexp)(np.array([0.0, 100.0])), np.diag([0.5, 1.0]))
    close(hl.grad(hl.grad(log1pexp))(0.0), 0.25)


def test_custom_gradient_may_reverse(eagerly):
    """The gradient reversal of domain-adversarial training: the identity forward, its negative backward."""

    @ops.custom_gradient
    def reverse(x):
        return ops.copy(x), lambda *args, upstream=None: -(args[0] if upstream is None else upstream)

    close(hl.function(hl.grad(lambda x: ops.sum(reverse(x) ** 2)))(np.array([1, 2], "float32")), [-2, -4])


# ---------------------------------------------------------------------- PyTorch

X = np.array([[0.5, -1.0, 0.2], [1.5, 0.3, -0.7]], "float32")
W = np.array([[0.1, 0.8], [-0.5, 0.4], [0.9, -0.3]], "float32")


def test_grad_jacobian_and_hessian_agree_with_pytorch():
    def hidden(w):
        return ops.tanh(ops.matmul(X, w))

    def loss(w):
        return ops.mean(hidden(w) ** 2)

    def hidden_by_torch(w):
        return torch.tanh(torch.from_numpy(X) @ w)

    def loss_by_torch(w):
        return torch.mean(hidden_by_torch(w) ** 2)

    w = torch.tensor(W, requires_grad=True)
    value, gradient = hl.value_and_grad(loss)(W)
    close(value, loss_by_torch(w).item())
    close(gradient, torch.autograd.grad(loss_by_torch(w), w)[0].numpy())
    close(hl.jacobian(hidden)(W), torch.autograd.functional.jacobian(hidden_by_torch, w).numpy())
    close(hl.hessian(loss)(W), torch.autograd.functional.hessian(loss_by_torch, w).numpy())


@pytest.mark.backend("torch")
def test_value_and_grad_returns_tensors_without_a_graph_of_torch():
    w = keras.Variable([1.0, 2.0])
    (value, aux), gradient = hl.value_and_grad(lambda: (ops.sum(w**2), w * 2), wrt=w, has_aux=True)()
    assert not any(tensor.requires_grad for tensor in [value, aux, gradient])


# ---------------------------------------------------------------------- the functions themselves


@each_transform
def test_grad_and_the_others_keep_the_name_and_docstring_of_the_function(transform):
    assert transform(wave).__name__ == "wave"
    assert transform(wave).__doc__ == wave.__doc__


def test_grad_of_a_method():
    class Parabola:
        scale = 3.0

        def at(self, x):
            return self.scale * x**2

    close(hl.grad(Parabola().at)(2.0), 12)


@pytest.mark.parametrize("transform", [hl.value_and_grad, hl.grad, hl.jacobian, hl.hessian])
def test_grad_of_a_tensor_in_place_of_a_function_says_what_to_type(transform):
    with pytest.raises(GradientError, match=rf"hl\.{transform.__name__} takes .* of shape \(2, 3\).*HL127"):
        transform(ops.ones((2, 3)))


READS = {
    "float": float,
    "format": lambda value: f"{value:.3f}",
    "asarray": np.asarray,
    "numpy": lambda value: value.numpy(),
    "convert_to_numpy": ops.convert_to_numpy,
}


@pytest.mark.backend("jax")
@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("transform", [hl.value_and_grad, hl.grad, hl.jacobian, hl.hessian])
def test_grad_on_jax_says_that_values_cannot_be_read_inside_and_names_the_line(transform, read, eagerly):
    def loss(x):
        READS[read](ops.sum(x))
        return ops.sum(x**2)

    for call in (transform(loss), hl.function(transform(loss))):
        with pytest.raises(TraceError, match=r"On JAX.*has_aux=True.*jax\.debug\.print.*HL128") as raised:
            call(ones(3))
        assert "run_eagerly" not in str(raised.value)
        assert f"({__file__}, line " in str(raised.value)


@pytest.mark.backend("torch")
@pytest.mark.parametrize("read", ["asarray", "numpy"])
@pytest.mark.parametrize("transform", [hl.value_and_grad, hl.grad, hl.jacobian, hl.hessian])
def test_grad_on_torch_says_how_numpy_reads_a_value_and_names_the_line(transform, read, eagerly):
    def loss(x):
        value = ops.sum(x**2)
        READS[read](value)
        return value

    for call in (transform(loss), hl.function(transform(loss))):
        with pytest.raises(TraceError, match=r"NumPy needs .*convert_to_numpy\(x\).*HL126") as raised:
            call(ones(3))
        assert f"({__file__}, line " in str(raised.value)


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="has no values there")
@pytest.mark.parametrize("read", ["float", "format", "convert_to_numpy"])
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
def test_run_eagerly_reads_values_inside_a_differentiated_function_also_of_layers_not_yet_built(read):
    dense, seen = layers.Dense(1, kernel_initializer="ones"), []

    def loss(x):
        value = ops.sum(dense(x))
        seen.append(READS[read](value))
        return value

    with hl.run_eagerly(True):
        value, [of_kernel, of_bias] = hl.function(lambda x: hl.value_and_grad(lambda: loss(x), dense)())(ones(2, 3))
    assert float(seen[-1]) == 6
    close(value, 6)
    close(of_kernel, [[2], [2], [2]])
    close(of_bias, [2])
