"""JSON that comes back as it was, or not at all."""

from __future__ import annotations

import json
from typing import Any

from handloom.errors import CheckpointError

_DEPTH = 100  # Levels of lists and dicts; what we write ourselves has about ten.


def encode(value: Any, what: str) -> bytes:
    """The value as bytes.

    Raises:
        CheckpointError: It holds something that would not come back: no JSON, or keys that are no strings.
    """
    try:
        _check(value, what)
        return json.dumps(value, separators=(",", ":")).encode("ascii")
    except RecursionError:
        raise CheckpointError("HL543", f"{what} is nested too deeply, or holds itself.") from None


def _check(value: Any, where: str, depth: int = 1) -> None:
    if depth > _DEPTH:
        raise CheckpointError("HL544", f"{where[:200]} is nested in more than {_DEPTH} levels.")
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise CheckpointError("HL545", f"{where} has the key {key!r}; JSON has strings only. Use {str(key)!r}.")
            _check(inner, f"{where}.{key}", depth + 1)
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            _check(inner, f"{where}[{index}]", depth + 1)
    elif type(value) not in (str, int, float, bool, type(None)):
        raise CheckpointError(
            "HL546",
            f"{where} is {type(value).__name__}, which JSON does not know. "
            "Save it as a number, a string, or as one of the arrays.",
        )


def decode(data: bytes, what: str) -> dict[str, Any]:
    """The object in some bytes, of which nothing is believed.

    Raises:
        CheckpointError: No JSON object, nested too deeply, or with a name given twice.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_object)
        depth = _depth(value)
    except RecursionError:
        depth = _DEPTH + 1
    except ValueError as error:
        raise CheckpointError("HL547", f"{what} is no JSON that can be read: {error}.") from error
    if depth > _DEPTH:
        raise CheckpointError("HL548", f"{what} is nested in more than {_DEPTH} levels.")
    if not isinstance(value, dict):
        raise CheckpointError("HL549", f"{what} holds no JSON object.")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} is given twice")
    return found


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0)
