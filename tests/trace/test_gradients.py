"""Gradients, against closed forms, finite differences and the native frameworks."""

import functools

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from keras import layers, ops

import handloom as hl
from handloom.errors import GradientError

close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
a_few = settings(max_examples=20, deadline=None, derandomize=True)

TRANSFORMS = [hl.value_and_grad, hl.grad, hl.jacobian, hl.hessian]
each_transform = pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda transform: transform.__name__)


def f(w1, w2):
    return 3 * w1**2 + 2 * w1 * w2


def wave(xp, x):
    """The same function in the words of `keras.ops` and of NumPy."""
    return xp.sum(xp.sin(x) * xp.exp(-0.5 * x)) + xp.max(x) ** 2


def finite_differences(fn, x, step=1e-6):
    x = np.asarray(x, "float64")
    slopes = [(fn(x + step * unit) - fn(x - step * unit)) / (2 * step) for unit in np.eye(x.size)]
    return np.reshape(slopes, x.shape)


def built(layer, *shape):
    layer.build(shape)
    return layer


# ---------------------------------------------------------------------- of arguments


def test_the_value_and_both_gradients_of_a_polynomial():
    value, gradients = hl.value_and_grad(f, wrt=(0, 1))(5.0, 3.0)
    close(value, 105)
    close(gradients, [36, 10])


def test_a_gradient_agrees_with_finite_differences():
    x = np.array([0.3, -1.2, 2.5, 0.9])
    close(hl.grad(functools.partial(wave, ops))(x), finite_differences(functools.partial(wave, np), x))


def test_one_position_gives_one_gradient():
    close(hl.grad(f, wrt=1)(5.0, 3.0), 10)


def test_a_tuple_of_one_position_gives_a_tuple_of_one_gradient():
    (gradient,) = hl.grad(f, wrt=(0,))(5.0, 3.0)
    close(gradient, 36)


def test_positions_come_back_in_the_order_asked_for():
    by_w2, by_w1 = hl.grad(f, wrt=(1, 0))(5.0, 3.0)
    close([by_w2, by_w1], [10, 36])


def test_a_negative_position_counts_from_the_end():
    close(hl.grad(f, wrt=-1)(5.0, 3.0), 10)


def test_other_arguments_may_be_anything():
    def scaled(x, how, *, power):
        return {"double": 2, "triple": 3}[how] * x**power

    close(hl.grad(scaled)(2.0, "triple", power=2), 12)


@pytest.mark.parametrize(
    "three",
    [3.0, np.float32(3), np.float64(3), np.array(3.0), np.array(3, "float32")],
    ids=["float", "float32 scalar", "float64 scalar", "float64 array", "float32 array"],
)
def test_floats_and_numpy_arrays_are_differentiated_in_floatx(three):
    gradient = hl.grad(lambda x: x**2)(three)
    assert keras.backend.standardize_dtype(gradient.dtype) == "float32"
    close(gradient, 6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_gradient_has_the_dtype_of_its_source(dtype):
    gradient = hl.grad(lambda x: ops.sum(ops.cast(x, "float32") ** 2))(ops.ones((2,), dtype))
    assert keras.backend.standardize_dtype(gradient.dtype) == dtype


def test_a_keras_variable_may_be_an_argument():
    variable = keras.Variable(5.0)
    close(hl.grad(f, wrt=(0, 1))(variable, 3.0), [36, 10])


def test_the_function_is_given_the_variable_itself():
    variable = keras.Variable(2.0)

    def fn(given):
        assert given is variable
        return given**2

    close(hl.grad(fn)(variable), 4)


def test_the_value_of_a_variable_may_be_an_argument():
    close(hl.grad(lambda x: x**2)(keras.Variable(3.0).value), 6)


def test_a_structure_as_argument_has_gradients_in_the_same_structure():
    parameters = {"w": [np.array([1.0, 2.0]), keras.Variable(3.0)], "b": (4.0,)}
    gradients = hl.grad(lambda p: ops.sum(p["w"][0] ** 2) * p["w"][1] + p["b"][0] ** 2)(parameters)
    close(gradients["w"][0], [6, 12])
    close(gradients["w"][1], 5)
    close(gradients["b"][0], 8)
    assert isinstance(gradients["b"], tuple)


def test_two_structures_as_arguments():
    gradients = hl.grad(lambda p, q: p["a"] * q[0] + q[1], wrt=(0, 1))({"a": 2.0}, [3.0, 4.0])
    close([gradients[0]["a"], *gradients[1]], [3, 2, 1])


def test_only_the_argument_is_differentiated_not_the_same_tensor_elsewhere():
    x = ops.convert_to_tensor([1.0, 2.0])
    close(hl.grad(lambda argument: ops.sum(argument * x))(x), [1, 2])


def test_one_tensor_as_two_arguments_has_two_gradients():
    x = ops.convert_to_tensor([1.0, 2.0])
    by_first, by_second = hl.grad(lambda a, b: ops.sum(a**2 * b), wrt=(0, 1))(x, x)
    close(by_first, [2, 8])
    close(by_second, [1, 4])


@a_few
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=5), st.floats(-2, 2, width=32))
def test_the_gradient_of_any_polynomial(coefficients, x):
    polynomial = np.polynomial.Polynomial(coefficients)
    gradient = hl.grad(lambda x: sum((c * x**k for k, c in enumerate(coefficients) if k), 0 * x))(x)
    close(gradient, polynomial.deriv()(x), rtol=1e-4, atol=1e-4)


