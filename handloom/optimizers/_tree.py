"""Trees of optimizers: a wrapper contains one optimizer, `NamedOptimizers` contains several."""

from collections.abc import Iterator
from typing import Any

from handloom._keras import keras, optimizers_in
from handloom._util.arguments import positive_number, whole_number


def inside(optimizer: Any, kind: type = keras.Optimizer) -> Iterator[Any]:
    """The optimizers of a kind in a tree, from its root to its leaves; none in `None`."""
    if isinstance(optimizer, kind):
        yield optimizer
    for inner in optimizers_in(optimizer):
        yield from inside(inner, kind)


def taker_inside(optimizer: Any) -> Any:
    """The optimizer in a tree that takes the gradients of a loss itself (see `LossFunction`), or `None`."""
    return next((part for part in inside(optimizer) if hasattr(part, "take_gradients")), None)


def check_options(optimizer: Any) -> None:
    """Checks the options of every optimizer in a tree that Keras accepts and then ignores.

    Raises:
        ArgumentError: A limit for clipping is not positive, or gradients are to be accumulated over less than 2 steps.
    """
    for part in inside(optimizer):
        kind, steps = type(part).__name__, part.gradient_accumulation_steps
        for name in ("clipvalue", "clipnorm", "global_clipnorm"):
            if (limit := getattr(part, name)) is not None:
                positive_number(kind, **{name: limit})
        if steps is not None:
            whole_number(kind, least=2, gradient_accumulation_steps=steps)
