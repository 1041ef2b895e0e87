"""Slots for variables that are added, or unfrozen, after an optimizer was built."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from handloom._keras import Variable, forget_slots, keras, optimizers_in, replace_slot, slots_of, trained_by
from handloom._trace.gradients import Wrt, variables_of
from handloom._trace.observe import unobserved
from handloom.backends import backend
from handloom.errors import OptimizerError
from handloom.optimizers._named import NamedOptimizers
from handloom.optimizers._tree import inside


def add_variables(optimizer: keras.Optimizer, wrt: Wrt) -> None:
    """Adds slots for further variables to a built optimizer; existing slots keep their values.

    For loops by hand in which a layer is added between two steps, or in which `optimizer.apply` is called. `minimize`
    and `Model.fit` do it for variables that are unfrozen.

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
        ```
    """
    given = [variable for leaf in keras.tree.flatten(wrt) for variable in getattr(leaf, "variables", [leaf])]
    known = [variable for part in inside(optimizer) for variable in trained_by(part)]
    order = {id(variable): variable for variable in [*given, *known]}
    add_variables_in_order(optimizer, variables_of(wrt), list(order.values()))


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """A block in which slots are created and have values at once, although a step may be being traced."""
    with backend.outside_of_traces(), unobserved():
        yield


def add_unfrozen(optimizer: keras.Optimizer, wrt: Wrt) -> None:
    """Adds slots for the variables in `wrt` that were frozen when the optimizer was built.

    An optimizer that trains no variable in `wrt` was built for another part; its update will say so.
    """
    known = {id(variable) for part in inside(optimizer) for variable in trained_by(part)}
    are_known = [id(variable) in known for variable in variables_of(wrt)]
    if any(are_known) and not all(are_known):
        with at_once():
            add_variables(optimizer, wrt)


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
    several = list(getattr(optimizer, "optimizers", ()))  # A `MultiOptimizer` gives each its own variables.
    for inner in optimizers_in(optimizer):
        if inner not in several:
            add_variables_in_order(inner, variables, order)
    known = set(map(id, trained_by(optimizer)))
    wanted = known.union(map(id, variables))
    if optimizer.built and wanted != known:
        rebuild(optimizer, [variable for variable in order if id(variable) in wanted], several)


def rebuild(optimizer: keras.Optimizer, variables: list[Variable], built_by_it: Sequence[keras.Optimizer] = ()) -> None:
    """Builds an optimizer for other variables, and those inside it that it builds; existing slots keep their values."""
    paths = [variable.path for variable in variables]
    twice = sorted({path for path in paths if paths.count(path) > 1})
    if twice:
        raise OptimizerError(
            f"HL302: {optimizer.name!r} cannot distinguish the variables to add: several have the path {twice[0]!r}.",
            fix="Give the layers different names, or compile the model again with a new optimizer.",
        )
    with contextlib.ExitStack() as stack:
        for part in (optimizer, *built_by_it):
            stack.enter_context(_slots_kept(part))
        optimizer.build(variables)


@contextlib.contextmanager
def _slots_kept(optimizer: keras.Optimizer) -> Iterator[None]:
    """A block in which an optimizer is built again and takes its earlier slots, by path: compiled steps hold them."""
    before = {slot.path: slot for slot in slots_of(optimizer)}
    forget_slots(optimizer)
    optimizer.built, make = False, optimizer.add_variable

    def add_variable(*args: Any, **kwargs: Any) -> Variable:
        new = make(*args, **kwargs)
        if new.path not in before:
            return new
        replace_slot(optimizer, new, before[new.path])
        return before[new.path]

    vars(optimizer)["add_variable"] = add_variable  # Not by `setattr`, by which Keras tracks what is set.
    try:
        yield
    finally:
        del vars(optimizer)["add_variable"]