vectors = hnp.arrays("float32", 3, elements=st.floats(-2, 2, width=32))


@a_few
@given(vectors, st.floats(-3, 3, width=32), st.floats(-3, 3, width=32))
def test_a_gradient_is_linear_in_its_function(x, a, b):
    def one(x):
        return ops.sum(ops.sin(x))

    def other(x):
        return ops.prod(x)

    combined = hl.grad(lambda x: a * one(x) + b * other(x))(x)
    close(combined, a * np.asarray(hl.grad(one)(x)) + b * np.asarray(hl.grad(other)(x)), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------- of variables


def test_a_variable_gives_one_gradient():
    w = keras.Variable([1.0, 2.0])
    close(hl.grad(lambda: ops.sum(w**3), wrt=w)(), [3, 12])


def test_a_variable_that_is_not_trainable_is_differentiated_when_asked_for():
    w = keras.Variable(3.0, trainable=False)
    close(hl.grad(lambda: w**2, wrt=w)(), 6)


def test_a_layer_gives_a_list_in_the_order_of_its_trainable_variables():
    dense = built(layers.Dense(2), None, 3)
    x = np.array([[1.0, 2.0, 3.0]])
    by_kernel, by_bias = hl.grad(lambda x: ops.sum(dense(x)), wrt=dense)(x)
    close(by_kernel, [[1, 1], [2, 2], [3, 3]])
    close(by_bias, [1, 1])


def test_a_model_gives_a_list_in_the_order_of_its_trainable_variables():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2, activation="tanh"), layers.Dense(1)])
    gradients = hl.grad(lambda: ops.sum(model(np.ones((4, 3)))), wrt=model)()
    assert [tuple(gradient.shape) for gradient in gradients] == [v.shape for v in model.trainable_variables]
    close(gradients[-1], [4])


def test_a_list_a_tuple_and_a_dict_of_variables_come_back_as_such():
    a, b = keras.Variable(2.0), keras.Variable(3.0)
    listed = hl.grad(lambda: a**2 * b, wrt=[a, b])()
    assert isinstance(listed, list)
    close(listed, [12, 4])
    in_tuple = hl.grad(lambda: a**2 * b, wrt=(a, b))()
    assert isinstance(in_tuple, tuple)
    close(in_tuple, [12, 4])
    by_name = hl.grad(lambda: a**2 * b, wrt={"b": b, "a": a})()
    close([by_name["a"], by_name["b"]], [12, 4])


def test_layers_and_variables_mix_in_a_structure():
    dense, scale = built(layers.Dense(1, use_bias=False), None, 2), keras.Variable(3.0)
    gradients = hl.grad(lambda: ops.sum(dense(np.ones((1, 2)))) * scale, wrt={"net": [dense], "scale": scale})()
    close(gradients["net"][0][0], [[3], [3]])
    close(gradients["scale"], np.sum(dense.kernel))


def test_a_variable_named_twice_has_its_gradient_in_both_places():
    dense = built(layers.Dense(1, use_bias=False), None, 2)
    of_layer, of_kernel = hl.grad(lambda: ops.sum(dense(np.ones((1, 2)))), wrt=[dense, dense.kernel])()
    close(of_layer[0], [[1], [1]])
    close(of_kernel, [[1], [1]])


def test_the_arguments_reach_a_function_differentiated_by_variables():
    w = keras.Variable(3.0)
    close(hl.grad(lambda x, power: ops.sum(x) * w**power, wrt=w)(ops.ones(2), power=2), 12)


def test_an_embedding_has_a_dense_gradient():
    embedding = built(layers.Embedding(4, 2))
    (gradient,) = hl.grad(lambda: ops.sum(embedding(np.array([1, 1, 2]))), wrt=embedding)()
    close(gradient, [[0, 0], [2, 2], [1, 1], [0, 0]])


def test_float32_variables_have_float32_gradients_under_mixed_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    dense = built(layers.Dense(1), None, 2)
    gradients = hl.grad(lambda: ops.sum(dense(np.ones((3, 2), "float32"))), wrt=dense)()
    assert {keras.backend.standardize_dtype(gradient.dtype) for gradient in gradients} == {"float32"}
    close(gradients[0], [[3], [3]])


def test_frozen_layers_inside_a_model_are_left_out():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(3), layers.Dense(1)])
    model.layers[0].trainable = False
    gradients = hl.grad(lambda: ops.sum(model(np.ones((1, 2)))), wrt=model)()
    assert [tuple(gradient.shape) for gradient in gradients] == [(3, 1), (1,)]


def test_a_layer_that_the_function_builds_can_be_differentiated_at_once():
    dense = layers.Dense(1)
    by_kernel, by_bias = hl.grad(lambda x: ops.sum(dense(x)), wrt=dense)(np.ones((2, 3)))
    close(by_kernel, [[2], [2], [2]])
    close(by_bias, [2])


