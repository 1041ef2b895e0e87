"""The Keras internals that Handloom uses, each with its reason.

The rest of the package, apart from the backends, uses only the public API of Keras. `tests/test_keras.py` tests each
internal, so that a change in Keras shows there and not at a user's.

| internal | reason |
|---|---|
| `core`, `image`, `ops` | what the backend does for `cond`, loops and transforms, replaced while a step is traced |
| `get_stateless_scope` | Handloom's own scopes must know the scope around them |
| `Variable._value` | `assign` takes ten times longer per step, and converts values that need no conversion |
| `Layer._trainable`; `Variable._trainable`, `_regularizer`, `_constraint` | a compiled step looks at them at a call |
| `Variable._shape`, `_dtype` | the shape and dtype of a variable that has no value yet |
| `build._is_default` | a layer without a `build` of its own is built by a call |
| `Layer._flatten_layers` | all layers inside a layer |
| `Functional` | not exported; a subclass that is built from inputs and outputs must become one |
| `Model._compute_loss`, `_loss_tracker` | Keras's own default steps use them |
| `Model._symbolic_build` | Keras's steps on JAX, which take the state, need every variable before the first step |
| `Model._flatten_metrics_in_order` | `evaluate` returns its list in Keras's order |
| `Metric._direction` | callbacks that monitor a metric must know whether higher is better |
| `Model._initial_epoch` | `BackupAndRestore` sets the epoch at which `fit` resumes |
| `Optimizer._trainable_variables` | the variables that `apply` updates when it is given gradients only |
| `Optimizer._variables`, `_iterations`, `_tracker`, `_track_variable` | the slots, to add some in their order |
| `Optimizer._learning_rate` | copies of an optimizer share it; a compiled step looks whether it is still the same |
| `global_state` | to leave all scopes; to forget a variable whose initializer failed: later scopes would try again |
| `GLOBAL_SEED_GENERATOR`, `GLOBAL_RANDOM_SEED` | what `set_random_seed` sets; to make the generator before a trace |
| `seed_generator` | where Keras draws default seeds from Python's random numbers: a step may, its user may not |
| `python_utils` | in 3.13, `get_metrics_result` makes Python numbers of results by it: whose they are would be lost |
| `Layer._seed_generators` | the generators of dropout and noise, to seed them for a run |
| `get_keras_mask`, `set_keras_mask` | a mask is an attribute of a tensor, and the result of a gradient lacks it |
"""

import contextlib
import os
import random
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, TypeAlias

from handloom._util.backend_names import BACKENDS, missing_backend
from handloom.errors import BackendNotInstalledError


def _strange_backend(name: str | None) -> BackendNotInstalledError:
    return BackendNotInstalledError(
        f"HL902: Handloom runs on {', '.join(BACKENDS)}; Keras is set to {name!r}.",
        fix="Set KERAS_BACKEND before Python starts, for example: KERAS_BACKEND=jax "
        f"(it is {os.environ.get('KERAS_BACKEND', 'unset')!r} now; unset, ~/.keras/keras.json decides).",
    )


try:
    import keras as keras
except ModuleNotFoundError as error:
    if error.name in BACKENDS:
        raise missing_backend(str(error.name)) from error
    if error.name == os.environ.get("KERAS_BACKEND"):  # A backend of Keras that Handloom does not run on.
        raise _strange_backend(error.name) from error
    raise
except ValueError as error:  # No backend of Keras.
    if "Unable to import backend" not in str(error):
        raise
    raise _strange_backend(str(error).rpartition(" ")[2]) from error

if keras.backend.backend() not in BACKENDS:
    raise _strange_backend(keras.backend.backend())

from keras.src.backend.common import global_state  # noqa: E402
from keras.src.backend.common.masking import get_keras_mask as get_keras_mask  # noqa: E402
from keras.src.backend.common.masking import set_keras_mask as set_keras_mask  # noqa: E402
from keras.src.backend.common.stateless_scope import get_stateless_scope as get_stateless_scope  # noqa: E402
from keras.src.models.functional import Functional as Functional  # noqa: E402
from keras.src.random import seed_generator as seed_generator  # noqa: E402
from keras.src.random.seed_generator import GLOBAL_SEED_GENERATOR  # noqa: E402
from keras.src.utils import python_utils as python_utils  # noqa: E402
from keras.src.utils.rng_utils import GLOBAL_RANDOM_SEED  # noqa: E402

