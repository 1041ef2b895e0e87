"""Slots for variables that came, or were thawed, after an optimizer was built."""

from __future__ import annotations

from collections.abc import Sequence

from handloom._keras import Variable, forget_slots, keras, slots_of, trained_by
from handloom._trace.gradients import Wrt, variables_of
from handloom.errors import OptimizerError
from handloom.optimizers._named import NamedOptimizers
from handloom.optimizers._tree import inside


def add_variables(optimizer: keras.Optimizer, wrt: Wrt) -> None:
    """Gives a built optimizer slots for what it is to train from now on; what it has trained keeps its own.

    For loops by hand in which a layer is thawed, or a block comes, between two steps. Compile the step anew after it,
    `hl.function(train_step)`: one that is compiled trains what it was compiled for. A model's `fit` does both.

    Args:
        optimizer: With all that it wraps. One that is not built yet is left for its first step.
        wrt: What it is to train: a variable, a layer or model (its trainable variables), or a list, tuple or dict of
            these. Slots stand in the order of the variables of layers, as if they had been made at once; what the
            optimizer knows besides comes after.

    Raises:
        GradientError: If there is nothing to train in `wrt`, or anything else.
        OptimizerError: If two variables cannot be told apart by their paths.

    Example:
        ```python
        model.get_layer("encoder").trainable = True
        handloom.optimizers.add_variables(optimizer, model)
        step = hl.function(train_step)
        ```
    """
    order: dict[int, Variable] = {}
    for leaf in keras.tree.flatten(wrt):
        variables = leaf.variables if isinstance(leaf, keras.Layer) else [leaf]
        order.update((id(variable), variable) for variable in variables)
    for part in inside(optimizer):
        order.update((id(variable), variable) for variable in trained_by(part) if id(variable) not in order)
    add_variables_in_order(optimizer, variables_of(wrt), list(order.values()))


def add_variables_in_order(
    optimizer: keras.Optimizer, variables: Sequence[Variable], order: Sequence[Variable]
) -> None:
    """Gives an optimizer, with all that it wraps or names, slots for variables; see `add_variables`.

    Args:
        optimizer: The optimizer.
        variables: What it is to train.
        order: All variables of the model, in the order in which slots are to stand.
    """
    if isinstance(optimizer, NamedOptimizers):
        for name, owned in optimizer.owners().items():
            add_variables_in_order(optimizer[name], owned, order)
        return
    inner = getattr(optimizer, "inner_optimizer", None)
    if isinstance(inner, keras.Optimizer):
        add_variables_in_order(inner, variables, order)
    known = set(map(id, trained_by(optimizer)))
    if optimizer.built and any(id(variable) not in known for variable in variables):
        wanted = known | set(map(id, variables))
        _rebuild(optimizer, [variable for variable in order if id(variable) in wanted])


def _rebuild(optimizer: keras.Optimizer, variables: list[Variable]) -> None:
    paths = [variable.path for variable in variables]
    twice = sorted({path for path in paths if paths.count(path) > 1})
    if twice:
        raise OptimizerError(
            f"HL302: {optimizer.name!r} cannot be given further variables to train: several have the path {twice[0]!r}. Give "
            "their layers names of their own, or compile the model again, with a new optimizer.",
        )
    before = {slot.path: slot for slot in slots_of(optimizer)}
    forget_slots(optimizer)
    optimizer.built = False
    optimizer.build(variables)
    for slot in slots_of(optimizer):
        if slot.path in before:
            slot.assign(before[slot.path])