@pytest.mark.parametrize("transform", [hl.grad, hl.jacobian])
def test_a_layer_that_is_built_inside_has_its_values_and_all_effects_happen_once(transform):
    dense = layers.Dense(1, kernel_initializer="ones")
    counter = keras.Variable(0.0, trainable=False)

    def fn(x):
        counter.assign_add(1.0)
        return ops.sum(dense(x) ** 2)

    close(transform(fn)(np.array([[1.0, 2.0]])), [[6, 6]])
    close(counter.numpy(), 1)


def test_building_a_layer_draws_no_numbers_twice():
    keras.utils.set_random_seed(1)
    dense = layers.Dense(1)
    hl.grad(lambda x: ops.sum(dense(x)), wrt=dense)(np.ones((2, 3)))
    keras.utils.set_random_seed(1)
    close(dense.kernel, built(layers.Dense(1), None, 3).kernel)


# ---------------------------------------------------------------------- aux


def test_aux_comes_back_beside_the_value():
    (value, aux), gradient = hl.value_and_grad(lambda x: (x**2, {"doubled": 2 * x}), has_aux=True)(3.0)
    close([value, aux["doubled"], gradient], [9, 6, 6])


def test_grad_with_aux_gives_a_pair():
    gradient, aux = hl.grad(lambda x: (x**2, 2 * x), has_aux=True)(3.0)
    close([gradient, aux], [6, 6])


def test_aux_may_hold_anything():
    marker = object()
    _, aux = hl.grad(lambda x: (x**2, ("text", None, [x, 5], marker)), has_aux=True)(3.0)
    assert aux[0] == "text"
    assert aux[1] is None
    close(aux[2][0], 3)
    assert aux[2][1] == 5
    assert aux[3] is marker


def test_aux_may_be_nothing():
    assert hl.grad(lambda x: (x**2, None), has_aux=True)(3.0)[1] is None


def test_aux_may_be_integers():
    _, aux = hl.grad(lambda x: (ops.sum(x), ops.argmax(x)), has_aux=True)(np.array([1.0, 3.0]))
    assert int(aux) == 1


def test_aux_stays_differentiable_outside(eagerly):
    @hl.function
    def outer(x):
        def squared_aux(x):
            _, aux = hl.grad(lambda x: (x**2, x**3), has_aux=True)(x)
            return aux**2

        return hl.grad(squared_aux)(x)

    close(outer(np.float32(2)), 6 * 2.0**5)


def test_the_pair_that_aux_needs_is_missing():
    with pytest.raises(GradientError, match=r"must return a pair \(value, aux\).*shape \(\)"):
        hl.grad(lambda x: x**2, has_aux=True)(3.0)


# ---------------------------------------------------------------------- not reached


def test_an_unused_argument_has_no_gradient():
    by_used, by_unused = hl.grad(lambda a, b: a**2, wrt=(0, 1))(3.0, 4.0)
    close(by_used, 6)
    assert by_unused is None


def test_an_unused_variable_of_a_layer_has_no_gradient():
    dense = built(layers.Dense(2), None, 3)
    by_kernel, by_bias = hl.grad(lambda: ops.sum(dense.bias), wrt=dense)()
    assert by_kernel is None
    close(by_bias, [1, 1])


def test_what_is_not_reached_has_none_in_its_place_in_a_structure():
    gradients = hl.grad(lambda p: p["a"][0] ** 2)({"a": [3.0, 4.0], "b": (np.ones(2),)})
    close(gradients["a"][0], 6)
    assert gradients["a"][1] is None
    assert gradients["b"] == (None,)


@pytest.mark.backend("jax", "tensorflow")  # Torch's own way: the value of a variable is its memory.
def test_a_variable_as_value_is_what_it_was_then():
    w = keras.Variable(3.0)
    (value, aux), gradient = hl.value_and_grad(lambda: (w, w.value), wrt=w, has_aux=True)()
    w.assign(5.0)
    close([value, aux, gradient], [3, 3, 1])


@pytest.mark.backend("jax", "tensorflow")
def test_the_value_of_a_variable_comes_out_as_it_was_then(eagerly):
    w = keras.Variable(3.0)
    value = hl.function(lambda: w.value)()
    w.assign(5.0)
    close(value, 3)


def test_the_value_of_a_variable_may_be_given_to_a_compiled_function(eagerly):
    w = keras.Variable(3.0)
    square = hl.function(lambda x: x**2)
    close(square(w.value), 9)
    w.assign(5.0)
    close(square(w.value), 25)


def test_a_constant_reaches_nothing():
    value, gradient = hl.value_and_grad(lambda x: 7.0)(3.0)
    close(value, 7)
    assert gradient is None


def test_stop_gradient_on_the_second_term():
    def stopped(w1, w2):
        return 3 * w1**2 + ops.stop_gradient(2 * w1 * w2)

    value, (by_w1, by_w2) = hl.value_and_grad(stopped, wrt=(0, 1))(5.0, 3.0)
    close([value, by_w1], [105, 30])
    assert by_w2 is None


