"""JSON that is read as it was written, or not at all."""

from __future__ import annotations

import json
from typing import Any

from handloom.errors import CheckpointError

_DEPTH = 100  # Levels of lists and dicts; what we write ourselves has about ten.


def encode(value: Any, what: str) -> bytes:
    """JSON values as bytes.

    Raises:
        CheckpointError: If they are nested more deeply than `decode` reads.
    """
    if _depth(value) > _DEPTH:
        raise CheckpointError(f"HL544: {what} is nested in more than {_DEPTH} levels.")
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


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
        raise CheckpointError(f"HL547: {what} is not JSON that can be read: {error}.") from error
    if depth > _DEPTH:
        raise CheckpointError(f"HL548: {what} is nested in more than {_DEPTH} levels.")
    if not isinstance(value, dict):
        raise CheckpointError(f"HL549: {what} does not contain a JSON object.")
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
