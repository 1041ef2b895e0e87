"""Options of Keras's optimizers that Keras takes without a word and then leaves out."""

from __future__ import annotations

from handloom._keras import keras
from handloom.errors import OptimizerError
from handloom.optimizers._tree import inside


def check_options(optimizer: keras.Optimizer | None) -> None:
    """Checks an optimizer, with all that it wraps or names.

    Raises:
        OptimizerError: If a limit of clipping is not positive, or gradients are to be gathered over no steps.
    """
    for part in inside(optimizer):
        for name in ("clipvalue", "clipnorm", "global_clipnorm"):
            limit = getattr(part, name)
            if limit is not None and not limit > 0:
                raise OptimizerError(
                    f"HL325: {type(part).__name__} has {name}={limit!r}: gradients are clipped to a positive limit, such as "
                    f"{name}=1.0. To clip none, leave it out.",
                )
        if part.gradient_accumulation_steps == 0:
            raise OptimizerError(
                f"HL326: {type(part).__name__} has gradient_accumulation_steps=0: an update is made from 2 steps or more. To "
                "update on every step, leave it out.",
            )
