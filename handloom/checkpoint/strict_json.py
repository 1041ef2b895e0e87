"""JSON that may come from an untrusted file."""

import json
from collections import Counter
from typing import Any

from handloom.errors import CheckpointError

_DEPTH = 100  # Levels of lists and objects. Handloom itself writes about ten.


def encode(value: Any, what: str) -> bytes:
    """Encodes JSON values.

    Raises:
        CheckpointError: They are nested more deeply than `decode` accepts.
    """
    _check_depth(value, what)
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


def decode(data: bytes, what: str) -> dict[str, Any]:
    """Decodes a JSON object from untrusted bytes.

    Raises:
        CheckpointError: They are not a JSON object, are nested too deeply, or give a name twice.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_object)
    except (RecursionError, ValueError) as error:
        raise CheckpointError(f"HL547: {what} cannot be decoded as JSON: {error}.") from error
    _check_depth(value, what)
    if not isinstance(value, dict):
        raise CheckpointError(f"HL549: {what} is not a JSON object.")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the name {twice!r} is given twice")
    return found


def _check_depth(value: Any, what: str) -> None:
    level = [value]
    for _ in range(_DEPTH):
        level = [inner for item in level for inner in _items(item)]
    if level:
        raise CheckpointError(f"HL548: {what} is nested in more than {_DEPTH} levels.")


def _items(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