def test_stop_gradient_of_a_variable():
    w = keras.Variable(3.0)
    assert hl.grad(lambda: ops.stop_gradient(w.value) ** 2, wrt=w)() is None


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
def test_operations_without_a_gradient_give_none(fn):
    assert hl.grad(fn)(np.array([1.0, 2.0, 3.0])) is None


@pytest.mark.backend("jax", "torch")  # TensorFlow's own gradient of sign is zero.
def test_sign_gives_none():
    assert hl.grad(lambda x: ops.sum(ops.sign(x)))(np.array([1.0, -2.0])) is None


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "op by op"])
def test_a_slice_that_is_updated_takes_its_gradients_with_it(compiled):
    weights = np.arange(1.0, 13.0, dtype="float32").reshape(3, 4)

    def loss(inputs, updates):
        return ops.sum(ops.multiply(weights, ops.slice_update(inputs, (1, 2), updates) ** 2))

    gradients = hl.grad(loss, wrt=(0, 1))
    of_inputs, of_updates = (hl.function(gradients) if compiled else gradients)(
        np.full((3, 4), 5.0, "float32"), np.full((2, 2), 7.0, "float32")
    )
    outside = np.ones((3, 4))
    outside[1:, 2:] = 0
    close(of_inputs, 10 * weights * outside)
    close(of_updates, 14 * weights[1:, 2:])


def counted(weights):
    return ops.sum(ops.convert_to_tensor([1.0, 10.0, 100.0]) * ops.bincount(np.array([2, 0, 2]), weights=weights))


@pytest.mark.backend("jax", "tensorflow")
def test_weights_that_are_counted_have_a_gradient():
    close(hl.grad(counted)(np.ones(3, "float32")), [100.0, 1.0, 100.0])


@pytest.mark.backend("torch")
@pytest.mark.parametrize("transform", [hl.grad, lambda fn: hl.function(hl.grad(fn))], ids=["op by op", "compiled"])
def test_an_operation_that_cannot_be_derived_is_named(transform):
    with pytest.raises(GradientError, match=r"no derivative of the operation \S*bincount\S*\. .*custom_gradient"):
        transform(counted)(np.ones(3, "float32"))


def test_a_path_without_gradient_does_not_hide_one_with():
    close(hl.grad(lambda x: ops.sum(ops.round(x) * x))(np.array([1.2, 2.8])), [1, 3])


def test_zero_is_not_none():
    close(hl.grad(lambda x: ops.sum(ops.relu(x)))(np.array([-1.0, -2.0])), [0, 0])
    close(hl.grad(lambda x: ops.sum(0 * x))(np.array([1.0, 2.0])), [0, 0])


def test_none_inside_a_compiled_function(eagerly):
    @hl.function
    def both(a, b):
        return hl.grad(lambda a, b: a**2 + ops.stop_gradient(b), wrt=(0, 1))(a, b)

    by_a, by_b = both(np.float32(3), np.float32(4))
    close(by_a, 6)
    assert by_b is None


# ---------------------------------------------------------------------- wrong values


@pytest.mark.parametrize("transform", [hl.value_and_grad, hl.grad, hl.hessian])
def test_a_value_that_is_no_scalar_shows_its_shape_and_two_cures(transform):
    with pytest.raises(GradientError, match=r"shape \(2, 3\).*keras\.ops\.sum.*hl\.jacobian"):
        transform(lambda x: x**2)(np.ones((2, 3)))


def test_a_value_of_shape_one_is_no_scalar():
    with pytest.raises(GradientError, match=r"shape \(1,\)"):
        hl.grad(lambda x: x**2)(np.ones(1))


@each_transform
def test_an_integer_value_names_its_dtype(transform):
    with pytest.raises(GradientError, match="floating-point tensor; it returned one of dtype int32"):
        transform(lambda x: ops.sum(ops.cast(x, "int32")))(np.ones(3))


@each_transform
@pytest.mark.parametrize("value", [None, "text", [1.0]], ids=repr)
def test_a_value_that_is_no_tensor_is_shown(transform, value):
    with pytest.raises(GradientError, match=r"must return a floating-point tensor; it returned .* \(of type "):
        transform(lambda x: value)(3.0)


def test_more_than_one_value_offers_aux():
    with pytest.raises(GradientError, match="use has_aux=True"):
        hl.grad(lambda x: (x**2, x))(3.0)


# ---------------------------------------------------------------------- wrong sources


def test_a_python_int_is_offered_as_a_float():
    with pytest.raises(GradientError, match=r"square cannot be differentiated .* 3 \(of type int\)\. Pass 3\.0\."):
        hl.grad(_square)(3)


def test_an_integer_array_is_to_be_cast():
    with pytest.raises(GradientError, match=r"_square .* dtype int32.*keras\.ops\.cast\(x, 'float32'\)"):
        hl.grad(_square)(np.array([1, 2], "int32"))


def test_text_is_no_source():
    with pytest.raises(GradientError, match=r"not a tensor, array or float: 'text' \(of type str\)"):
        hl.grad(_square)("text")


def _square(x):
    return ops.sum(x**2)


def test_a_position_beyond_the_arguments():
    with pytest.raises(GradientError, match=r"wrt=1, but _square was called with 1 .*0 to 0"):
        hl.grad(_square, wrt=1)(3.0)


