"""A model's steps, compiled, and kept for as long as what they were compiled for stays."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

from handloom._function import Function, run_eagerly
from handloom._keras import keras, layers_of
from handloom._model_data import batch_weight
from handloom._reporting import ReportingStep
from handloom.errors import StepError


class ModelSteps:
    """The compiled steps of one model.

    Args:
        model: Has `train_step`, `test_step` and `predict_step`.
        jit_compile: As for `hl.function`.

    Attributes:
        jit_compile: As given.
    """

    def __init__(self, model: keras.Model, jit_compile: bool | str = "auto") -> None:
        self.jit_compile = jit_compile
        self._model = model
        self._reporting: dict[str, ReportingStep] = {}
        self._prediction: Function | None = None
        self._trained: list[int] | None = None
        self._all_built = False

    def reporting(self, name: str) -> ReportingStep:
        """The training or test step, with the report of what it returns."""
        if name not in self._reporting:
            step = getattr(self._model, name)
            _check_takes_data(step, type(self._model).__name__)
            self._reporting[name] = ReportingStep(
                step,
                unpacks=False,
                weight=batch_weight,
                reset_metrics=self._model.reset_metrics,
                jit_compile=self.jit_compile,
            )
        return self._reporting[name]

    @property
    def prediction(self) -> Function:
        """The prediction step."""
        if self._prediction is None:
            self._prediction = Function(self._model.predict_step, jit_compile=self.jit_compile)
        return self._prediction

    def forget_if_changed(self) -> None:
        """Forgets steps that train what is no longer trainable, or not what is by now."""
        trained = [id(variable) for variable in self._model.trainable_variables]
        if self._trained not in (None, trained) and self._all_built:
            self._reporting.clear()
        self._trained, self._all_built = trained, parts_built(self._model)

    def running(self) -> contextlib.AbstractContextManager[Any]:
        """Within, steps run as the model was compiled: op by op, if with `run_eagerly=True`."""
        return run_eagerly(True) if self._model.run_eagerly else contextlib.nullcontext()


def parts_built(model: keras.Model) -> bool:
    """Whether all layers inside a model are built; itself it may have nothing to build."""
    return all(layer.built for layer in layers_of(model) if layer is not model)


def _check_takes_data(step: Any, model: str) -> None:
    parameters = inspect.signature(step).parameters.values()
    required = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    if len(required) > 1:
        raise StepError(
            f"{model}.{step.__name__} takes {', '.join(required)}; a step takes one argument, data, on every backend "
            "(Keras's own way on JAX, train_step(self, state, data), is not needed: read and write variables directly)."
        )
