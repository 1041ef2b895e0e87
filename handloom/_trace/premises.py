"""The premises of a compiled function: the Python values that its versions hold as constants.

When one changes, the version is not valid any more: another one is, or is compiled.
"""

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import Any

from handloom._trace.python_state import PythonState
from handloom._trace.python_value import Value
from handloom._util.findings import warn
from handloom.backends import backend
from handloom.errors import RetraceWarning

_MANY_CHANGES = 5
_SHOWN = 3


class Premises:
    """The Python values that one version of a compiled function holds as constants.

    Args:
        values: The values.
    """

    def __init__(self, values: Iterable[Value] = ()) -> None:
        self._values = list(values)
        groups: dict[Any, list[Value]] = {}
        for value in self._values:
            groups.setdefault((value.get, value.is_plain), []).append(value)
        self._checks = [
            (get, [each.holder for each in group], [each.name for each in group], [each.value for each in group], plain)
            for (get, plain), group in groups.items()
        ]

    def hold(self) -> bool:
        """Whether nothing has changed. It takes some 30 ns a value: a loop by hand asks at each step."""
        for get, holders, names, values, plain in self._checks:
            present = map(get, holders, names) if get is dict.get else map(get, holders, names, repeat(None))
            if not (_equal(present, values) if plain else all(map(operator.is_, present, values))):
                return False
        return True

    @property
    def changed(self) -> list[Value]:
        """The values that have changed."""
        return [value for value in self._values if value.has_changed]


def _equal(present: Iterable[Any], values: list[Any]) -> bool:
    try:
        return list(present) == values
    except Exception:  # An array is there now.
        return False


class PremisesOfFunction:
    """Finds the premises of each version of a function, and tells of values that a variable should hold.

    Args:
        name: The name of the function.
        function: The function.
        is_news: Whether something has not been said of it yet.
    """

    def __init__(self, name: str, function: Callable[..., Any], is_news: Callable[[str], bool]) -> None:
        self._name, self._function, self._is_news = name, function, is_news
        self._changed_by_itself: dict[Any, Value] = {}
        self._newly_changed: list[Value] = []
        self._changes: Counter[str] = Counter()

    def state(self, arguments: Sequence[Any]) -> PythonState:
        """The Python values that the function can read now, also in objects that it is given."""
        return PythonState(self._function, arguments)

    def note_changes(self, before: PythonState, after: PythonState) -> None:
        """Notes what tracing has changed, also if it failed, from the states before and after."""
        kept = (value for key, value in before.values.items() if key in after.values and not value.is_made_now)
        changed = [value for value in kept if value.has_changed]
        self._changed_by_itself.update((value.key, value) for value in changed)
        self._newly_changed = changed

    def of_version(self, after: PythonState) -> Premises:
        """The premises of a version that is compiled now. What the function itself changes is not among them."""
        for value in self._newly_changed:
            self._warn_of_counting(value, after)
        own, stored = self._changed_by_itself, after.names.stored
        return Premises(each for key, each in after.values.items() if key not in own and each.last_name not in stored)

    def reason(self, changed: Sequence[Value], state: PythonState) -> str:
        """Why a version for the same arguments is compiled, as text.

        Warns of a number or an array at its first change, because more will follow; of other values at the fifth.
        """
        for value in changed:
            self._changes[value.path] += 1
            numbers = (value.is_number and value.now.is_number) or value.has_other_elements
            is_data = numbers or value.is_contents or backend.is_array(value.present)
            if self._changes[value.path] == (1 if is_data else _MANY_CHANGES):
                variable = f"keras.Variable({value.shown if value.is_number else '...'}, trainable=False)"
                warn(
                    f"HL141: {value.path} has changed from {value.shown} to {value.now.shown}, and {self._name} is "
                    "compiled again.",
                    "A compiled function holds Python values as constants: each new value compiles it again.",
                    f"Keep it in a variable, {value.path} = {variable}, changed by {value.path}.assign(...)."
                    if value.can_be_variable
                    else "It cannot be a variable there: change it seldom, such as once an epoch.",
                    category=RetraceWarning,
                    at=state.place(value),
                )
        shown = [f"{value.path}: {value.shown} -> {value.now.shown}" for value in changed]
        return "; ".join(shown[:_SHOWN]) + f"; and {len(shown) - _SHOWN} more" * (len(shown) > _SHOWN)

    def _warn_of_counting(self, value: Value, state: PythonState) -> None:
        """Warns of a number that the function changes, as by `+= 1`, and reads elsewhere.

        One that it only counts, to be shown, makes no step wrong; tests count traces in this way.
        """
        line = state.names.updated.get(value.last_name)
        is_read = value.last_name in state.names.used
        if line and is_read and value.is_number and value.now.is_number and self._is_news(f"counts {value.path}"):
            warn(
                f"HL140: {self._name} has changed {value.path} from {value.shown} to {value.now.shown} while it was "
                "compiled.",
                "Python runs when a step is compiled, not when it is taken: the value stays as it is.",
                f"Keep it in a variable, {value.path} = keras.Variable({value.shown}, trainable=False), and change it "
                f"in the step by {value.path}.assign(...) or assign_add(...). To act on it, use keras.ops.cond.",
                at=line,
            )