TESTED_KERAS = "3.13", "3.16"  # 3.16 as a nightly.

holders_of_core: tuple[ModuleType, ...]
"""The modules in which Keras looks up the functions of `core`."""
try:
    from keras.src.backend import core as core
    from keras.src.backend import image as image

    holders_of_core = (core,)
except ImportError:  # From 3.16 on.
    from keras.src.backend import ops

    core, image, holders_of_core = ops.core, ops.image, (ops.core, ops)

Variable: TypeAlias = Any
"""A `keras.Variable`. Keras has no type annotations, so this one only tells the reader."""

Layer: TypeAlias = Any
"""A `keras.Layer`."""

Tensor: TypeAlias = Any
"""A tensor of the backend."""

Tensors: TypeAlias = Sequence[Tensor]
Variables: TypeAlias = Sequence[Variable]

Gradients: TypeAlias = list[Tensor | None]
"""One gradient per variable; `None` if the variable does not reach the loss."""


def stored_value(variable: Variable) -> Tensor:
    """The tensor that a variable holds, whatever scope is open.

    A variable that is created while a scope is open has no value until the scope closes. Zeros replace it: callers use
    the shape and dtype only.
    """
    if variable._value is None:
        return keras.ops.zeros(variable._shape, dtype=variable._dtype)
    return variable._value


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without the one that Keras puts above the errors of layers, and plain."""
    lines = map(str.strip, str(error).replace("\x1b[1m", "").replace("\x1b[0m", "").splitlines())
    return next((line for line in lines if line and not line.startswith("Exception encountered when calling")), "")


def has_value(variable: Variable) -> bool:
    """Whether a variable is initialized."""
    return variable._value is not None


def forget_uninitialized() -> None:
    """Removes the variables that Keras could not initialize, so that the next scope does not try again."""
    global_state.set_global_attribute("uninitialized_variables", [])


@contextlib.contextmanager
def outside_of_scopes() -> Iterator[None]:
    """A block outside of all scopes: variables have their own values, and are initialized when they are created."""
    scope = get_stateless_scope()
    global_state.set_global_attribute("stateless_scope", None)
    try:
        yield
    finally:
        global_state.set_global_attribute("stateless_scope", scope)


def has_own_build(layer: Layer) -> bool:
    """Whether a layer has a `build` of its own, which receives shapes."""
    return not getattr(layer.build, "_is_default", False)


def seed_generators_of(layer: Layer) -> list[keras.random.SeedGenerator]:
    """The seed generators of a layer itself, in the order of their creation."""
    return list(layer._seed_generators)


def global_seed_generator() -> keras.random.SeedGenerator:
    """Keras's global seed generator, which is made if it does not exist.

    Keras seeds it by a number of Python's random generator. Here that number is seen but not drawn: what is built later
    gets the seeds that it gets in Keras, where the generator is made only if it is used.
    """
    if global_state.get_global_attribute(GLOBAL_SEED_GENERATOR) is None:
        copy = random.Random()
        copy.setstate(random.getstate())
        global_state.set_global_attribute(GLOBAL_SEED_GENERATOR, keras.random.SeedGenerator(copy.randint(1, 10**9)))
    return global_state.get_global_attribute(GLOBAL_SEED_GENERATOR)


def seed_keras(seed: int) -> None:
    """Makes the seeds of new generators follow from a seed. A global one stays: compiled steps keep it.

    Keras draws these seeds from Python's random numbers, which must have been seeded.
    """
    global_state.set_global_attribute(GLOBAL_RANDOM_SEED, seed)
    generator = global_state.get_global_attribute(GLOBAL_SEED_GENERATOR)
    if generator is not None:
        global_state.set_global_attribute(GLOBAL_SEED_GENERATOR, None)
        generator.state.assign(global_seed_generator().state)
        global_state.set_global_attribute(GLOBAL_SEED_GENERATOR, generator)


def value_in(scope: keras.StatelessScope | None, variable: Variable) -> Tensor:
    """The value of a variable in a scope, never `None` and never autocast."""
    value = None if scope is None else scope.get_current_value(variable)
    return stored_value(variable) if value is None else value


def current_value(variable: Variable) -> Tensor:
    """The value of a variable in the caller's scope."""
    return value_in(get_stateless_scope(), variable)


