"""The code of functions, read for the names in it."""

import dis
import types
from collections import defaultdict
from collections.abc import Iterator
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
        local: The names of variables of the functions themselves.
        compares: Whether values are compared.
    """

    def __init__(self) -> None:
        self.read: dict[str, list[Place]] = defaultdict(list)
        self.stored: set[str] = set()
        self.local: set[str] = set()
        self.updated: dict[str, Place] = {}
        self.compares = False

    def add(self, function: Any) -> set[str]:
        """Adds the names in a function, and in the functions inside it; returns the names of globals that they read."""
        found: set[str] = set()
        for code in codes_of(function):
            found |= self._add(code)
        return found

    def _add(self, code: types.CodeType) -> set[str]:
        found, lines = set(), defaultdict[int, list[dis.Instruction]](list)
        for instruction in dis.get_instructions(code):
            lines[(instruction.positions and instruction.positions.lineno) or code.co_firstlineno].append(instruction)
        self.local.update(code.co_varnames, code.co_cellvars)
        for line, instructions in lines.items():
            read = {str(each.argval) for each in instructions if _is(each, "LOAD") and isinstance(each.argval, str)}
            stored = {str(each.argval) for each in instructions if _is(each, "STORE")}
            into_elements = any(each.opname == "STORE_SUBSCR" for each in instructions)
            texts = {each.argval for each in instructions if each.opname == "LOAD_CONST"} if into_elements else set()
            for name in read:
                self.read[name].append((code.co_filename, line))
            for name in read & (stored | texts):
                self.updated.setdefault(name, (code.co_filename, line))
            self.stored |= stored
            self.compares |= any(each.opname in ("COMPARE_OP", "CONTAINS_OP") for each in instructions)
            found |= {each.argval for each in instructions if each.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
        return found


def _is(instruction: dis.Instruction, kind: str) -> bool:
    return instruction.opname.startswith(kind) and "_FAST" not in instruction.opname