def test_a_position_of_an_argument_passed_by_name():
    with pytest.raises(GradientError, match="Pass the argument by position"):
        hl.grad(_square)(x=3.0)


NO_WRT = [None, "kernel", 1.5, True, [0, 1], {"x": object()}]


@pytest.mark.parametrize("wrt", NO_WRT, ids=lambda wrt: repr(wrt).split(" at ")[0])  # Without an address.
def test_anything_else_as_wrt_says_what_it_takes(wrt):
    with pytest.raises(GradientError, match=r"wrt takes positions of arguments .* or Keras variables.*received"):
        hl.grad(_square, wrt=wrt)(3.0)


@pytest.mark.parametrize("wrt", [[], (), {}], ids=repr)
def test_an_empty_wrt_is_nothing_to_differentiate(wrt):
    with pytest.raises(GradientError, match="nothing to differentiate with respect to"):
        hl.grad(_square, wrt=wrt)(3.0)


def test_grad_of_a_frozen_layer_says_how_to_unfreeze_it():
    dense = built(layers.Dense(1, name="cold"), None, 2)
    dense.trainable = False
    with pytest.raises(GradientError, match=r"name=cold.*frozen.*layer\.trainable = True"):
        hl.grad(lambda: ops.sum(dense(np.ones((1, 2)))), wrt=dense)()


def test_a_layer_that_is_never_called_says_it_is_not_built():
    dense = layers.Dense(1, name="idle")
    with pytest.raises(GradientError, match=r"name=idle.*before it is built.*Call it once on data"):
        hl.grad(_square, wrt=dense)(3.0)


def test_one_variable_as_two_arguments():
    w = keras.Variable(1.0, name="w")
    with pytest.raises(GradientError, match="two arguments that are the same variable"):
        hl.grad(f, wrt=(0, 1))(w, w)


def test_after_an_error_everything_works_as_before():
    @hl.function
    def compiled(x):
        return x**2

    with pytest.raises(GradientError):
        hl.grad(lambda x: ops.stack([x, x]))(3.0)
    close(compiled(np.float32(3)), 9)
    assert compiled.traces  # Not taken for part of a function that is still being differentiated.


# ---------------------------------------------------------------------- jacobians


def test_the_jacobian_of_a_linear_map_is_its_matrix():
    matrix = np.arange(6.0).reshape(2, 3)
    close(hl.jacobian(lambda x: ops.matmul(matrix.astype("float32"), x))(np.ones(3)), matrix)


def test_a_jacobian_has_the_shape_of_the_value_and_then_of_the_source():
    jacobian = hl.jacobian(lambda x: ops.matmul(ops.ones((2, 3)), x))(np.ones((3, 4)))
    assert tuple(jacobian.shape) == (2, 4, 3, 4)
    expected = np.einsum("ik,jl->ijkl", np.ones((2, 3)), np.eye(4))
    close(jacobian, expected)


def test_the_jacobian_of_a_scalar_is_its_gradient():
    x = np.array([0.5, 1.0, 2.0])
    close(hl.jacobian(functools.partial(wave, ops))(x), np.asarray(hl.grad(functools.partial(wave, ops))(x)))


def test_a_jacobian_of_a_layer():
    dense = built(layers.Dense(2), None, 3)
    x = np.array([[1.0, 2.0, 3.0]])
    by_kernel, by_bias = hl.jacobian(lambda x: dense(x)[0], wrt=dense)(x)
    close(by_kernel, np.einsum("ij,k->ikj", np.eye(2), x[0]))
    close(by_bias, np.eye(2))


def test_a_jacobian_mirrors_structures_with_none_for_what_is_not_reached():
    jacobians = hl.jacobian(lambda p: p["a"] ** 2)({"a": np.array([1.0, 2.0]), "b": 3.0})
    close(jacobians["a"], np.diag([2.0, 4.0]))
    assert jacobians["b"] is None


def test_a_jacobian_of_two_positions():
    by_x, by_scale = hl.jacobian(lambda x, scale: scale * x, wrt=(0, 1))(np.array([1.0, 2.0]), 3.0)
    close(by_x, 3 * np.eye(2))
    close(by_scale, [1, 2])


@pytest.mark.parametrize("layer", [layers.Conv2D(2, 2), layers.LSTM(2)], ids=["convolution", "recurrent"])
def test_a_jacobian_of_a_layer_sums_up_to_the_gradient_of_its_sum(layer):
    # Operations that each backend vectorizes in its own way, a loop among them.
    shape = (1, 3, 3, 1) if isinstance(layer, layers.Conv2D) else (1, 3, 2)
    x = np.linspace(-1, 1, int(np.prod(shape)), dtype="float32").reshape(shape)
    layer.build(shape)
    jacobians = hl.function(hl.jacobian(lambda: ops.reshape(layer(x), (-1,)), wrt=layer))()
    gradients = hl.function(hl.grad(lambda: ops.sum(layer(x)), wrt=layer))()
    for jacobian, gradient in zip(jacobians, gradients, strict=True):
        close(np.sum(np.asarray(jacobian), axis=0), gradient, atol=1e-5)


# ---------------------------------------------------------------------- hessians


