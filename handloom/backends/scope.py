"""Values of variables during a trace.

Internals used: the methods of Keras's public `StatelessScope` by which variables read and write their values
(`get_current_value`, `add_update`), its `state_mapping`, and `original_scope`, the scope around it.
"""

from collections.abc import Callable, Iterable
from typing import Any

from handloom._keras import Tensor, Variable, forget_uninitialized, has_value, keras, value_in
from handloom.errors import VariableError

Reader = Callable[[Variable], Tensor]


class Scope(keras.StatelessScope):
    """Holds the values of variables that a traced function reads and writes, in place of the variables.

    Keras asks only the innermost scope for a value, and takes `None` for "unknown". This scope never returns `None`: it
    asks the scope around it. So scopes nest, and a regularizer finds the weight that is being differentiated.

    Args:
        bindings: Initial pairs (variable, value).
        outer: Called for a variable that the scope does not hold. By default it reads the enclosing scope, or,
            outside of all scopes, the variable.
        creates: Whether the outermost scope initializes the variables created inside when it closes. Only a scope that
            closes outside of any trace may do so.

    Attributes:
        incomplete: Whether a variable was read, in the outermost scope, that was created inside and has no value
            until the scope closes. The results then have the right shapes but not the right values.
    """

    def __init__(
        self, bindings: Iterable[tuple[Variable, Tensor]] = (), *, outer: Reader | None = None, creates: bool = False
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
        """The variables assigned inside, in the order of first assignment."""
        return list(self._written.values())

    def _enclosing(self, variable: Variable) -> Tensor:
        self.incomplete |= self.original_scope is None and not has_value(variable)
        return value_in(self.original_scope, variable)


class Recorder:
    """The outermost reader of a search for variables: records each variable that is read.

    Args:
        read: Returns the value of a variable when it is read for the first time.
    """

    def __init__(self, read: Reader) -> None:
        self._read = read
        self._seen: dict[int, tuple[Variable, Tensor]] = {}

    def __call__(self, variable: Variable) -> Tensor:
        if id(variable) not in self._seen:
            self._seen[id(variable)] = variable, self._read(variable)
        return self._seen[id(variable)][1]

    @property
    def variables(self) -> list[Variable]:
        """The variables read, in order."""
        return [variable for variable, _ in self._seen.values()]


def refuse(variable: Variable) -> Tensor:
    """The outermost reader of a trace whose variables are all known."""
    raise VariableError(
        f"HL103: The variable {variable.path!r} appeared only when the step was traced a second time.",
        "A step must use the same variables each time it runs.",
        "Create variables, and the layers and optimizers that own them, outside of the step.",
    )
