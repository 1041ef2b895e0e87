"""JAX: the sources of gradients, and which of them reach the value.

Internals used: `jaxpr_as_fun` of `jax.extend.core`, which runs a traced function for several derivatives.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from handloom._keras import Gradients, Tensor, Tensors, Variable, current_value
from handloom.backends.base import Outputs
from handloom.backends.jax.program import OneTrace


class Sources:
    """The sources of a gradient as one flat list: tensors, then variables."""

    def __init__(self, tensors: Tensors, variables: Sequence[Variable]) -> None:
        self._count = len(tensors)
        self._variables = variables
        self._written: list[Variable] = []
        self.values = [*tensors, *map(current_value, variables)]

    def call(self, fn: Outputs, flat: Tensors) -> tuple[Any, list[Tensor]]:
        """Calls `fn` with these values of the variables; also returns the new values of those that it assigns."""
        with OneTrace(zip(self._variables, flat[self._count :], strict=True)) as scope:
            result = fn(*flat[: self._count])
        self._written = scope.written
        return result, [scope.get_current_value(variable) for variable in self._written]

    def write(self, news: Tensors) -> None:
        """Assigns the new values, once."""
        for variable, new in zip(self._written, news, strict=True):
            variable.assign(new)


class Reached:
    """Distinguishes a zero gradient from none: records the sources that reach the value.

    Each source goes through an identity whose backward rule records that it was called. JAX calls it only if a path of
    differentiable operations leads from the source to the value.
    """

    def __init__(self) -> None:
        self._indices: set[int] = set()

    def watch(self, flat: Tensors) -> list[Tensor]:
        """The same values, observed."""
        return [term_twice(value, functools.partial(self._indices.add, index))[0] for index, value in enumerate(flat)]

    def only(self, gradients: Tensors) -> Gradients:
        """The gradients, with `None` for sources that do not reach the value."""
        return [gradient if index in self._indices else None for index, gradient in enumerate(gradients)]


def term_twice(term: Tensor, included: Callable[[], None]) -> tuple[Tensor, Tensor]:
    """See `Backend.term_twice`."""

    def backward(_: None, gradients: tuple[Tensor, Tensor]) -> tuple[Tensor]:
        of_first, of_second = gradients
        if isinstance(of_first, SymbolicZero):
            return (of_second,)
        included()
        return (of_first,)

    twice = jax.custom_vjp(lambda term: (term, term))
    twice.defvjp(lambda term: ((term.value, term.value), None), backward, symbolic_zeros=True)
    both: tuple[Tensor, Tensor] = twice(term)
    return both


Results: TypeAlias = tuple[list[Tensor], list[Tensor], list[Tensor], list[Gradients]]
"""Outputs, further tensors, new values of the assigned variables, derivatives of each output."""


def gradients_of_one(fn: Outputs, sources: Sources) -> Results:
    """Runs `fn` once, and differentiates its only output, a scalar."""
    reached = Reached()

    def pure(*flat: Tensor) -> tuple[Tensor, tuple[list[Tensor], list[Tensor]]]:
        ([value], aux), news = sources.call(fn, reached.watch(flat))
        return value, (aux, news)

    value, pullback, (aux, news) = jax.vjp(pure, *sources.values, has_aux=True)
    return [value], aux, news, [reached.only(pullback(jnp.ones_like(value)))]


def rows_of_each(fn: Outputs, sources: Sources) -> Results:
    """Runs `fn` once, and differentiates each output, of any shape."""
    trace = jax.make_jaxpr(functools.partial(sources.call, fn), return_shape=True)
    closed, shapes = trace(sources.values)
    flat_fn = jax.extend.core.jaxpr_as_fun(closed)
    (outputs, aux), news = jax.tree.unflatten(jax.tree.structure(shapes), flat_fn(*sources.values))
    return outputs, aux, news, [_row(flat_fn, index, sources.values) for index in range(len(outputs))]


def _row(flat_fn: Callable[..., list[Tensor]], index: int, values: Tensors) -> Gradients:
    """The derivatives of one output with respect to each source."""
    reached = Reached()
    output, pullback = jax.vjp(lambda *flat: flat_fn(*reached.watch(flat))[index], *values)
    basis = jnp.eye(output.size, dtype=output.dtype).reshape(output.size, *output.shape)
    columns = jax.vmap(pullback)(basis)
    return reached.only([column.reshape(output.shape + column.shape[1:]) for column in columns])
