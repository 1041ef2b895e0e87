"""`Model.explain`: which optimizer trains which variables, how values are reported, and what may surprise."""

import dataclasses
import itertools
from collections.abc import Iterator

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table

from handloom._keras import Variable, keras, trained_by
from handloom.backends import backend
from handloom.optimizers import LossScaleOptimizer, NamedOptimizers
from handloom.optimizers._tree import inside

ops = keras.ops


@dataclasses.dataclass(frozen=True)
class Owner:
    """An optimizer and the variables that it trains.

    Attributes:
        name: The name it was compiled under, or of its attribute; `"*"` for the only optimizer.
        optimizer: Its class, preceded by the classes of its wrappers, outermost first: `"GradientAccumulation > Adam"`.
        learning_rate: The learning rate of the next update.
        updates: Number of updates so far.
        variables: The paths of its variables.
        parameters: Number of scalars in its variables.
    """

    name: str
    optimizer: str
    learning_rate: float
    updates: int
    variables: tuple[str, ...]
    parameters: int


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The result of `Model.explain()`.

    Attributes:
        owners: The optimizers, with the variables of each.
        frozen: The paths of the variables that are not trainable.
        reported: For each step that has run, how batch values are reduced to the epoch's value, by reported name. The
            values in a progress bar or in the logs of a batch are reduced in the same way, from the start of the epoch.
        notes: Facts that are correct but may surprise.
    """

    owners: tuple[Owner, ...]
    frozen: tuple[str, ...]
    reported: dict[str, dict[str, str]]
    notes: tuple[str, ...]


def explain(model: keras.Model, reported: dict[str, dict[str, str]], *, weighted: bool) -> Explanation:
    """Explains a compiled and built model, which may have `weighted_metrics`; see `Model.explain`."""
    frozen = tuple(variable.path for variable in model.non_trainable_weights)
    notes = (*_notes_on_loss(model, weighted), *_notes_on_scale(model))
    return Explanation(tuple(_owners(model)), frozen, reported, notes)


def shown(explanation: Explanation) -> Explanation:
    """Prints an explanation as tables, followed by its notes, and returns it."""
    names = "name", "optimizer", "learning\nrate", "updates", "variables", "parameters"
    owners = Table(*(Column(name, overflow="fold") for name in names), title="Optimizers", box=SIMPLE)
    for owner in explanation.owners:
        counts = str(owner.updates), str(len(owner.variables)), f"{owner.parameters:,}"
        owners.add_row(owner.name, owner.optimizer, f"{owner.learning_rate:.3g}", *counts)
    console = Console()
    console.print(owners)
    if explanation.frozen:
        console.print(f"Variables that no optimizer updates, because they are not trainable: {len(explanation.frozen)}")
    for step, reductions in explanation.reported.items():
        table = Table("name", "value of an epoch", title=f"Reported by {step}", box=SIMPLE)
        for row in reductions.items():
            table.add_row(*row)
        console.print(table)
    for note in explanation.notes:
        console.print(f"- {note}", highlight=False)
    return explanation


def _owners(model: keras.Model) -> Iterator[Owner]:
    """The owners in the compiled optimizer, and the optimizers that a model with its own steps keeps as attributes."""
    optimizer, own = getattr(model, "optimizer", None), list(_own_optimizers(model))
    for name, other in own:
        parts = list(inside(other))
        yield _owner(name, parts, trained_by(parts[-1]) if parts[-1].built else [])
    named = next(inside(optimizer, NamedOptimizers), None)
    if own and not _updates(optimizer):
        return  # It is the default of `compile`, which such steps do not use.
    if named is not None:
        wrappers = list(itertools.takewhile(lambda part: part is not named, inside(optimizer)))
        for name, variables in named.owners().items():
            yield _owner(name, [*wrappers, *inside(named[name])], variables)
    elif optimizer is not None:
        yield _owner("*", list(inside(optimizer)), model.trainable_variables)


def _own_optimizers(model: keras.Model) -> Iterator[tuple[str, keras.Optimizer]]:
    for name, value in backend.attributes(model).items():
        if isinstance(value, keras.Optimizer) and value is not model.optimizer:
            yield name, value


def _updates(optimizer: keras.Optimizer | None) -> int:
    return 0 if optimizer is None else int(ops.convert_to_numpy(optimizer.iterations))


def _owner(name: str, parts: list[keras.Optimizer], variables: list[Variable]) -> Owner:
    return Owner(
        name=name,
        optimizer=" > ".join(type(part).__name__ for part in parts),
        learning_rate=float(ops.convert_to_numpy(parts[-1].learning_rate)),
        updates=_updates(parts[-1]),
        variables=tuple(variable.path for variable in variables),
        parameters=sum(int(ops.size(variable)) for variable in variables),
    )


def _notes_on_loss(model: keras.Model, weighted: bool) -> Iterator[str]:
    losses = [loss for loss in keras.tree.flatten(getattr(model, "loss", None)) if loss is not None]
    reductions = {getattr(loss, "reduction", "sum_over_batch_size") for loss in losses}
    if weighted and reductions & {"sum_over_batch_size", "mean"}:
        yield (
            "The loss is divided by the number of examples, weighted_metrics by the sum of the sample weights. With "
            "weights, a loss and a metric of the same formula therefore differ, and the effect of an example does not "
            "depend on the weights of the others. To divide the loss by the weights too, use "
            "reduction='mean_with_sample_weight'."
        )
    if "sum" in reductions:
        yield "The loss is a sum over examples: larger batches make larger steps."


def _notes_on_scale(model: keras.Model) -> Iterator[str]:
    for part in inside(getattr(model, "optimizer", None)):
        count = int(ops.convert_to_numpy(part.skipped)) if isinstance(part, LossScaleOptimizer) and part.built else 0
        if count:
            scale = float(ops.convert_to_numpy(part.dynamic_scale))
            yield f"{count} updates were skipped because a gradient was not finite. The loss scale is now {scale:g}."
