"""The learning rates of a model's optimizers, by name."""

import inspect
from typing import Any

from handloom._keras import keras
from handloom.errors import OptimizerError
from handloom.optimizers import NamedOptimizers
from handloom.optimizers._tree import inside


def learning_rates(model: Any) -> dict[str, float]:
    """The current rates, under the names by which they are reported; empty without an optimizer."""
    return {_label(name): _rate(optimizer) for name, optimizer in _optimizers(model).items()}


class Rates:
    """The learning rates that a callback sets.

    Args:
        model: A model with an optimizer.
        name: The name of the optimizer to use, if there are several; `None` for all.

    Raises:
        OptimizerError: There is no optimizer, none of that name, or one whose rate follows a schedule.
    """

    def __init__(self, model: Any, name: str | None) -> None:
        optimizers = _optimizers(model)
        if not optimizers:
            raise OptimizerError(
                "HL330: There is no optimizer with a learning rate to set.",
                fix="Compile the model with an optimizer; for hl.fit, name it in the state: "
                'state={"model": model, "optimizer": optimizer}. A MultiOptimizer that is made from a function has none'
                " before it is built: call optimizer.build(model.trainable_variables) before training.",
            )
        if name is not None and name not in optimizers:
            known = ", ".join(repr(other) for other in optimizers if other) or "one without a name"
            raise OptimizerError(f"HL331: There is no optimizer named {name!r}; there are: {known}.")
        self._optimizers = optimizers if name is None else {name: optimizers[name]}
        for each, rate in self.items():
            self[each] = rate  # A rate that cannot be set is an error before training, not after an epoch.

    def items(self) -> list[tuple[str, float]]:
        """Pairs (name, rate); the name of a single optimizer is empty."""
        return [(name, _rate(optimizer)) for name, optimizer in self._optimizers.items()]

    def labelled(self) -> dict[str, float]:
        """The rates, under the names by which they are reported."""
        return {_label(name): rate for name, rate in self.items()}

    def __setitem__(self, name: str, rate: float) -> None:
        try:
            self._optimizers[name].learning_rate = rate
        except (TypeError, AttributeError) as error:
            raise OptimizerError(
                f"HL332: The learning rate of the optimizer{name and f' {name!r}'} follows a schedule of its own and "
                "cannot be set.",
                fix="Create the optimizer with a number, such as learning_rate=1e-3, or remove this callback.",
            ) from error


def takes_rate(schedule: Any) -> bool:
    """Whether a schedule takes the current rate as its second argument."""
    try:
        inspect.signature(schedule).bind(0, 0.0)
    except (TypeError, ValueError) as error:
        return isinstance(error, ValueError)  # Some builtins have no signature.
    return True


def _optimizers(model: Any) -> dict[str, keras.Optimizer]:
    optimizer = getattr(model, "optimizer", None)
    several = next((part for part in inside(optimizer) if hasattr(part, "optimizers")), None)
    if isinstance(several, NamedOptimizers):
        return dict(several.items())
    if several is not None:  # A `MultiOptimizer` of Keras, whose own learning rate is an error.
        return {each.name: each for each in several.optimizers or _built(optimizer, several, model)}
    return {} if optimizer is None else {"": optimizer}


def _built(optimizer: keras.Optimizer, several: Any, model: Any) -> list[keras.Optimizer]:
    """The optimizers of a `MultiOptimizer` that is made from a function, which it asks when it is built."""
    if not (getattr(model, "compiled", False) and model.built):
        return []
    optimizer.build(model.trainable_variables)
    return list(several.optimizers)


def _rate(optimizer: keras.Optimizer) -> float:
    return float(keras.ops.convert_to_numpy(optimizer.learning_rate))


def _label(name: str) -> str:
    return f"learning_rate_{name}" if name else "learning_rate"
