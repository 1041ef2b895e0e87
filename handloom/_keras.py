"""Keras, and the few of its internals that Handloom uses, each with its reason.

Everything else in the package (backends aside) uses only what Keras exports. `tests/test_keras.py`
checks each of these, so that a change in Keras is noticed there and not by a user.

| internal                     | why                                                                    |
|------------------------------|------------------------------------------------------------------------|
| `get_stateless_scope`        | a scope of ours must know which scope encloses it                      |
| `Variable._value`            | `assign` costs ten times more per step, and converts what needs none   |
| `Variable._shape`, `_dtype`  | of a variable without a value yet, whatever dtype a layer computes in  |
| `Layer._flatten_layers`      | which layers a layer is made of, at any depth                          |
| `Functional`                 | not exported; a subclass built from inputs and outputs must become one |
| `Model._compute_loss`, `_loss_tracker` | what Keras's own default steps use |
| `Model._flatten_metrics_in_order` | `evaluate` returns its list in Keras's order                      |
| `Metric._direction`          | whether more of a metric is better, which callbacks that watch it must know |
| `Model._initial_epoch`       | how `BackupAndRestore` tells the loop where to go on                   |
| `Optimizer._trainable_variables` | for what `apply` updates when it is told gradients only            |
| `Optimizer._variables`, `_iterations`, `_tracker` | which variables are slots, to make them anew       |
| `Optimizer._learning_rate`   | no slot; a copy of an optimizer shares it                              |
| `global_seed_generator`      | it must exist before a step is traced, as any variable must             |
| `global_state`               | has a variable whose initializer failed, and would fail in each later scope |
| `GLOBAL_SEED_GENERATOR`      | its name there: `set_random_seed` replaces it, but compiled steps hold the one before |
| `Layer._seed_generators`     | what dropout and noise draw from, to be seeded for a run                |
| `get_keras_mask`, `set_keras_mask` | a mask is an attribute of a tensor, which what comes out of a gradient lacks |
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any, TypeAlias

from handloom.errors import BackendNotInstalledError

BACKENDS = ("jax", "tensorflow", "torch")


def _missing_backend(name: str) -> BackendNotInstalledError:
    installed = [other for other in BACKENDS if importlib.util.find_spec(other)]
    choice = f", or choose an installed one: KERAS_BACKEND={installed[0]}" if installed else ""
    return BackendNotInstalledError(
        "HL901",
        f"Keras is set to the backend {name!r}, which is not installed. "
        f'Install it with: pip install "handloom[{name}]"{choice}.',
    )


def _strange_backend(name: str | None) -> BackendNotInstalledError:
    return BackendNotInstalledError(
        "HL902",
        f"Handloom runs on {', '.join(BACKENDS)}; Keras is set to {name!r}. "
        "Set KERAS_BACKEND before Python starts, for example: KERAS_BACKEND=jax "
        f"(it is {os.environ.get('KERAS_BACKEND', 'unset')!r} now; unset, ~/.keras/keras.json decides).",
    )


try:
    import keras
except ModuleNotFoundError as error:
    if error.name in BACKENDS:
        raise _missing_backend(str(error.name)) from error
    if error.name == os.environ.get("KERAS_BACKEND"):  # One of Keras's, not of ours, and not installed.
        raise _strange_backend(error.name) from error
    raise
except ValueError as error:  # Not one of Keras's either.
    if "Unable to import backend" not in str(error):
        raise
    raise _strange_backend(str(error).rpartition(" ")[2]) from error

if keras.backend.backend() not in BACKENDS:
    raise _strange_backend(keras.backend.backend())

from keras.src.backend.common import global_state  # noqa: E402
from keras.src.backend.common.masking import get_keras_mask, set_keras_mask  # noqa: E402
from keras.src.backend.common.stateless_scope import get_stateless_scope  # noqa: E402
from keras.src.models.functional import Functional  # noqa: E402
from keras.src.random.seed_generator import GLOBAL_SEED_GENERATOR, global_seed_generator  # noqa: E402

Variable: TypeAlias = Any
"""A `keras.Variable`. Keras has no type annotations, so this one only tells the reader."""

Layer: TypeAlias = Any
"""A `keras.Layer`."""

Tensor: TypeAlias = Any
"""A tensor of the backend."""

__all__ = [
    "BACKENDS",
    "Functional",
    "Layer",
    "Tensor",
    "Variable",
    "current_value",
    "default_loss",
    "direction_of",
    "first_line",
    "forget_slots",
    "forget_uninitialized",
    "get_keras_mask",
    "get_stateless_scope",
    "global_seed_generator",
    "has_value",
    "in_keras_order",
    "keep_global_seed_generator",
    "keras",
    "layers_of",
    "seed_generators_of",
    "set_keras_mask",
    "set_loss_tracker",
    "share_learning_rate",
    "slots_of",
    "stored_value",
    "take_initial_epoch",
    "trained_by",
    "value_in",
]


def stored_value(variable: Variable) -> Tensor:
    """The tensor that a variable holds, whatever scope is open.

    A variable made while a scope is open has none until the scope closes; zeros stand in for it, which is right
    for everything that looks at shapes and dtypes only.
    """
    if variable._value is None:
        return keras.ops.zeros(variable._shape, dtype=variable._dtype)
    return variable._value


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    # Where a layer or an operation failed, Keras puts above it what was called, and sets the rest in bold.
    lines = str(error).replace("\x1b[1m", "").replace("\x1b[0m", "").splitlines()
    told = [
        line.strip() for line in lines if line.strip() and not line.startswith("Exception encountered when calling")
    ]
    return told[0] if told else ""


def has_value(variable: Variable) -> bool:
    """Whether a variable is initialized."""
    return variable._value is not None


def forget_uninitialized() -> None:
    """Has Keras not initialize again, at the end of the next scope, what it could not initialize."""
    global_state.set_global_attribute("uninitialized_variables", [])


def seed_generators_of(layer: Layer) -> list[keras.random.SeedGenerator]:
    """The seed generators of a layer itself, in the order of their making."""
    return list(layer._seed_generators)


@contextlib.contextmanager
def keep_global_seed_generator() -> Iterator[None]:
    """Within, Keras may make a new global seed generator; after, it is the one from before, with the state of the new.

    Compiled steps hold the one from before.
    """
    before = global_seed_generator()
    yield
    before.state.assign(global_seed_generator().state)
    global_state.set_global_attribute(GLOBAL_SEED_GENERATOR, before)


def value_in(scope: keras.StatelessScope | None, variable: Variable) -> Tensor:
    """The value a variable has in a scope, never `None` and never autocast."""
    value = None if scope is None else scope.get_current_value(variable)
    return stored_value(variable) if value is None else value


def current_value(variable: Variable) -> Tensor:
    """The value a variable has where the caller runs."""
    return value_in(get_stateless_scope(), variable)


def default_loss(model: Layer, x: Any, y: Any, y_pred: Any, sample_weight: Any, *, training: bool) -> Tensor:
    """The compiled loss with what layers add, also where a model overrides `compute_loss` without `training`."""
    return model._compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training)


def set_loss_tracker(model: Layer, metric: keras.Metric) -> None:
    """Replaces the metric in which Keras's own steps keep the loss, the first of a compiled model's metrics."""
    model.__dict__["_loss_tracker"] = metric  # As `compile` does it: not as a metric of the model's own.


def direction_of(metric: keras.Metric) -> str | None:
    """Whether a metric is better when it goes "up" or "down"; `None` where Keras does not say."""
    return getattr(metric, "_direction", None)


def in_keras_order(model: Layer, logs: dict[str, Any]) -> Any:
    """Reported values as `evaluate` returns them: a list in the order of the metrics, or the only one."""
    return model._flatten_metrics_in_order(logs)


def trained_by(optimizer: keras.Optimizer) -> list[Variable]:
    """The variables that an optimizer was built for."""
    return list(optimizer._trainable_variables)


def slots_of(optimizer: keras.Optimizer) -> list[Variable]:
    """What `build` made for an optimizer itself, not for one inside it."""
    others = (optimizer._iterations, optimizer._learning_rate)
    return [variable for variable in optimizer._variables if not any(variable is other for other in others)]


def forget_slots(optimizer: keras.Optimizer) -> None:
    """Has an optimizer count its slots no longer among its variables."""
    for slot in slots_of(optimizer):
        optimizer._tracker.untrack(slot)


def share_learning_rate(optimizer: keras.Optimizer, other: keras.Optimizer) -> None:
    """Gives an optimizer that is not built the learning rate of another: where one changes, the other does."""
    if isinstance(other._learning_rate, keras.Variable):
        optimizer._tracker.untrack(optimizer._learning_rate)
        optimizer._learning_rate = other._learning_rate


def take_initial_epoch(model: Any) -> int:
    """The epoch that a callback of Keras set to go on from, or 0. It counts once: Keras never resets it."""
    epoch = getattr(model, "_initial_epoch", None) or 0
    model._initial_epoch = None
    return int(epoch)


def layers_of(layer: Layer) -> Iterator[Layer]:
    """A layer and all layers inside it, at any depth."""
    yield from layer._flatten_layers()
