"""Gradients of any function with respect to arguments or variables, nested at will.

This module handles arguments and structure; the backend does the arithmetic.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import optree

from handloom._keras import Tensor, Tensors, Variable, get_keras_mask, keras, layers_of, set_keras_mask
from handloom._trace.losses import InnerLosses
from handloom._trace.observe import building, observing, tell
from handloom._trace.structure import Structure
from handloom._util.short import short
from handloom.backends import backend
from handloom.errors import GradientError

Wrt: TypeAlias = Any
"""A position, a tuple of positions, or Keras variables: a variable, a layer, or a list, tuple or dict of these."""


# Without `__module__`: AutoGraph would take the function for the user's code, and convert it.
_named_as = functools.partial(functools.wraps, assigned=("__name__", "__qualname__", "__doc__"), updated=())


def value_and_grad(fn: Callable[..., Any], wrt: Wrt = 0, *, has_aux: bool = False) -> Callable[..., Any]:
    """Makes a function that computes the value of `fn` and its gradients.

    Args:
        fn: Returns a scalar floating-point tensor, or, with `has_aux`, a pair of that and anything else. It may read
            and write variables; each of its updates happens exactly once.
        wrt: The sources to differentiate with respect to: a position in `fn`'s arguments or a tuple of positions (of
            tensors, NumPy arrays, Python floats, Keras variables, or structures of these), or Keras variables: one
            variable, a layer or model (its trainable variables), or a list, tuple or dict of these.
        has_aux: Whether `fn` returns a pair, whose first part alone is differentiated.

    Returns:
        A function of `fn`'s arguments that returns `(value, gradients)`, or `((value, aux), gradients)`. Gradients
        mirror `wrt`: each has the shape and dtype of its source; those of a layer are a list in the order of
        `layer.trainable_variables`; a source that does not reach the value through differentiable operations has the
        gradient `None`.

    Raises:
        GradientError: The value is not a floating-point scalar, or a source cannot be differentiated.

    Example:
        `loss, gradients = hl.value_and_grad(lambda: loss_fn(y, model(x)), wrt=model)()`
    """
    _check_function(fn, "hl.value_and_grad")

    @_named_as(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        tell("differentiates")
        sources = _sources(wrt, fn, args)
        rest = _Rest()

        def call(*tensors: Tensor) -> tuple[Tensor, list[Tensor]]:
            inner = InnerLosses()
            with observing(inner):
                result = backend.with_control_flow(fn)(*sources.arguments(tensors), **kwargs)
            value, aux = split(result) if has_aux else (result, None)
            return scalar(value), rest.put((aux, inner.added))

        value, tensors, of_tensors, of_variables = backend.value_and_grad(call, sources.tensors, sources.variables)
        gradients = sources.mirror(of_tensors, list(map(backend.dense, of_variables)))
        aux, added = rest.get(tensors)
        for layer, loss in added:
            tell("loss_added", layer, loss)
        tell("differentiated", value)
        return ((value, aux), gradients) if has_aux else (value, gradients)

    return wrapped


def grad(fn: Callable[..., Any], wrt: Wrt = 0, *, has_aux: bool = False) -> Callable[..., Any]:
    """Makes a function that computes the gradients of `fn`.

    Args:
        fn: As for `hl.value_and_grad`.
        wrt: As for `hl.value_and_grad`.
        has_aux: As for `hl.value_and_grad`.

    Returns:
        A function of `fn`'s arguments that returns the gradients, or `(gradients, aux)`.

    Raises:
        GradientError: As `hl.value_and_grad`.
    """
    _check_function(fn, "hl.grad")
    both = value_and_grad(fn, wrt, has_aux=has_aux)

    @_named_as(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        value, gradients = both(*args, **kwargs)
        return (gradients, value[1]) if has_aux else gradients

    return wrapped


def jacobian(fn: Callable[..., Any], wrt: Wrt = 0) -> Callable[..., Any]:
    """Makes a function that computes all first derivatives of a tensor of any shape.

    Args:
        fn: Returns a floating-point tensor.
        wrt: As for `hl.value_and_grad`.

    Returns:
        A function of `fn`'s arguments whose result mirrors `wrt`. Each derivative has the shape of the value followed
        by the shape of its source, or is `None`.

    Raises:
        GradientError: The value is not a floating-point tensor, or a source cannot be differentiated.
    """
    _check_function(fn, "hl.jacobian")

    @_named_as(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        tell("differentiates")
        sources = _sources(wrt, fn, args)

        def call(*tensors: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            return [_floating(backend.with_control_flow(fn)(*sources.arguments(tensors), **kwargs))], []

        _, _, [row] = backend.jacobian(call, sources.tensors, sources.variables)
        return sources.mirror(*row)

    return wrapped


def hessian(fn: Callable[..., Any], wrt: Wrt = 0) -> Callable[..., Any]:
    """Makes a function that computes all second derivatives of a scalar.

    Args:
        fn: Returns a scalar floating-point tensor.
        wrt: As for `hl.value_and_grad`.

    Returns:
        A function of `fn`'s arguments whose result mirrors `wrt` twice, outside for the gradient and inside for its
        derivative: for two scalars `[[d2/dada, d2/dadb], [d2/dbda, d2/dbdb]]`. Each has the shape of one source
        followed by the shape of the other, or is `None` if the gradient does not depend on the source.

    Raises:
        GradientError: As `hl.value_and_grad`.
    """
    _check_function(fn, "hl.hessian")

    @_named_as(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        tell("differentiates")
        sources = _sources(wrt, fn, args)
        present: list[bool] = []

        def first(*tensors: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            def call(*inner: Tensor) -> tuple[Tensor, list[Tensor]]:
                return scalar(backend.with_control_flow(fn)(*sources.arguments(inner), **kwargs)), []

            _, _, of_tensors, of_variables = backend.value_and_grad(call, tensors, sources.variables)
            gradients = [*of_tensors, *of_variables]
            present[:] = [gradient is not None for gradient in gradients]
            return [gradient for gradient in gradients if gradient is not None], []

        rows = iter(backend.jacobian(first, sources.tensors, sources.variables)[2])
        nothing: tuple[list[None], list[None]] = ([None] * len(sources.tensors), [None] * len(sources.variables))
        mirrored = [sources.mirror(*(next(rows) if found else nothing)) for found in present]
        count = len(sources.tensors)
        return sources.mirror(mirrored[:count], mirrored[count:])

    return wrapped


def gradients_of(fn: Callable[[], tuple[Tensor, Any]], variables: list[Variable]) -> tuple[Any, list[Tensor | None]]:
    """Differentiates a scalar with respect to variables.

    Args:
        fn: Returns a scalar and anything else.
        variables: The variables to differentiate with respect to.

    Returns:
        The second result of `fn`, and the gradients, in the backend's own forms.
    """
    rest = _Rest()
    _, tensors, _, gradients = backend.value_and_grad(rest.of(fn), [], variables)
    return rest.get(tensors), gradients


def gradients_of_each(
    fn: Callable[[], tuple[list[Tensor], Any]], variables: list[Variable]
) -> tuple[Any, list[list[Tensor | None]]]:
    """Differentiates several scalars in one run.

    Args:
        fn: Returns a list of scalars and anything else.
        variables: The variables to differentiate with respect to.

    Returns:
        The second result of `fn`, and for each scalar a list of gradients.
    """
    rest = _Rest()
    _, tensors, rows = backend.jacobian(rest.of(fn), [], variables)
    return rest.get(tensors), [gradients for _, gradients in rows]


class _Positions:
    """Arguments as sources of a gradient."""

    def __init__(self, positions: Sequence[int], single: bool, fn: Callable[..., Any], args: Sequence[Any]) -> None:
        for position in positions:
            if not -len(args) <= position < len(args):
                raise GradientError(
                    f"HL112: wrt={position}, but {_name(fn)} was called with {len(args)} positional argument(s).",
                    fix=f"Pass the argument by position, or choose one of 0 to {len(args) - 1}.",
                )
        self._positions = [position % len(args) for position in positions]
        self._single = single
        others = set(range(len(args))) - set(self._positions)
        self._args = [_with_tensors(argument) if index in others else argument for index, argument in enumerate(args)]
        leaves, self._structure = optree.tree_flatten([args[position] for position in self._positions])
        self._is_variable = [isinstance(leaf, keras.Variable) for leaf in leaves]
        self.variables = [leaf for leaf in leaves if isinstance(leaf, keras.Variable)]
        self.tensors = [_source_tensor(leaf, fn) for leaf in leaves if not isinstance(leaf, keras.Variable)]
        if len(set(map(id, self.variables))) < len(self.variables):
            names = [variable.path for variable in self.variables]
            raise GradientError(f"HL122: wrt names two arguments that are the same variable: {names}.")

    def arguments(self, tensors: Tensors) -> list[Any]:
        """The arguments of the function, with these tensors as sources. Variables stay themselves."""
        args = list(self._args)
        replaced = self._filled(tensors, self.variables)
        for position, argument in zip(self._positions, replaced, strict=True):
            args[position] = argument
        return args

    def mirror(self, of_tensors: Sequence[Any], of_variables: Sequence[Any]) -> Any:
        mirrored = self._filled(of_tensors, of_variables)
        return mirrored[0] if self._single else tuple(mirrored)

    def _filled(self, for_tensors: Sequence[Any], for_variables: Sequence[Any]) -> list[Any]:
        tensors, variables = iter(for_tensors), iter(for_variables)
        leaves = [next(variables) if is_variable else next(tensors) for is_variable in self._is_variable]
        filled: list[Any] = optree.tree_unflatten(self._structure, leaves)
        return filled


class _Variables:
    """Variables as sources of a gradient."""

    tensors: Tensors = ()

    def __init__(self, wrt: Wrt, fn: Callable[[], Any], args: Sequence[Any]) -> None:
        self._wrt = wrt
        self._args = args
        build(wrt, lambda: fn(*args))
        self.variables = variables_of(wrt)

    def arguments(self, tensors: Tensors) -> Sequence[Any]:
        return self._args

    def mirror(self, of_tensors: Sequence[Any], of_variables: Sequence[Any]) -> Any:
        gradients = dict(zip(map(id, self.variables), of_variables, strict=True))

        def gradient(leaf: Any) -> Any:
            if isinstance(leaf, keras.Layer):
                return [gradients[id(variable)] for variable in leaf.trainable_variables]
            return gradients[id(leaf)]

        return keras.tree.map_structure(gradient, self._wrt)


def _sources(wrt: Wrt, fn: Callable[..., Any], args: Sequence[Any]) -> _Positions | _Variables:
    if _is_position(wrt):
        return _Positions([wrt], True, fn, args)
    if isinstance(wrt, tuple) and wrt and all(map(_is_position, wrt)):
        return _Positions(wrt, False, fn, args)
    return _Variables(wrt, fn, args)


def _is_position(wrt: Wrt) -> bool:
    return isinstance(wrt, int) and not isinstance(wrt, bool)


def variables_of(wrt: Wrt) -> list[Variable]:
    """The distinct variables in `wrt`, in order; for a layer its trainable variables.

    Raises:
        GradientError: `wrt` contains anything else, or nothing to train.
    """
    variables: dict[int, Variable] = {}
    for leaf in keras.tree.flatten(wrt):
        if isinstance(leaf, keras.Layer):
            variables.update((id(variable), variable) for variable in leaf.trainable_variables)
        elif isinstance(leaf, keras.Variable):
            variables[id(leaf)] = leaf
        else:
            raise GradientError(
                "HL113: wrt takes positions of arguments (an int or a tuple of ints), or Keras variables: a variable, "
                "a layer or model, or a list, tuple or dict of these; "
                f"received {short(leaf)} (of type {type(leaf).__name__}) in it.",
            )
    if not variables:
        raise GradientError(
            f"HL114: There is nothing to differentiate with respect to: wrt={short(wrt)} has no trainable variables.",
            "A layer has none before it is built, or while it is frozen.",
            "Call it once on data, or set layer.trainable = True.",
        )
    return list(variables.values())


def build(wrt: Wrt, fn: Callable[[], Any]) -> None:
    """Runs `fn()` on shapes alone if layers in `wrt` are not built yet."""
    layers = [leaf for leaf in keras.tree.flatten(wrt) if isinstance(leaf, keras.Layer)]
    if any(not inner.built for layer in layers for inner in layers_of(layer)):
        try:
            with building():
                backend.create_variables(fn)
        except Exception:
            # For want of values, after the layers: the function may run with values, or where a backend compiles `if`.
            if any(not inner.built for layer in layers for inner in layers_of(layer)):
                raise


class _Rest:
    """Auxiliary results of a function: tensors and their masks go through the backend, everything else around it."""

    def of(self, fn: Callable[[], tuple[Any, Any]]) -> Callable[[], tuple[Any, list[Tensor]]]:
        """A function that returns a value and auxiliary results, with only the tensors among the latter."""

        def call() -> tuple[Any, list[Tensor]]:
            value, aux = fn()
            return value, self.put(aux)

        return call

    def put(self, aux: Any) -> list[Tensor]:
        masks = list(map(get_keras_mask, Structure(aux).tensors))
        self._structure = Structure((aux, masks))
        return list(map(keras.ops.convert_to_tensor, self._structure.tensors))

    def get(self, found: Tensors) -> Any:
        aux, masks = self._structure.filled(found)
        for tensor, mask in zip(Structure(aux).tensors, masks, strict=True):
            if mask is not None:
                set_keras_mask(tensor, mask)
        return aux


def split(result: Any) -> tuple[Any, Any]:
    """The value and the auxiliary result of a function with `has_aux=True`.

    Raises:
        GradientError: They are not a pair.
    """
    if not isinstance(result, tuple) or len(result) != 2:
        raise GradientError(
            f"HL115: With has_aux=True the function must return a pair (value, aux); it returned {_described(result)}.",
        )
    return result


def vector(value: Any) -> Tensor:
    """The result of a function with several losses, as a tensor of shape `(losses,)`.

    Raises:
        GradientError: It is not a floating-point tensor of that shape.
    """
    value = _floating(value)
    if len(value.shape) != 1:
        raise GradientError(
            "HL116: An optimizer of several losses (PCGrad) needs them as one vector; the function returned a tensor "
            f"of shape {tuple(value.shape)}.",
            fix="Return keras.ops.stack([a, b]).",
        )
    return value


def scalar(value: Any) -> Tensor:
    """The result of a function to differentiate, as a tensor.

    Raises:
        GradientError: It is not a floating-point scalar.
    """
    value = _floating(value)
    if len(value.shape):
        raise GradientError(
            f"HL117: A gradient is taken of a scalar; the function returned a tensor of shape {tuple(value.shape)}.",
            fix="Reduce it, for example with keras.ops.sum or keras.ops.mean; for all derivatives of a tensor, use "
            "hl.jacobian.",
        )
    return value


def _floating(value: Any) -> Tensor:
    found = _described(value)
    if backend.is_array(value) or isinstance(value, (int, float, keras.Variable)):
        value = keras.ops.convert_to_tensor(value, dtype=keras.config.floatx() if isinstance(value, int) else None)
        if keras.backend.is_float_dtype(value.dtype):
            return value
        found = f"one of dtype {keras.backend.standardize_dtype(value.dtype)}"
    raise GradientError(
        f"HL118: The function to differentiate must return a floating-point tensor; it returned {found}.",
        fix="To return more than the value, use has_aux=True." if isinstance(value, (tuple, dict)) else "",
    )


def _source_tensor(leaf: Any, fn: Callable[..., Any]) -> Tensor:
    if isinstance(leaf, float):
        return keras.ops.convert_to_tensor(leaf, dtype=keras.config.floatx())
    if not backend.is_array(leaf):
        raise GradientError(
            f"HL120: {_name(fn)} cannot be differentiated with respect to an argument that is not a tensor, array "
            f"or float: {short(leaf)} (of type {type(leaf).__name__}).",
            fix=f"Pass {float(leaf)}." if isinstance(leaf, int) else "",
        )
    tensor = keras.ops.convert_to_tensor(backend.to_tensor(leaf))
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    if not keras.backend.is_float_dtype(dtype):
        raise GradientError(
            f"HL121: {_name(fn)} cannot be differentiated with respect to an argument of dtype {dtype}.",
            "Only floating-point arguments have gradients.",
            f"Convert it first: keras.ops.cast(x, {keras.config.floatx()!r}).",
        )
    return tensor


def _with_tensors(argument: Any) -> Any:
    """An argument that is not differentiated, with tensors for arrays, as differentiated arguments have."""

    def converted(leaf: Any) -> Any:
        return keras.ops.convert_to_tensor(backend.to_tensor(leaf)) if isinstance(leaf, np.ndarray) else leaf

    return optree.tree_map(converted, argument)


def _check_function(fn: Any, of: str) -> None:
    if not callable(fn):
        raise GradientError(
            f"HL127: {of} takes a function and returns a function; received {_described(fn)}.",
            "A value that is computed already has no gradients.",
            f"Compute it inside: {of}(lambda x: keras.ops.sum(x**2))(x), or {of}(lambda: loss(y, model(x)), model)().",
        )


def _name(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__name__", type(fn).__name__)


def _described(value: Any) -> str:
    return f"{short(value)} (of type {type(value).__name__})"
