"""The base class of optimizers around another optimizer."""

from collections.abc import Sequence
from typing import Any, Self

from handloom._keras import Gradients, Variable, keras
from handloom.backends import backend
from handloom.errors import ArgumentError
from handloom.optimizers._loss_scale import apply_unscaled, built_variables
from handloom.optimizers._named import as_optimizer
from handloom.optimizers._tree import inside, taker_inside

serialized, deserialized = keras.saving.serialize_keras_object, keras.saving.deserialize_keras_object


class Wrapper(keras.optimizers.Optimizer):
    """An optimizer around another, to which it leaves everything that a subclass does not override.

    Subclasses override `add_slots` to create state, and `update` to change the gradients or the time of an update. One
    with a method `take_gradients` takes the gradients itself; see `LossFunction`.

    Args:
        inner_optimizer: The optimizer to wrap.
        name: The name of the optimizer.

    Attributes:
        options: The names of further arguments of the constructor. Each is also an attribute, and is saved.
    """

    options: tuple[str, ...] = ()

    def __init__(self, inner_optimizer: Any, name: str | None = None) -> None:
        super().__init__(learning_rate=0.0, name=name)
        self.inner_optimizer = as_optimizer(inner_optimizer)
        mine, taker = type(self).__name__, taker_inside(self.inner_optimizer)
        if taker and hasattr(self, "take_gradients"):
            raise ArgumentError(
                f"HL351: {mine} is around {type(taker).__name__}: both take the gradients of the loss themselves.",
                fix="Use one of them.",
            )
        for part in inside(self.inner_optimizer):
            if steps := part.gradient_accumulation_steps:
                inner = type(part).__name__
                raise ArgumentError(
                    f"HL328: {mine} is around {inner}(gradient_accumulation_steps={steps}).",
                    "It would see the gradients of single steps, not those of updates.",
                    f"Accumulate around both: GradientAccumulation({mine}({inner}(...), ...), {steps}).",
                )

    def build(self, variables: Sequence[Variable]) -> None:
        """Creates the slots for these variables."""
        if self.built:
            return
        if not self.inner_optimizer.built:
            self.inner_optimizer.build(variables)
        self.add_slots(list(variables))
        super().build(variables)

    def add_slots(self, variables: list[Variable]) -> None:
        """Creates the state of this wrapper itself."""

    def apply(self, grads: Gradients, trainable_variables: Sequence[Variable] | None = None) -> None:
        """Updates variables.

        Args:
            grads: One gradient, or `None`, per variable.
            trainable_variables: The variables; optional once the optimizer is built.

        Raises:
            OptimizerError: The variables are missing and the optimizer is not built.
        """
        self.update(list(map(backend.dense, grads)), built_variables(self, trainable_variables))

    def update(self, gradients: Gradients, variables: list[Variable]) -> None:
        """Updates with the gradients of a step; by default the inner optimizer does."""
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
        """The number of updates."""
        return self.inner_optimizer.iterations

    def finalize_variable_values(self, var_list: Sequence[Variable]) -> None:
        self.inner_optimizer.finalize_variable_values(var_list)

    def get_config(self) -> dict[str, Any]:
        return {name: serialized(getattr(self, name)) for name in ("name", "inner_optimizer", *self.options)}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Self:
        return cls(**deserialized(config, custom_objects))