def test_the_second_derivatives_of_a_polynomial():
    (w11, w12), (w21, w22) = hl.hessian(f, wrt=(0, 1))(5.0, 3.0)
    close([w11, w12, w21], [6, 2, 2])
    assert w22 is None


def test_the_hessian_of_a_quadratic_form():
    matrix = np.array([[1.0, 2.0], [5.0, -3.0]], "float32")
    close(hl.hessian(lambda x: ops.sum(x * ops.matmul(matrix, x)))(np.ones(2)), matrix + matrix.T)


def test_a_linear_function_has_no_second_derivative():
    assert hl.hessian(lambda x: ops.sum(3 * x))(np.ones(2)) is None


def test_a_hessian_mirrors_variables_twice():
    a, b = keras.Variable([1.0, 2.0]), keras.Variable(3.0)
    second = hl.hessian(lambda: ops.sum(a**2) * b, wrt={"a": a, "b": b})()
    close(second["a"]["a"], 6 * np.eye(2))
    close(second["a"]["b"], [2, 4])
    close(second["b"]["a"], [2, 4])
    assert second["b"]["b"] is None


def test_a_hessian_has_rows_of_none_for_what_is_not_reached():
    second = hl.hessian(lambda a, b: a**3, wrt=(0, 1))(2.0, 5.0)
    close(second[0][0], 12)
    assert second[0][1] is None
    assert second[1] == (None, None)


@settings(a_few, max_examples=5)
@given(vectors)
def test_a_hessian_is_symmetric(x):
    hessian = np.asarray(hl.hessian(lambda x: x[0] * x[1] * x[2] + ops.sum(ops.sin(x[:2] * x[1:])))(x))
    close(hessian, hessian.T, atol=1e-5)


# ---------------------------------------------------------------------- nesting


def test_derivatives_of_derivatives():
    def cube(x):
        return x**3

    close(hl.grad(hl.grad(cube))(2.0), 12)
    close(hl.grad(hl.grad(hl.grad(cube)))(2.0), 6)


def test_derivatives_of_derivatives_by_variables():
    w = keras.Variable([1.0, 2.0])

    def slope():
        return ops.sum(hl.grad(lambda: ops.sum(w**3), wrt=w)())

    close(hl.grad(slope, wrt=w)(), [6, 12])


def test_each_level_may_differentiate_by_something_else():
    w = keras.Variable([1.0, 2.0])

    def slope(x):
        return ops.sum(hl.grad(lambda: ops.sum(w**3 * x), wrt=w)())

    close(hl.grad(slope)(np.array([1.0, 1.0])), [3, 12])


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
def test_everything_nests_in_a_compiled_function_and_out_of_it(nested, expected, eagerly):
    close(nested(2.0), expected)
    close(hl.function(nested)(np.float32(2)), expected)


def penalty(x, w):
    """The mean square of the slope of sum(tanh(x w)) in x."""
    slopes = hl.grad(lambda x: ops.sum(ops.tanh(ops.matmul(x, w))))(x)
    return ops.mean(slopes**2)


def test_a_gradient_inside_a_loss_agrees_with_finite_differences(eagerly):
    x, w = np.array([[0.5, -1.0], [0.2, 0.3]], "float32"), np.array([0.7, -0.4], "float32")

    def in_numpy(w):
        slopes = (1 - np.tanh(x @ w) ** 2)[:, None] * w
        return np.mean(slopes**2)

    @hl.function
    def gradient(x, w):
        return hl.grad(penalty, wrt=1)(x, w[:, None])

    close(gradient(x, w)[:, 0], finite_differences(in_numpy, w))


def test_a_penalty_on_the_slope_of_a_model_reaches_its_weights(eagerly):
    dense = built(layers.Dense(1), None, 2)
    dense.kernel.assign([[3.0], [4.0]])

    @hl.function
    def gradients(x):
        def loss():
            slopes = hl.grad(lambda x: ops.sum(dense(x)))(x)
            return ops.mean(ops.sum(slopes**2, axis=-1))

        return hl.grad(loss, wrt=dense)()

    by_kernel, by_bias = gradients(np.ones((5, 2), "float32"))
    close(by_kernel, [[6], [8]])
    assert by_bias is None


def test_a_gradient_through_an_update(eagerly):
    """One step of gradient descent on a quadratic, differentiated by its start and by its learning rate."""
    curvature, target, wanted = 3.0, 2.0, 5.0

    @hl.function
    def through(start, rate):
        def after(start, rate):
            updated = start - rate * hl.grad(lambda w: curvature / 2 * (w - target) ** 2)(start)
            return (updated - wanted) ** 2 / 2

        return hl.grad(after, wrt=(0, 1))(start, rate)

    slope = curvature * (1.0 - target)
    updated = 1.0 - 0.1 * slope
    close(
        through(np.float32(1), np.float32(0.1)),
        [(updated - wanted) * (1 - 0.1 * curvature), (wanted - updated) * slope],
    )


def test_compiled_functions_are_differentiated_through():
    @hl.function
    def cube(x):
        return x**3

    close(hl.grad(cube)(2.0), 12)
    close(hl.grad(hl.grad(cube))(2.0), 12)


# ---------------------------------------------------------------------- control flow


