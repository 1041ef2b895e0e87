"""What depends on what in a traced program, whatever its nodes are: see `Backend.marked`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

Node = TypeVar("Node", bound=Hashable)

_INPUT, _END = "", "\0"  # No marks have these names.


class Dependencies:
    """Which marked tensors of a program reach which others.

    Args:
        marks: Pairs of a name and a node. One name may be given to several nodes.
        inputs: The nodes of the program's arguments, its variables left out.
        following: Gives the nodes that use what a node computes.
        is_end: Whether what a node computes is returned by the program, or left behind somewhere.
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
    def unused(self) -> list[str]:
        """The marks on which nothing depends that the program returns or leaves behind."""
        return [name for name in self._next if name != _INPUT and _END not in self._reached_from(name)]

    def depend_on(self, earlier: Iterable[str]) -> set[str]:
        """The marks that depend on one of some others."""
        return set().union(*(self._reached_from(name) for name in earlier if name in self._next))

    def depend_on_arguments(self, *, not_through: Iterable[str]) -> set[str]:
        """The marks that depend on the program's arguments in another way than through some others."""
        return self._reached_from(_INPUT, set(not_through))

    def _reached_from(self, name: str, without: Iterable[str] = ()) -> set[str]:
        seen, waiting = set(without), [name]
        found = set()
        while waiting:
            new = self._next.get(waiting.pop(), set()) - seen
            seen |= new
            found |= new
            waiting.extend(new)
        return found


def _first_marks(
    node: Node, names: dict[Node, str], following: Callable[[Node], Iterable[Node]], is_end: Callable[[Node], bool]
) -> set[str]:
    """The marks that a way from a node meets first, and whether one leads to an end before it meets any."""
    found: set[str] = set()
    seen, waiting = {node}, [node]
    while waiting:
        reached = waiting.pop()
        if is_end(reached):
            found.add(_END)
        for new in set(following(reached)) - seen:
            seen.add(new)
            if new in names:
                found.add(names[new])
            else:
                waiting.append(new)
    return found
