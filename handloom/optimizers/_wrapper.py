"""What optimizers around another optimizer have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from handloom._keras import Tensor, Variable, keras, trained_by
from handloom.backends import backend
from handloom.errors import ArgumentError
from handloom.optimizers._loss_scale import apply_unscaled
from handloom.optimizers._named import NamedOptimizers, as_optimizer
from handloom.optimizers._tree import inside


class Differentiate(Protocol):
    """A loss function, ready to be run and differentiated, as often as an optimizer likes."""

    def __call__(self) -> tuple[Any, list[Tensor | None]]:
        """Computes the loss with what belongs to it, and its gradients, one a variable."""
        ...

    def each(self) -> tuple[Any, list[list[Tensor | None]], list[Tensor | None]]:
        """The same of a loss function that returns a vector: the gradients of each loss, and of all penalties."""
        ...


class Wrapper(keras.optimizers.Optimizer):
    """An optimizer around another: what it does not do itself, the inner one does.

    Args:
        inner_optimizer: The optimizer to wrap.
        name: Name of the optimizer.
    """

    def __init__(self, inner_optimizer: Any, name: str | None = None) -> None:
        super().__init__(learning_rate=0.0, name=name)
        self.inner_optimizer = as_optimizer(inner_optimizer)
        self._check_sees_updates()

    def _check_sees_updates(self) -> None:
        for part in inside(self.inner_optimizer):
            if part.gradient_accumulation_steps:
                kind, steps = type(part).__name__, part.gradient_accumulation_steps
                raise ArgumentError(
                    f"HL328: {type(self).__name__} is around {kind}(gradient_accumulation_steps={steps}) and would see the "
                    "gradients of single steps. Have handloom.optimizers.GradientAccumulation gather them around "
                    "all of it: "
                    f"GradientAccumulation({type(self).__name__}({kind}(...), ...), {steps}).",
                )

    def build(self, variables: Sequence[Variable]) -> None:
        """Creates the slots for these variables."""
        if self.built:
            return
        # Optimizers by name build themselves, each when the layers that it owns are there.
        if not self.inner_optimizer.built and not isinstance(self.inner_optimizer, NamedOptimizers):
            self.inner_optimizer.build(variables)
        self.add_slots(list(variables))
        super().build(variables)

    def add_slots(self, variables: list[Variable]) -> None:
        """Creates what this wrapper itself keeps."""

    def keep(self, **slots: Any) -> None:
        """Sets attributes. Not by `setattr`: Keras would count the variables among them once more."""
        self.__dict__.update(slots)

    def take_gradients(
        self, differentiate: Differentiate, variables: list[Variable]
    ) -> tuple[Any, list[Tensor | None]]:
        """How gradients are taken: what `differentiate` computes, and the gradients to update with."""
        inner = self.inner_optimizer
        return inner.take_gradients(differentiate, variables) if isinstance(inner, Wrapper) else differentiate()

    def apply(self, grads: Sequence[Tensor | None], trainable_variables: Sequence[Variable] | None = None) -> None:
        """Updates variables.

        Args:
            grads: One gradient, or `None`, a variable.
            trainable_variables: The variables; may be left out once the optimizer is built.
        """
        variables = list(trained_by(self) if trainable_variables is None else trainable_variables)
        if not self.built:
            self.build(variables)
        self.update(list(map(backend.dense, grads)), variables)

    def update(self, gradients: list[Tensor | None], variables: list[Variable]) -> None:
        """What this wrapper does with gradients."""
        raise NotImplementedError

    def apply_inner(self, gradients: Sequence[Tensor | None], variables: Sequence[Variable]) -> None:
        """Hands gradients on to the inner optimizer."""
        apply_unscaled(self.inner_optimizer, gradients, variables)

    @property
    def variables(self) -> list[Variable]:
        return [*self._variables, *self.inner_optimizer.variables]

    @property
    def learning_rate(self) -> Any:
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def iterations(self) -> Variable:
        """Number of updates made."""
        return self.inner_optimizer.iterations

    def finalize_variable_values(self, var_list: Sequence[Variable]) -> None:
        self.inner_optimizer.finalize_variable_values(var_list)

    def get_config(self) -> dict[str, Any]:
        return {"name": self.name, "inner_optimizer": keras.saving.serialize_keras_object(self.inner_optimizer)}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Wrapper:
        return cls(**{name: _loaded(value, custom_objects) for name, value in config.items()})


def _loaded(value: Any, custom_objects: dict[str, Any] | None) -> Any:
    if isinstance(value, (dict, list)):
        return keras.saving.deserialize_keras_object(value, custom_objects)
    return value


def positive_whole(name: str, least: int = 1, **argument: Any) -> int:
    """The one argument given, if it is a whole number and not too small."""
    [(key, value)] = argument.items()
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(
            f"HL329: {name} takes a whole number, at least {least}, as {key}; received {key}={value!r}."
        )
    return value
