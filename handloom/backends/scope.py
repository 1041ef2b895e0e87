"""Variable values during one trace.

Internals used: of Keras's `StatelessScope`, which it exports, how variables ask it (`get_current_value`) and tell it
(`add_update`), its `state_mapping` and its `original_scope`, the scope around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from handloom._keras import Tensor, Variable, forget_uninitialized, has_value, keras, value_in
from handloom.errors import VariableError

Reader = Callable[[Variable], Tensor]


class Scope(keras.StatelessScope):
    """Keeps what a traced function reads and writes of variables apart from the variables themselves.

    Keras asks only the innermost scope, and takes `None` for "not mine". This one never answers `None`:
    what it does not hold, it asks of the scope around it. Hence scopes nest, and a regularizer finds the weight
    that is being differentiated.

    Args:
        bindings: Pairs (variable, value) that the scope holds from the start.
        outer: Called for a variable that the scope does not hold; by default the scope that encloses this one
            is asked, and outside of all scopes the variable itself.
        creates: Whether variables created inside are initialized when the scope closes, if it is the
            outermost. Only a scope that closes outside of any trace may do so.

    Attributes:
        incomplete: Whether a variable was read, in the outermost scope, that was created inside and has no value
            before the scope closes. What was computed then has the right shapes but not the right values.
    """

    def __init__(
        self,
        bindings: Iterable[tuple[Variable, Tensor]] = (),
        *,
        outer: Reader | None = None,
        creates: bool = False,
    ) -> None:
        super().__init__(collect_losses=True, initialize_variables=creates)
        self.state_mapping = {id(variable): value for variable, value in bindings}
        self.incomplete = False
        self._outer = outer or self._enclosing
        self._written: dict[int, Variable] = {}

    def __exit__(self, *args: Any) -> None:
        try:
            super().__exit__(*args)
        except BaseException:
            forget_uninitialized()
            raise

    def get_current_value(self, variable: Variable) -> Tensor:
        value = self.state_mapping.get(id(variable))
        return self._outer(variable) if value is None else value

    def add_update(self, update: tuple[Variable, Tensor]) -> None:
        variable, value = update
        self._written[id(variable)] = variable
        self.state_mapping[id(variable)] = value

    @property
    def written(self) -> list[Variable]:
        """The variables assigned inside, in the order of their first assignment."""
        return list(self._written.values())

    def _enclosing(self, variable: Variable) -> Tensor:
        self.incomplete |= self.original_scope is None and not has_value(variable)
        return value_in(self.original_scope, variable)


class Recorder:
    """The outermost reader of a discovery: gives each variable's value, and remembers who asked for what.

    Args:
        read: Gives the value of a variable the first time it is asked for.
    """

    def __init__(self, read: Reader) -> None:
        self._read = read
        self._values: dict[int, Tensor] = {}
        self._variables: dict[int, Variable] = {}

    def __call__(self, variable: Variable) -> Tensor:
        key = id(variable)
        if key not in self._values:
            self._variables[key] = variable
            self._values[key] = self._read(variable)
        return self._values[key]

    @property
    def variables(self) -> list[Variable]:
        """The variables asked for, in order."""
        return list(self._variables.values())


def refuse(variable: Variable) -> Tensor:
    """The outermost reader of a program's own trace, when all its variables are known."""
    raise VariableError(
        f"HL103: The variable {variable.path!r} appeared only when the step was traced a second time. A step must use the "
        "same variables each time it runs: create them, and the layers and optimizers that hold them, outside of it.",
    )
