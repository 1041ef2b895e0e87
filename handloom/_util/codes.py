"""The code of functions, read for the names in it."""

import dis
import types
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any, TypeAlias

Place: TypeAlias = tuple[str, int]
"""A file and a line."""


def codes_of(function: Any) -> Iterator[types.CodeType]:
    """The code of a function, and that of the functions inside it; nothing for what is not written in Python."""
    codes = [getattr(function, "__code__", None)]
    for code in codes:
        if isinstance(code, types.CodeType):
            yield code
            codes.extend(code.co_consts)


class Names:
    """The names in the code of functions: of attributes, globals and variables of enclosing functions; and texts.

    Attributes:
        read: The places at which each name is read. Texts, such as keys of dicts, are among them.
        stored: The names that are assigned.
        updated: The places at which a name is assigned and read in one line, as by `self.count += 1`.
        used: The names that are read apart from that, be it in the same line.
        local: The names of variables of the functions themselves.
        compares: Whether values are compared.
    """

    def __init__(self) -> None:
        self.read: dict[str, list[Place]] = defaultdict(list)
        self.stored: set[str] = set()
        self.local: set[str] = set()
        self.updated: dict[str, Place] = {}
        self.used: set[str] = set()
        self.compares = False

    def add(self, function: Any) -> set[str]:
        """Adds the names in a function, and in the functions inside it; returns the names of globals that they read."""
        found: set[str] = set()
        for code in codes_of(function):
            found |= self._add(code)
        return found

    def _add(self, code: types.CodeType) -> set[str]:
        found, lines = set(), defaultdict[int, list[tuple[dis.Instruction, str]]](list)
        instructions = list(dis.get_instructions(code))
        for instruction, following in zip_longest(instructions, instructions[1:]):
            line = (instruction.positions and instruction.positions.lineno) or code.co_firstlineno
            lines[line].append((instruction, following.opname if following else ""))
        self.local.update(code.co_varnames, code.co_cellvars)
        for line, pairs in lines.items():
            names = [
                (each.argval, after) for each, after in pairs if _is(each, "LOAD") and isinstance(each.argval, str)
            ]
            stored = [str(each.argval) for each, _ in pairs if _is(each, "STORE")]
            # The key of `d["key"] = ...` comes right before the assignment, that of `d["key"] += ...` is copied.
            keys = [name for name, after in names if after in ("STORE_SUBSCR", "COPY")]
            reads = Counter(name for name, after in names if after != "STORE_SUBSCR")
            stores = Counter(stored + keys)
            for name in {name for name, _ in names}:
                self.read[name].append((code.co_filename, line))
            for name in reads.keys() & stores.keys():
                self.updated.setdefault(name, (code.co_filename, line))
            self.used |= (reads - stores).keys()
            self.stored.update(stored)
            self.compares |= any(each.opname in ("COMPARE_OP", "CONTAINS_OP") for each, _ in pairs)
            found |= {each.argval for each, _ in pairs if each.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
        return found


def _is(instruction: dis.Instruction, kind: str) -> bool:
    """Whether it loads or stores a name other than that of a local variable."""
    name = instruction.opname
    return name.startswith(kind) and "_FAST" not in name and name != "LOAD_CLOSURE"
