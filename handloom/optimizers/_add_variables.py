"""Slots for variables that are added, or unfrozen, after an optimizer was built."""

from handloom._keras import Variable, forget_slots, keras, slots_of, trained_by
from handloom._trace.gradients import Wrt, variables_of
from handloom.errors import OptimizerError
from handloom.optimizers._named import NamedOptimizers
from handloom.optimizers._tree import children, inside


def add_variables(optimizer: keras.Optimizer, wrt: Wrt) -> None:
    """Adds slots for further variables to a built optimizer; existing slots keep their values.

    For loops by hand in which a layer is unfrozen or added between two steps. Afterwards compile the step again,
    `hl.function(train_step)`: a compiled step trains the variables that it was compiled for. `Model.fit` does both.

    Args:
        optimizer: The optimizer, with everything that it wraps. If it is not built yet, its first step builds it.
        wrt: What to train: a variable, a layer or model (its trainable variables), or a list, tuple or dict of these.
            Slots are in the order of the variables of layers, as if all had been created at once; slots of other
            variables follow.

    Raises:
        GradientError: `wrt` contains no trainable variables, or something else than variables and layers.
        OptimizerError: Two variables have the same path.

    Example:
        ```python
        model.get_layer("encoder").trainable = True
        handloom.optimizers.add_variables(optimizer, model)
        step = hl.function(train_step)
        ```
    """
    given = [variable for leaf in keras.tree.flatten(wrt) for variable in getattr(leaf, "variables", [leaf])]
    known = [variable for part in inside(optimizer) for variable in trained_by(part)]
    order = {id(variable): variable for variable in [*given, *known]}
    add_variables_in_order(optimizer, variables_of(wrt), list(order.values()))


def add_variables_in_order(optimizer: keras.Optimizer, variables: list[Variable], order: list[Variable]) -> None:
    """Adds slots for variables to an optimizer, with everything that it wraps or names; see `add_variables`.

    Args:
        optimizer: The optimizer.
        variables: The variables to train.
        order: All variables of the model, in the order of their slots.
    """
    if isinstance(optimizer, NamedOptimizers):
        for name, owned in optimizer.owners().items():
            add_variables_in_order(optimizer[name], owned, order)
        return
    for child in children(optimizer):
        add_variables_in_order(child, variables, order)
    known = set(map(id, trained_by(optimizer)))
    wanted = known.union(map(id, variables))
    if optimizer.built and wanted != known:
        _rebuild(optimizer, [variable for variable in order if id(variable) in wanted])


def _rebuild(optimizer: keras.Optimizer, variables: list[Variable]) -> None:
    paths = [variable.path for variable in variables]
    twice = sorted({path for path in paths if paths.count(path) > 1})
    if twice:
        raise OptimizerError(
            f"HL302: {optimizer.name!r} cannot distinguish the variables to add: several have the path {twice[0]!r}.",
            fix="Give the layers different names, or compile the model again with a new optimizer.",
        )
    before = {slot.path: slot for slot in slots_of(optimizer)}
    forget_slots(optimizer)
    optimizer.built = False
    optimizer.build(variables)
    for slot in slots_of(optimizer):
        if slot.path in before:
            slot.assign(before[slot.path])