def test_a_branch_is_differentiated_where_it_went(eagerly):
    @hl.function
    def slope(x):
        return hl.grad(lambda x: ops.cond(x > 0, lambda: x**2, lambda: -x))(x)

    close([slope(np.float32(3)), slope(np.float32(-3))], [6, -1])


def test_a_loop_of_fixed_length_is_differentiated(eagerly):
    @hl.function
    def slope(x):
        return hl.grad(lambda x: ops.fori_loop(0, 3, lambda _, power: power * x, x))(x)

    close(slope(np.float32(2)), 4 * 2.0**3)


def test_a_scan_is_differentiated(eagerly):
    @hl.function
    def slope(x):
        return hl.grad(lambda x: ops.scan(lambda carry, item: (carry * item, carry), 1.0 * x[0], x)[0])(x)

    close(slope(np.array([1, 2, 3], "float32")), [12, 3, 2])


# ---------------------------------------------------------------------- exactly once


@each_transform
def test_a_counter_counts_once(transform, eagerly):
    counter = keras.Variable(0, dtype="int32", trainable=False)

    def fn(x):
        counter.assign_add(1)
        return x**3

    step = hl.function(transform(fn))
    for _ in range(3):
        step(np.float32(2))
    assert int(counter.value) == 3


@each_transform
def test_a_metric_is_updated_once(transform, eagerly):
    total = keras.metrics.Sum()

    def fn(x):
        total.update_state(x)
        return x**3

    step = hl.function(transform(fn))
    step(np.float32(2))
    step(np.float32(5))
    close(total.result(), 7)


@each_transform
def test_batch_statistics_move_once(transform, eagerly):
    normalize = built(layers.BatchNormalization(momentum=0.5), None, 2)
    x = np.array([[1.0, 2.0], [3.0, 6.0]], "float32")

    def fn(scale):
        return ops.sum(normalize(scale * ops.convert_to_tensor(x), training=True) ** 3) * scale

    hl.function(transform(fn))(np.float32(2))
    close(normalize.moving_mean, 0.5 * np.mean(2 * x, axis=0))
    close(normalize.moving_variance, 0.5 + 0.5 * np.var(2 * x, axis=0))


@each_transform
def test_seeds_advance_once_and_give_their_own_numbers(transform, eagerly):
    seeds = keras.random.SeedGenerator(7)
    before = np.array(seeds.state.value)
    noted = keras.Variable(np.zeros(2), trainable=False)

    def fn(x):
        noise = keras.random.uniform((2,), seed=seeds)
        noted.assign(noise)
        return ops.sum(noise) * x**2

    hl.function(transform(fn))(np.float32(2))
    close(np.array(seeds.state.value) - before, [0, 1])
    close(noted, np.asarray(keras.random.uniform((2,), seed=keras.random.SeedGenerator(7))))


def test_effects_of_nested_functions_happen_once(eagerly):
    inside, outside = keras.Variable(0.0, trainable=False), keras.Variable(0.0, trainable=False)

    def inner(x):
        inside.assign_add(1.0)
        return x**3

    def outer(x):
        outside.assign_add(1.0)
        return hl.grad(inner)(x)

    hl.function(hl.grad(outer))(np.float32(2))
    close([inside.value, outside.value], [1, 1])


def test_effects_happen_once_outside_of_compiled_functions():
    counter = keras.Variable(0.0, trainable=False)

    def fn(x):
        counter.assign_add(1.0)
        return x**3

    for transform in TRANSFORMS:
        transform(fn)(2.0)
    close(counter.value, len(TRANSFORMS))


def test_a_variable_written_after_it_was_used_keeps_the_new_value(eagerly):
    w = keras.Variable(3.0)

    def fn():
        loss = w**2
        w.assign_add(1.0)
        return loss

    value, gradient = hl.function(hl.value_and_grad(fn, wrt=w))()
    close([value, gradient, w.numpy()], [9, 6, 4])


# ---------------------------------------------------------------------- custom gradients


@ops.custom_gradient
def log1pexp(z):
    """log(1 + exp(z)), whose gradient does not overflow with its value."""

    def backward(*args, upstream=None):
        # On torch Keras calls it with the inputs, and with upstream by name.
        point, upstream = (z, args[0]) if upstream is None else (args[0], upstream)
        return upstream * ops.sigmoid(point)

    return ops.log(1 + ops.exp(z)), backward


def test_the_naive_form_has_no_gradient_where_it_overflows():
    assert np.isnan(float(hl.grad(lambda z: ops.log(ops.exp(z) + 1))(100.0)))


def test_a_custom_gradient_is_used(eagerly):
    slope = hl.function(hl.grad(log1pexp))
    close([slope(np.float32(100)), slope(np.float32(0))], [1, 0.5])


def test_the_stable_form_needs_none():
    close(hl.value_and_grad(ops.softplus)(100.0), [100, 1])


def test_a_custom_gradient_inside_a_larger_function():
    close(hl.grad(lambda z: 3 * log1pexp(z**2))(0.5), 3 / (1 + np.exp(-0.25)))


def test_a_custom_gradient_of_the_value_of_a_variable():
    w = keras.Variable(100.0)
    close(hl.grad(lambda: log1pexp(w.value), wrt=w)(), 1)