def default_loss(model: Layer, x: Any, y: Any, y_pred: Any, sample_weight: Any, *, training: bool) -> Tensor:
    """The compiled loss plus added losses, also for a model whose `compute_loss` takes no `training`."""
    return model._compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training)


def set_loss_tracker(model: Layer, metric: keras.Metric) -> None:
    """Replaces the metric in which Keras's own steps average the loss."""
    model.__dict__["_loss_tracker"] = metric  # As in `compile`: Keras would track an attribute as a metric.


def direction_of(metric: keras.Metric) -> str | None:
    """`"up"` if higher is better, `"down"` if lower is; `None` if Keras does not know."""
    return getattr(metric, "_direction", None)


def in_keras_order(model: Layer, logs: dict[str, Any]) -> Any:
    """Results as `evaluate` returns them: a list in the order of the metrics, or the only value."""
    return model._flatten_metrics_in_order(logs)


def trained_by(optimizer: keras.Optimizer) -> list[Variable]:
    """The variables that an optimizer was built for."""
    return list(optimizer._trainable_variables)


def trained_in(optimizer: keras.Optimizer) -> tuple[dict[str, Any], str]:
    """Where an optimizer keeps the list of these variables: a dict, and the key. Each build makes a new list."""
    return optimizer.__dict__, "_trainable_variables"


def learning_rate_in(optimizer: keras.Optimizer) -> tuple[dict[str, Any], str]:
    """Where an optimizer keeps its learning rate, a variable or a schedule: a dict, and the key."""
    return optimizer.__dict__, "_learning_rate"


def optimizers_in(optimizer: Any) -> list[keras.Optimizer]:
    """The optimizers directly inside another, which may come from any library."""
    found = [*getattr(optimizer, "optimizers", ()), getattr(optimizer, "inner_optimizer", None)]
    return [inner for inner in found if isinstance(inner, keras.Optimizer)]


def slots_of(optimizer: keras.Optimizer) -> list[Variable]:
    """The slots of an optimizer itself, without those of an optimizer inside it."""
    others = (optimizer._iterations, optimizer._learning_rate)
    return [variable for variable in optimizer._variables if not any(variable is other for other in others)]


def forget_slots(optimizer: keras.Optimizer) -> None:
    """Removes the slots of an optimizer from its variables."""
    for slot in slots_of(optimizer):
        optimizer._tracker.untrack(slot)


def replace_slot(optimizer: keras.Optimizer, new: Variable, old: Variable) -> None:
    """Puts an earlier slot in place of the newest one."""
    optimizer._tracker.untrack(new)
    optimizer._track_variable(old)


def share_learning_rate(optimizer: keras.Optimizer, other: keras.Optimizer) -> None:
    """Makes an optimizer that is not built share the learning rate of another."""
    if isinstance(other._learning_rate, keras.Variable):
        optimizer._tracker.untrack(optimizer._learning_rate)
        optimizer._learning_rate = other._learning_rate


def take_initial_epoch(model: Any) -> int:
    """The epoch at which a callback of Keras makes the run resume, or 0; resets it, which Keras never does."""
    epoch = getattr(model, "_initial_epoch", None) or 0
    model._initial_epoch = None
    return int(epoch)


def layers_of(layer: Layer) -> Iterator[Layer]:
    """A layer and all layers inside it, at any depth."""
    yield from layer._flatten_layers()


def trainable_in(part: Layer | Variable) -> tuple[dict[str, Any], str]:
    """Where a layer or variable keeps whether it is trainable: a dict, and the key."""
    return part.__dict__, "_trainable"


def penalties_in(variable: Variable) -> list[tuple[dict[str, Any], str]]:
    """Where a variable keeps its regularizer and its constraint, if it has them: a dict, and the key."""
    inside = variable.__dict__
    return [(inside, name) for name in ("_regularizer", "_constraint") if inside.get(name) is not None]


def mark_built(model: Any) -> None:
    """Marks a model as built if all layers inside it are. Keras does so only when the model itself is called.

    A model with a `build` of its own is left to it.
    """
    if isinstance(model, keras.Model) and not model.built and type(model).build is keras.Model.build:
        model.built = bool(model.variables) and all(layer.built for layer in layers_of(model) if layer is not model)


def build_symbolically(model: Any, data: Any) -> None:
    """Creates the variables of a compiled model, of its metrics and of its optimizer, for a batch."""
    model._symbolic_build(data_batch=data)
