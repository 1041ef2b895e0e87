"""A loss function with everything that belongs to its loss, ready to be differentiated."""

import dataclasses
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

        def loss() -> tuple[Tensor, Any]:
            [scaled], result = self._losses(scalar)
            return scaled, result

        return gradients_of(loss, self.variables)

    def gradients_of_each(self) -> tuple[Any, list[Gradients]]:
        """Does the same for a function that returns a vector of losses.

        Returns:
            The result, with the sum of the losses; and the gradients of each loss, followed by those of the penalties.
        """
        return gradients_of_each(lambda: self._losses(vector), self.variables)

    def _losses(self, form: Callable[[Any], Tensor]) -> tuple[list[Tensor], Any]:
        """The scaled losses to differentiate, and the result."""
        layers = [leaf for leaf in keras.tree.flatten(self.wrt) if isinstance(leaf, keras.Layer)]
        denominators, own = Denominators(), OwnLosses(self.variables, layers)
        with observing(denominators, own):
            result = backend.with_control_flow(self.function)()
            loss, aux = split(result) if self.has_aux else (result, None)
            loss = form(loss)
            penalties = [ops.cast(ops.sum(penalty), loss.dtype) for penalty in own.left_out()]
        if form is scalar:
            total = sum(penalties, start=loss)
            losses = [total]
        else:
            losses = [*ops.unstack(loss), sum(penalties, start=ops.zeros((), loss.dtype))]
            total = ops.sum(loss) + losses[-1]
        scaled = losses if self.scale is None else [loss * ops.cast(self.scale, loss.dtype) for loss in losses]
        return scaled, (total, aux, denominators.distinct())
