"""Slots for variables that came, or were thawed, after an optimizer was built."""

from __future__ import annotations

from collections.abc import Sequence

from handloom._keras import Variable, forget_slots, keras, slots_of, trained_by
from handloom.errors import OptimizerError
from handloom.optimizers._named import NamedOptimizers


def extend(optimizer: keras.Optimizer, variables: Sequence[Variable], order: Sequence[Variable]) -> None:
    """Gives a built optimizer slots for further variables; those that it knows keep theirs, frozen or not.

    Args:
        optimizer: With all that it wraps or names. One that is not built yet is left for its first step.
        variables: What it is to train.
        order: All variables of the model. Slots stand in this order, as if they had been made at once.

    Raises:
        OptimizerError: If two variables cannot be told apart by their paths.
    """
    if isinstance(optimizer, NamedOptimizers):
        for name, owned in optimizer.owners().items():
            extend(optimizer[name], owned, order)
        return
    inner = getattr(optimizer, "inner_optimizer", None)
    if isinstance(inner, keras.Optimizer):
        extend(inner, variables, order)
    known = set(map(id, trained_by(optimizer)))
    if optimizer.built and any(id(variable) not in known for variable in variables):
        wanted = known | set(map(id, variables))
        _rebuild(optimizer, [variable for variable in order if id(variable) in wanted])


def _rebuild(optimizer: keras.Optimizer, variables: list[Variable]) -> None:
    paths = [variable.path for variable in variables]
    twice = sorted({path for path in paths if paths.count(path) > 1})
    if twice:
        raise OptimizerError(
            f"{optimizer.name!r} cannot be given further variables to train: several have the path {twice[0]!r}. Give "
            "their layers names of their own, or compile the model again, with a new optimizer."
        )
    before = {slot.path: slot for slot in slots_of(optimizer)}
    forget_slots(optimizer)
    optimizer.built = False
    optimizer.build(variables)
    for slot in slots_of(optimizer):
        if slot.path in before:
            slot.assign(before[slot.path])
