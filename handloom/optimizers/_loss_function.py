"""A loss function with everything that belongs to its loss, ready to be differentiated."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from handloom._keras import Gradients, Tensor, Variable, keras
from handloom._trace.gradients import Wrt, gradients_of, gradients_of_each, scalar, split, vector
from handloom._trace.losses import Denominators, OwnLosses
from handloom._trace.observe import observing
from handloom.backends import backend

ops = keras.ops


@dataclasses.dataclass(frozen=True)
class LossFunction:
    """A loss function together with the penalties of the variables that it trains.

    `hl.minimize` passes it to the method `take_gradients` of an optimizer that has one. That method differentiates it
    as often as it needs, and returns what `gradients` returns.

    Args:
        function: Returns the loss, or with `has_aux` a pair of it and anything else.
        wrt: What to train.
        variables: The variables in `wrt`.
        scale: The loss scale, by which the gradients are multiplied.
        has_aux: Whether `function` returns a pair.
    """

    function: Callable[[], Any]
    wrt: Wrt
    variables: list[Variable]
    scale: Tensor | None
    has_aux: bool

    def gradients(self) -> tuple[Any, Gradients]:
        """Computes the loss and its gradients at the current weights.

        Returns:
            The result (the unscaled loss, what else the function returned, and what the loss was divided by), and the
            gradients of the scaled loss: one per variable, in the form that the backend gives it (see
            `Backend.dense`), or `None` if the variable does not reach the loss.
        """

        def scaled() -> tuple[Tensor, Any]:
            loss, unread, read, rest = self._called(scalar)
            return self._scaled(sum([*unread, *(term for _, term in read)], start=loss)), (loss, unread, read, rest)

        (loss, unread, read, (aux, divided_by, own)), gradients = gradients_of(scaled, self.variables)
        return (sum([*unread, *own.left_out(read)], start=loss), aux, divided_by), gradients

    def gradients_of_each(self) -> tuple[Any, list[Gradients]]:
        """Does the same for a function that returns a vector of losses.

        Returns:
            The result, with the sum of the losses; and the gradients of each loss, followed by those of the penalties.
        """

        def scaled() -> tuple[list[Tensor], Any]:
            losses, unread, read, rest = self._called(vector)
            total = sum(unread, start=ops.zeros((), losses.dtype))
            parts = [*(term for _, term in read), total, *ops.unstack(losses)]
            return list(map(self._scaled, parts)), (losses, total, read, rest)

        (losses, total, read, (aux, divided_by, own)), rows = gradients_of_each(scaled, self.variables)
        of_read, [of_unread, *gradients] = rows[: len(read)], rows[len(read) :]
        rows_by_key = [(key, row) for (key, _), row in zip(read, of_read, strict=True)]
        of_penalties = [_sum(column) for column in zip(of_unread, *own.left_out(rows_by_key), strict=True)]
        return (ops.sum(losses) + sum(own.left_out(read), start=total), aux, divided_by), [*gradients, of_penalties]

    def _called(self, form: Callable[[Any], Tensor]) -> tuple[Tensor, list[Tensor], list[tuple[int, Tensor]], Any]:
        """The loss by itself, the penalties that the function did not read and those that it did, and the rest."""
        layers = [leaf for leaf in keras.tree.flatten(self.wrt) if isinstance(leaf, keras.Layer)]
        denominators, own = Denominators(), OwnLosses(self.variables, layers)
        with observing(denominators, own):
            result = backend.with_control_flow(self.function)()
            loss, aux = split(result) if self.has_aux else (result, None)
            loss = form(loss)
            unread = [ops.cast(ops.sum(term), loss.dtype) for term in own.unread_terms()]
            read = [(key, ops.cast(ops.sum(term), loss.dtype)) for key, term in own.read_terms()]
        return loss, unread, read, (aux, denominators.distinct(), own)

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self.scale is None else loss * ops.cast(self.scale, loss.dtype)


def _sum(gradients: tuple[Tensor | None, ...]) -> Tensor | None:
    present = [gradient for gradient in gradients if gradient is not None]
    return functools.reduce(ops.add, present) if present else None
