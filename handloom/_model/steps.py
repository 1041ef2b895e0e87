"""A model's steps, compiled, and kept for as long as what they were compiled for stays."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any, TypeAlias

from handloom._data.sample_weight import weighed
from handloom._keras import keras, layers_of
from handloom._reporting.step import ReportingStep
from handloom._trace.eager import eagerly
from handloom._trace.function import Function, check_jit_compile
from handloom.errors import StepError
from handloom.optimizers._add_variables import add_variables_in_order

Parts: TypeAlias = dict[int, tuple[Any, bool]]
"""What steps are compiled for, and whether it is trained, by id: a part's own as long as the part is kept."""


class ModelSteps:
    """The compiled steps of one model.

    Args:
        model: Has `train_step`, `test_step` and `predict_step`.
        jit_compile: As for `hl.function`.
        default: The class whose own steps need a loss and an optimizer.

    Attributes:
        jit_compile: As given.
    """

    def __init__(self, model: keras.Model, jit_compile: bool | str, default: type[keras.Model]) -> None:
        check_jit_compile(jit_compile)
        self.jit_compile = jit_compile
        self._default = default
        self._model = model
        self._reporting: dict[str, ReportingStep] = {}
        self._prediction: Function | None = None
        self._parts: Parts = {}
        self._running = False

    def check_compiled(self, method: str, name: str) -> None:
        """Refuses to run a default step of a model that has no loss yet."""
        cls = type(self._model)
        if not self._model.compiled and getattr(cls, name) is getattr(self._default, name):
            raise StepError(
                f"HL213: Call compile() before {method}(): {cls.__name__} uses the default {name}, which needs a loss"
                f"{' and an optimizer' if name == 'train_step' else ''}.",
            )

    def reporting(self, name: str) -> ReportingStep:
        """The training or test step, with the report of what it returns."""
        if name not in self._reporting:
            step = getattr(self._model, name)
            _check_takes_data(step, type(self._model).__name__)
            self._reporting[name] = ReportingStep(
                step,
                unpacks=False,
                weighed=weighed,
                reset_metrics=self._model.reset_metrics,
                jit_compile=self.jit_compile,
            )
        return self._reporting[name]

    @property
    def reductions(self) -> dict[str, dict[str, str]]:
        """How each reported value is reduced, by step and name; of the steps that have run."""
        return {name: dict(step.reductions) for name, step in self._reporting.items() if step.reductions}

    @property
    def prediction(self) -> Function:
        """The prediction step."""
        if self._prediction is None:
            self._prediction = Function(self._model.predict_step, jit_compile=self.jit_compile)
        return self._prediction

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Within, steps run as the model was compiled: op by op, if with `run_eagerly=True`.

        Steps that were compiled for what the model no longer is are forgotten first: for other layers, another
        optimizer, or to train what by now is frozen. The optimizer is given slots for what it is to train now.
        """
        outermost, self._running = not self._running, True
        if outermost:
            self._forget_if_changed()
        try:
            with eagerly(True) if self._model.run_eagerly else contextlib.nullcontext():
                yield
        finally:
            if outermost:
                self._running = False
                self._parts = self._present_parts() | self._parts  # With what the first run has built.

    def _forget_if_changed(self) -> None:
        present = self._present_parts()
        if _trained(present) != _trained(self._parts):
            self._reporting.clear()
            self._prediction = None
            self._parts = present
            optimizer = getattr(self._model, "optimizer", None)
            if optimizer is not None and parts_built(self._model):
                add_variables_in_order(optimizer, self._model.trainable_variables, self._model.variables)

    def _present_parts(self) -> Parts:
        model = self._model
        parts = {id(part): (part, part.trainable) for part in [*layers_of(model), *model.variables]}
        optimizer = getattr(model, "optimizer", None)
        return parts | {id(optimizer): (optimizer, True)}


def start_steps(model: keras.Model, jit_compile: bool | str, default: type[keras.Model]) -> None:
    """Gives a model its steps, not compiled yet."""
    # Not `setattr`: Keras would look for layers in it.
    model.__dict__["_steps"] = ModelSteps(model, jit_compile, default)


def steps_of(model: keras.Model) -> ModelSteps:
    """The steps that a model was given."""
    steps: ModelSteps = model.__dict__["_steps"]
    return steps


def _trained(parts: Parts) -> dict[int, bool]:
    return {key: trained for key, (_, trained) in parts.items()}


def parts_built(model: keras.Model) -> bool:
    """Whether all layers inside a model are built; itself it may have nothing to build."""
    return all(layer.built for layer in layers_of(model) if layer is not model)


def _check_takes_data(step: Any, model: str) -> None:
    parameters = inspect.signature(step).parameters.values()
    required = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    if len(required) > 1:
        raise StepError(
            f"HL214: {model}.{step.__name__} takes {', '.join(required)}; on every backend a step takes one argument, data.",
            "Keras's own way on JAX, train_step(self, state, data), is not needed here.",
            "Write train_step(self, data), and read and write variables directly.",
        )
