"""What depends on what in a traced graph, whatever its nodes are."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

Node = TypeVar("Node", bound=Hashable)


def leads_to_an_end(node: Node, following: Callable[[Node], Iterable[Node]], is_end: Callable[[Node], bool]) -> bool:
    """Whether a way leads from a node, along those that follow, to an end; the node itself may be one."""
    seen, waiting = {node}, [node]
    while waiting:
        reached = waiting.pop()
        if is_end(reached):
            return True
        new = set(following(reached)) - seen
        seen |= new
        waiting.extend(new)
    return False
