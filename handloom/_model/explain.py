"""What a compiled model will do, said in words and given as data."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from handloom._keras import Variable, keras
from handloom.optimizers import LossScaleOptimizer
from handloom.optimizers._tree import inside, named_inside

ops = keras.ops


@dataclasses.dataclass(frozen=True)
class Owner:
    """An optimizer and what it trains.

    Attributes:
        name: The name it was compiled under; `"*"` for the only one.
        optimizer: What it is, with what is around it, outermost first: `"GradientAccumulation > Adam"`.
        learning_rate: At the update to come.
        updates: Updates made so far.
        variables: The paths of its variables.
        parameters: How many numbers they hold.
    """

    name: str
    optimizer: str
    learning_rate: float
    updates: int
    variables: tuple[str, ...]
    parameters: int


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `Model.explain()` found.

    Attributes:
        owners: Who trains what.
        frozen: The paths of the variables that nobody trains.
        reported: For each step that has run, how an epoch's value comes of those of its batches, by reported name. All
            values count from the start of the epoch, also those of a bar or a batch's logs.
        notes: What is right but may surprise.
    """

    owners: tuple[Owner, ...]
    frozen: tuple[str, ...]
    reported: dict[str, dict[str, str]]
    notes: tuple[str, ...]


def explain(model: keras.Model, reported: dict[str, dict[str, str]]) -> Explanation:
    """Explains a compiled and built model; see `Model.explain`."""
    owners = tuple(_owners(model))
    frozen = tuple(variable.path for variable in model.non_trainable_weights)
    return Explanation(owners, frozen, reported, (*_notes(model), *_skipped(model)))


def shown(explanation: Explanation) -> Explanation:
    """Prints an explanation as a table, followed by its notes; gives it back."""
    table = Table("name", "optimizer", "learning rate", "updates", "variables", "parameters", title="Who trains what")
    for owner in explanation.owners:
        numbers = (f"{owner.learning_rate:.3g}", str(owner.updates), str(len(owner.variables)), f"{owner.parameters:,}")
        table.add_row(owner.name, owner.optimizer, *numbers)
    console = Console()
    console.print(table)
    console.print(f"{len(explanation.frozen)} variables are trained by nobody.")
    for step, reductions in explanation.reported.items():
        table = Table("name", "value of an epoch", title=f"What {step} reports")
        for name, reduction in reductions.items():
            table.add_row(name, reduction)
        console.print(table)
    for note in explanation.notes:
        console.print(f"- {note}", highlight=False)
    return explanation


def _owners(model: keras.Model) -> Iterator[Owner]:
    optimizer = getattr(model, "optimizer", None)
    named = next(named_inside(optimizer), None)
    if named is not None:
        around = list(itertools.takewhile(lambda part: part is not named, inside(optimizer)))
        for name, variables in named.owners().items():
            yield _owner(name, named[name], variables, around)
    elif optimizer is not None:
        yield _owner("*", optimizer, model.trainable_variables)


def _owner(
    name: str, optimizer: keras.Optimizer, variables: list[Variable], around: Sequence[keras.Optimizer] = ()
) -> Owner:
    parts = list(inside(optimizer))
    return Owner(
        name=name,
        optimizer=" > ".join(type(part).__name__ for part in [*around, *parts]),
        learning_rate=float(ops.convert_to_numpy(parts[-1].learning_rate)),
        updates=int(ops.convert_to_numpy(optimizer.iterations)),
        variables=tuple(variable.path for variable in variables),
        parameters=sum(int(ops.size(variable)) for variable in variables),
    )


def _notes(model: keras.Model) -> Iterator[str]:
    reductions = {getattr(loss, "reduction", "sum_over_batch_size") for loss in keras.tree.flatten(_losses(model))}
    if "sum_over_batch_size" in reductions or "mean" in reductions:
        yield (
            "The loss is divided by the number of examples, the metrics given as weighted_metrics by the sum of the "
            "sample weights: with weights a loss and a metric of the same formula differ. Other examples' weights do "
            "not change what an example does. For a loss like the metric: reduction='mean_with_sample_weight'."
        )
    if "sum" in reductions:
        yield "The loss is a sum over examples: larger batches make larger steps."


def _skipped(model: keras.Model) -> Iterator[str]:
    for part in inside(getattr(model, "optimizer", None)):
        count = int(ops.convert_to_numpy(part.skipped)) if isinstance(part, LossScaleOptimizer) and part.built else 0
        if count:
            scale = float(ops.convert_to_numpy(part.dynamic_scale))
            yield f"{count} updates were skipped: a gradient was not finite. The loss scale is {scale:g} now."


def _losses(model: keras.Model) -> Any:
    loss = getattr(model, "loss", None)
    return [] if loss is None else loss
