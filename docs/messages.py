"""Writes the page of all messages, `docs/messages.md`, and their codes for `hl.checks`, from the source of Handloom.

python docs/messages.py
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE, CODES = ROOT / "docs" / "messages.md", ROOT / "handloom" / "_util" / "messages.json"
SECTIONS = {
    "0": "Arguments",
    "1": "Tracing and gradients",
    "2": "Steps",
    "3": "Optimizers",
    "4": "Data",
    "5": "Checkpoints",
    "6": "Models",
    "7": "Runs and callbacks",
    "9": "Installation, command line and recipes",
}
HEAD = """# Messages

Every error and warning of Handloom has a stable code, which ends its text. Errors are `HandloomError`s and warnings are
`HandloomWarning`s; both carry a `Finding` with the code, the line of your code, and the three parts of the text: the
observation, the reason, and the fix. Values are shown as {name} here.

`hl.checks.silence("HL204")` silences a warning, for a `with` block or for good; `hl.checks.strict()` makes warnings
errors; `hl.checks.collect()` gives the list of findings of a block.

This page is generated: `make messages`.
"""


@dataclasses.dataclass(frozen=True)
class Message:
    """A message at the place in the source where it is given."""

    code: str
    kind: str
    saw: str
    why: str
    fix: str
    place: str

    @property
    def is_warning(self) -> bool:
        """Whether it is a warning."""
        return self.kind.endswith("Warning")

    @property
    def text(self) -> str:
        """The whole text."""
        return " ".join(filter(None, (self.saw, self.why, self.fix)))


def messages() -> list[Message]:
    """All messages in the package, by code."""
    found = [message for path in sorted((ROOT / "handloom").rglob("*.py")) for message in _messages_in(path)]
    return sorted(found, key=lambda message: message.code)


def _messages_in(path: Path) -> Iterator[Message]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and node.args and (head := re.match(r"(HL\d{3}): ", _text(node.args[0]))):
            parts = dict(zip(("saw", "why", "fix"), map(_text, node.args), strict=False))
            named = {keyword.arg: keyword.value for keyword in node.keywords}
            parts |= {name: _text(named[name]) for name in ("why", "fix") if name in named}
            saw = parts["saw"].removeprefix(head[0])
            name = _name(node.func)
            kind = (_name(named["category"]) if "category" in named else "HandloomWarning") if name == "warn" else name
            place = str(path.relative_to(ROOT))
            yield Message(head[1], kind, saw, parts.get("why", ""), parts.get("fix", ""), place)


def _text(node: ast.expr) -> str:
    """A string in the source, with `{name}` for values."""
    match node:
        case ast.Constant(value=str(value)):
            return value
        case ast.JoinedStr(values=parts):
            return "".join(map(_text, parts))
        case ast.FormattedValue(value=ast.IfExp() as choice):
            return _text(choice)
        case ast.FormattedValue(value=value):
            return f"{{{_name(value)}}}"
        case ast.IfExp(body=body, orelse=orelse):
            return " / ".join(filter(None, (_text(body), _text(orelse))))
    return ""


def _name(node: ast.AST) -> str:
    """A short name for an expression."""
    if isinstance(node, ast.Name | ast.Attribute):
        return (node.id if isinstance(node, ast.Name) else node.attr).strip("_")
    if isinstance(node, ast.Call) and node.args and (isinstance(node.func, ast.Name) or _name(node.func) == "join"):
        return _name(node.args[0])
    inner = [getattr(node, field) for field in ("func", "value", "left", "body", "elt") if hasattr(node, field)]
    return _name(inner[0]) if inner else "value"


def page(found: list[Message]) -> str:
    """The page as Markdown."""
    lines = [HEAD]
    for digit, title in SECTIONS.items():
        lines += [f"## {title}", ""]
        for message in found:
            if message.code[2] == digit:
                lines += [f"**{message.code}** `{message.kind}`", "", re.sub(r"\s*\n\s*", " ", message.text), ""]
    return "\n".join(lines)


def codes(found: list[Message]) -> str:
    """The codes of warnings and errors as JSON."""
    kinds = {
        "warnings": [message.code for message in found if message.is_warning],
        "errors": [message.code for message in found if not message.is_warning],
    }
    return json.dumps(kinds, indent=1) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(messages()), encoding="utf-8")
    CODES.write_text(codes(messages()), encoding="utf-8")
