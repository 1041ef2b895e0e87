"""The compiled steps of a model, kept until the model changes."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from handloom._data.sample_weight import ThirdPart
from handloom._keras import Variable, keras, layers_of, mark_built
from handloom._model.stateful_steps import build_all
from handloom._model.takes_weights import takes_weights
from handloom._reporting.step import ReportingStep
from handloom._trace.eager import eagerly
from handloom._trace.function import Function, check_jit_compile
from handloom._trace.gradients import build
from handloom._util.findings import warn
from handloom.backends import backend
from handloom.errors import StepError
from handloom.optimizers._add_variables import add_variables_in_order, at_once

Parts: TypeAlias = dict[int, Any]
"""The layers, variables and optimizer that steps are compiled for, by id.

It holds the parts themselves, so that no other object can have their ids.
"""


class ModelSteps:
    """The compiled steps of one model.

    Args:
        model: Has `train_step`, `test_step` and `predict_step`.
        jit_compile: As for `hl.function`.
        together: Number of training steps in one dispatch, or `"auto"`.

    Attributes:
        jit_compile: As given.
    """

    def __init__(self, model: keras.Model, jit_compile: bool | str = "auto", together: int | str = "auto") -> None:
        check_jit_compile(jit_compile)
        self.jit_compile, self._together, self._model = jit_compile, together, model
        self._reporting: dict[tuple[str, bool], ReportingStep] = {}
        self._third_parts: dict[tuple[str, bool | None], ThirdPart] = {}
        self._prediction: Function | None = None
        self._parts: Parts = {}
        self._trainable: dict[int, Variable] = {}
        self._running = self._has_warned = False

    def third_part(self, name: str, *given: Any) -> ThirdPart:
        """What the third part of a batch is to `train_step` or `test_step`; see `takes_weights`."""
        takes = takes_weights(self._model, name, *given)
        return self._third_parts.setdefault((name, takes), ThirdPart(takes))

    def reporting(self, name: str, third: ThirdPart) -> ReportingStep:
        """The compiled `train_step` or `test_step`, with the report of its results.

        Args:
            name: The name of the step.
            third: What the third part of a batch is, from `third_part`.
        """
        key = (name, third.is_known)
        if key not in self._reporting:
            model, step = self._model, self._step(name)
            observed = None if third.is_known else third
            options = {"model": model, "jit_compile": self.jit_compile}
            self._reporting[key] = ReportingStep(step, unpacks=False, weighed=third.weighed, third=observed, **options)
        return self._reporting[key]

    @property
    def together(self) -> int | str:
        """Number of training steps in one dispatch, as given to `compile` or set as an attribute since."""
        now = self._model.steps_per_execution
        return self._together if self._together == "auto" and now == 1 else now

    @property
    def options(self) -> dict[str, Any]:
        """The options as a saved model keeps them."""
        return {"jit_compile": self.jit_compile, "steps_per_execution": self.together}

    @property
    def reductions(self) -> dict[str, dict[str, str]]:
        """How each reported value is reduced over an epoch, by step and name, for the steps that have run."""
        return {name: dict(step.reductions) for (name, _), step in self._reporting.items() if step.reductions}

    @property
    def prediction(self) -> Function:
        """The compiled `predict_step`."""
        if self._prediction is None:
            self._prediction = Function(self._step("predict_step"), jit_compile=self.jit_compile)
        return self._prediction

    def _step(self, name: str) -> Callable[..., Any]:
        step = backend.step_of(self._model, name, build_all)
        _check_own_function(self._model, name)
        return step

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Within the block, steps run as the model was compiled: eagerly, if with `run_eagerly=True`.

        If the model has other layers or another optimizer than before, it first drops the compiled steps. See also
        `add_unfrozen`.
        """
        outermost, self._running = not self._running, True
        if outermost:
            self._drop_steps_if_changed()
        try:
            with eagerly(True) if self._model.run_eagerly else contextlib.nullcontext():
                yield
        finally:
            if outermost:
                self._running = False
                mark_built(self._model)
                self._note_what_was_built()

    def train_nothing(self, loss_fn: Callable[[], Any]) -> bool:
        """Whether the model has no trainable weights, once `loss_fn` has built it; the first time it warns."""
        build(self._model, loss_fn)
        nothing = not self._model.trainable_variables
        if nothing and not self._has_warned:
            self._has_warned = True
            warn(
                f"HL255: {type(self._model).__name__} has no trainable weights: training does not change it.",
                "The loss and the metrics are computed all the same.",
                "If its layers are frozen by mistake, set layer.trainable = True.",
            )
        return nothing

    def add_unfrozen(self) -> None:
        """Gives the optimizer slots for the variables that have become trainable, or were added, since the last time.

        Not for others: an optimizer may be built for a part of the model.
        """
        optimizer, trainable = getattr(self._model, "optimizer", None), self._model.trainable_variables
        news = [variable for variable in trainable if id(variable) not in self._trainable]
        if news and optimizer is not None and optimizer.built and layers_are_built(self._model):
            with at_once():
                add_variables_in_order(optimizer, news, self._model.variables)
        self._trainable = {id(variable): variable for variable in trainable}

    def _drop_steps_if_changed(self) -> None:
        present = self._present_parts()
        if present.keys() != self._parts.keys():
            self._reporting.clear()
            self._prediction = None
            self._parts = present
        self.add_unfrozen()

    def _note_what_was_built(self) -> None:
        """The first run builds layers and, for them, optimizers."""
        built = {key: part for key, part in self._present_parts().items() if key not in self._parts}
        self._parts |= built
        self._trainable |= {key: part for key, part in built.items() if getattr(part, "trainable", False)}

    def _present_parts(self) -> Parts:
        model, optimizer = self._model, getattr(self._model, "optimizer", None)
        return {id(part): part for part in [optimizer, *layers_of(model), *model.variables]}


def layers_are_built(model: keras.Model) -> bool:
    """Whether all layers inside a model are built. The model itself may have nothing to build."""
    return all(layer.built for layer in layers_of(model) if layer is not model)


def check_compiled(model: keras.Model, method: str, step: str) -> None:
    """Raises an error if a default step, which needs a loss, is about to run and the model is not compiled."""
    if not model.compiled and getattr(type(model), step).__module__.startswith("handloom._model."):
        raise StepError(
            f"HL213: {method}() was called before compile().",
            f"{type(model).__name__} uses the default {step}, which needs the loss given to compile().",
            f"Call compile() first, or define {step}(self, data).",
        )


def _check_own_function(model: keras.Model, name: str) -> None:
    hook = f"make_{name.removesuffix('_step')}_function"
    if getattr(getattr(model, hook), "__func__", None) is not getattr(keras.Model, hook):
        warn(
            f"HL259: {type(model).__name__}.{hook} is not called.",
            f"Here {name} itself is compiled, on every backend; in Keras, {hook} compiles it in another way on each.",
            f"Put what it does for a batch into {name}(self, data), or write the loop yourself, with hl.function.",
        )
