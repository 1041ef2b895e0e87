"""Dependencies between marked tensors of a traced program; see `Backend.marked`."""

from collections.abc import Callable, Hashable, Iterable, Set
from typing import TypeVar

Node = TypeVar("Node", bound=Hashable)

_INPUT, _END = "", "\0"  # Names that no mark has.


class Dependencies:
    """Which marked tensors of a program depend on which others.

    Args:
        marks: Pairs of a name and a node. Several nodes may have the same name.
        inputs: The nodes of the program's arguments, without its variables.
        following: Returns the nodes that use the result of a node.
        is_end: Whether the program returns the result of a node, or writes it somewhere.
    """

    def __init__(
        self,
        marks: Iterable[tuple[str, Node]] = (),
        inputs: Iterable[Node] = (),
        following: Callable[[Node], Iterable[Node]] = lambda _: (),
        is_end: Callable[[Node], bool] = lambda _: False,
    ) -> None:
        names = {node: name for name, node in marks}
        self._next: dict[str, set[str]] = {name: set() for name in names.values()}
        if names:
            for name, node in [*((name, node) for node, name in names.items()), *((_INPUT, node) for node in inputs)]:
                self._next.setdefault(name, set()).update(_first_marks(node, names, following, is_end))

    @property
    def marks(self) -> list[str]:
        """All marks."""
        return [name for name in self._next if name != _INPUT]

    @property
    def unused(self) -> list[str]:
        """The marks on which no result and no write of the program depends."""
        return [name for name in self.marks if _END not in self._reached_from(name)]

    def depend_on(self, earlier: Iterable[str]) -> set[str]:
        """The marks that depend on one of these."""
        return set().union(*(self._reached_from(name) for name in earlier if name in self._next))

    def depend_on_arguments(self, *, not_through: Iterable[str]) -> set[str]:
        """The marks that depend on the program's arguments on a path without any of these."""
        return self._reached_from(_INPUT, set(not_through))

    def _reached_from(self, name: str, without: Set[str] = frozenset()) -> set[str]:
        def following(name: str) -> set[str]:
            return self._next.get(name, set()) - without

        return reached(following(name), following)


def _first_marks(
    node: Node, names: dict[Node, str], following: Callable[[Node], Iterable[Node]], is_end: Callable[[Node], bool]
) -> set[str]:
    """The first marks on each path from a node, and the end for a path that has no mark."""
    found = reached(following(node), lambda node: () if node in names else following(node))
    ends = any(map(is_end, [node, *found.difference(names)]))
    return {names[mark] for mark in found.intersection(names)} | ({_END} if ends else set())


def reached(start: Iterable[Node], following: Callable[[Node], Iterable[Node]]) -> set[Node]:
    """Some nodes, and all that follow them."""
    seen = set(start)
    waiting = list(seen)
    while waiting:
        new = set(following(waiting.pop())) - seen
        seen |= new
        waiting.extend(new)
    return seen
