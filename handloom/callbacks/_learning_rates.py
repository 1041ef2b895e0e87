"""The learning rates of a model's optimizers, by name, read and set."""

from __future__ import annotations

import inspect
from typing import Any

from handloom._keras import keras
from handloom.errors import OptimizerError
from handloom.optimizers._tree import named_inside

ops = keras.ops


def learning_rates(model: Any) -> dict[str, float]:
    """The rates as they are now, under the names by which they are reported; empty without an optimizer."""
    return {_label(name): _rate(optimizer) for name, optimizer in _optimizers(model).items()}


class Rates:
    """The learning rates that a callback sets.

    Args:
        model: A model with an optimizer.
        name: Of several optimizers by name, the one meant; `None` for all.

    Raises:
        OptimizerError: If there is no optimizer, none of that name, or one whose rate follows a schedule.
    """

    def __init__(self, model: Any, name: str | None) -> None:
        optimizers = _optimizers(model)
        if not optimizers:
            raise OptimizerError(
                "HL330: There is no optimizer whose learning rate could be set. Compile the model with one, or, for hl.fit, "
                'name it in the state: state={"model": model, "optimizer": optimizer}.',
            )
        if name is not None and name not in optimizers:
            there = ", ".join(repr(other) for other in optimizers if other) or "one, without a name"
            raise OptimizerError(f"HL331: There is no optimizer named {name!r}; there are: {there}.")
        self._optimizers = optimizers if name is None else {name: optimizers[name]}
        for each, rate in self.items():
            self[each] = rate  # What cannot be set is to be found before training and not after an epoch.

    def items(self) -> list[tuple[str, float]]:
        """Pairs (name, rate); the name of an only optimizer is empty."""
        return [(name, _rate(optimizer)) for name, optimizer in self._optimizers.items()]

    def labelled(self) -> dict[str, float]:
        """The rates, under the names by which they are reported."""
        return {_label(name): rate for name, rate in self.items()}

    def __setitem__(self, name: str, rate: float) -> None:
        try:
            self._optimizers[name].learning_rate = rate
        except (TypeError, AttributeError) as error:
            which = f"the optimizer {name!r}" if name else "the optimizer"
            raise OptimizerError(
                f"HL332: The learning rate of {which} follows a schedule of its own and cannot be set. Make the optimizer "
                "with a number, such as learning_rate=1e-3, or leave out the callback that sets it.",
            ) from error


def takes_rate(schedule: Any) -> bool:
    """Whether a schedule wants the present rate as its second argument."""
    try:
        inspect.signature(schedule).bind(0, 0.0)
    except TypeError:
        return False
    except ValueError:  # A builtin, perhaps.
        return True
    return True


def _optimizers(model: Any) -> dict[str, keras.Optimizer]:
    optimizer = getattr(model, "optimizer", None)
    named = next(named_inside(optimizer), None)
    if named is not None:
        return dict(named.items())
    return {} if optimizer is None else {"": optimizer}


def _rate(optimizer: keras.Optimizer) -> float:
    return float(ops.convert_to_numpy(optimizer.learning_rate))


def _label(name: str) -> str:
    return f"learning_rate_{name}" if name else "learning_rate"