def test_a_custom_gradient_in_a_jacobian():
    close(hl.jacobian(log1pexp)(np.array([0.0, 100.0])), np.diag([0.5, 1.0]))


def test_a_custom_gradient_is_differentiated_again():
    close(hl.grad(hl.grad(log1pexp))(0.0), 0.25)


def test_a_custom_gradient_may_reverse(eagerly):
    """The gradient reversal of domain-adversarial training: forward the identity, backward its negative."""

    @ops.custom_gradient
    def reverse(x):
        return ops.copy(x), lambda *args, upstream=None: -(args[0] if upstream is None else upstream)

    close(hl.function(hl.grad(lambda x: ops.sum(reverse(x) ** 2)))(np.array([1, 2], "float32")), [-2, -4])


# ---------------------------------------------------------------------- the native frameworks

X = np.array([[0.5, -1.0, 0.2], [1.5, 0.3, -0.7]], "float32")
W = np.array([[0.1, 0.8], [-0.5, 0.4], [0.9, -0.3]], "float32")


def hidden(w):
    return ops.tanh(ops.matmul(X, w))


def loss_of(w):
    return ops.mean(hidden(w) ** 2)


@pytest.mark.backend("jax")
def test_all_agree_with_jax():
    jax, jnp = pytest.importorskip("jax"), pytest.importorskip("jax.numpy")

    def native_hidden(w):
        return jnp.tanh(X @ w)

    def native_loss(w):
        return jnp.mean(native_hidden(w) ** 2)

    def native_penalty(x, w):
        return jnp.mean(jax.grad(lambda x: jnp.sum(jnp.tanh(x @ w)))(x) ** 2)

    for ours, theirs in zip(hl.value_and_grad(loss_of)(W), jax.jit(jax.value_and_grad(native_loss))(W), strict=True):
        close(ours, theirs)
    close(hl.jacobian(hidden)(W), jax.jit(jax.jacobian(native_hidden))(W))
    close(hl.hessian(loss_of)(W), jax.jit(jax.hessian(native_loss))(W))
    close(hl.grad(penalty, wrt=1)(X, W), jax.jit(jax.grad(native_penalty, argnums=1))(X, W))


@pytest.mark.backend("torch")
def test_all_agree_with_torch():
    torch = pytest.importorskip("torch")

    def native_hidden(w):
        return torch.tanh(torch.from_numpy(X) @ w)

    def native_loss(w):
        return torch.mean(native_hidden(w) ** 2)

    w = torch.tensor(W, requires_grad=True)
    value = native_loss(w)
    close(hl.value_and_grad(loss_of)(W)[0], value.detach())
    close(hl.value_and_grad(loss_of)(W)[1], torch.autograd.grad(value, w)[0])
    close(hl.jacobian(hidden)(W), torch.autograd.functional.jacobian(native_hidden, w))
    close(hl.hessian(loss_of)(W), torch.autograd.functional.hessian(native_loss, w))
    x = torch.tensor(X, requires_grad=True)
    (slopes,) = torch.autograd.grad(torch.tanh(x @ w).sum(), x, create_graph=True)
    close(hl.grad(penalty, wrt=1)(X, W), torch.autograd.grad((slopes**2).mean(), w)[0])


@pytest.mark.backend("tensorflow")
def test_all_agree_with_tensorflow():
    tf = pytest.importorskip("tensorflow")

    x, w = tf.constant(X), tf.constant(W)
    with tf.GradientTape(persistent=True) as outer:
        outer.watch(w)
        with tf.GradientTape(persistent=True) as tape:
            tape.watch([x, w])
            activations = tf.tanh(x @ w)
            total, loss = tf.reduce_sum(activations), tf.reduce_mean(activations**2)
        gradient, slopes = tape.gradient(loss, w), tape.gradient(total, x)
        native_penalty = tf.reduce_mean(slopes**2)
    close(hl.value_and_grad(loss_of)(W)[0], loss)
    close(hl.value_and_grad(loss_of)(W)[1], gradient)
    close(hl.jacobian(hidden)(W), tape.jacobian(activations, w))
    close(hl.hessian(loss_of)(W), outer.jacobian(gradient, w))
    close(hl.grad(penalty, wrt=1)(X, W), outer.gradient(native_penalty, w))


@pytest.mark.backend("torch")
def test_what_comes_out_holds_no_graph_of_torch():
    w = keras.Variable([1.0, 2.0])
    (value, aux), gradient = hl.value_and_grad(lambda: (ops.sum(w**2), w * 2), wrt=w, has_aux=True)()
    assert not any(tensor.requires_grad for tensor in [value, aux, gradient])


# ---------------------------------------------------------------------- the functions themselves


@each_transform
def test_what_is_made_keeps_the_name_and_docstring_of_the_function(transform):
    assert transform(loss_of).__name__ == "loss_of"
    assert transform(wave).__doc__ == wave.__doc__


def test_a_method_can_be_differentiated():
    class Parabola:
        scale = 3.0

        def at(self, x):
            return self.scale * x**2

    close(hl.grad(Parabola().at)(2.0), 12)
