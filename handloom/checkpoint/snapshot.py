"""What is saved: the values of variables, and what else has a state, as arrays and JSON."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from types import MappingProxyType
from typing import Any

import numpy as np

from handloom._keras import Variable, keras
from handloom._util.shard import Shard
from handloom.checkpoint.encoding import decode, encode
from handloom.checkpoint.names import named
from handloom.checkpoint.random_state import random_state, set_random_state
from handloom.distribute._strategy import current
from handloom.errors import CheckpointError

Shapes = Mapping[str, tuple[tuple[int, ...], str]]

# Arrays in the states of feeds and callbacks. No variable's name begins so.
OF_STATE = "@"
_RANDOM = "@random"
_SHOWN = 5


def take(
    state: Mapping[str, Any], into: Mapping[str, Sequence[Shard]] = MappingProxyType({})
) -> tuple[dict[str, list[Shard]], dict[str, Any]]:
    """Copies a state off the device.

    Args:
        state: Models, layers, optimizers, metrics, variables, and objects with `state()` and `restore(state)`, in dicts
            and lists.
        into: The shards of an earlier copy, whose memory may be written over: fresh memory costs more than the copying.

    Returns:
        The shards of arrays that this process holds, by name, and what is JSON. Where random numbers stand is among
        both.
    """
    variables, stateful = named(state)
    shards = {name: _copied(_shards_of(variable), into.get(name, ())) for name, variable in variables.items()}
    arrays: dict[str, np.ndarray] = {}
    contents = {name: encode(thing.state(), f"{OF_STATE}{name}", arrays) for name, thing in stateful.items()}
    contents[_RANDOM] = encode(random_state(), _RANDOM, arrays)
    return shards | {name: [Shard.whole(array)] for name, array in arrays.items()}, contents


@dataclasses.dataclass(frozen=True)
class Restored:
    """What was put back.

    Attributes:
        variables: The names of variables and arrays that have the values of the checkpoint now.
        things: The names of what else has its state back.
        missing: What the checkpoint has not, or in another shape, and which stays as it was, as it may.
        unused: What is in the checkpoint alone, as it may be.
    """

    variables: tuple[str, ...] = ()
    things: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


def check(state: Mapping[str, Any], shapes: Shapes, allow: Sequence[str] = ()) -> None:
    """Checks that the arrays of a checkpoint fit a state, before anything is read.

    Args:
        state: As for `take`.
        shapes: Shape and dtype of each array in the checkpoint.
        allow: Patterns of names that may be missing, left over or of another shape, such as `"model.head.*"`.

    Raises:
        CheckpointError: If they do not.
    """
    variables, _ = named(state)
    saved = {name for name in shapes if not name.startswith(OF_STATE)}
    wrong = {
        name: f"{name} is {shapes[name][0]} in the checkpoint and {tuple(variables[name].shape)} here"
        for name in sorted(saved & variables.keys())
        if tuple(shapes[name][0]) != tuple(variables[name].shape)
    }
    _refuse(variables.keys() - saved, saved - variables.keys(), wrong, allow)


def put(
    state: Mapping[str, Any], arrays: Mapping[str, np.ndarray], contents: Mapping[str, Any], allow: Sequence[str] = ()
) -> Restored:
    """Puts a saved state back; see `check`, which comes before.

    First what is no variable, in the order of the state, then random numbers: whatever the first does to these and to
    variables does not stay.

    Raises:
        CheckpointError: If what else has a state is not what is in the checkpoint. Nothing has been put back then.
    """
    variables, stateful = named(state)
    kept = contents.keys() - {_RANDOM}
    _refuse(stateful.keys() - kept, kept - stateful.keys(), {}, allow)
    things = [name for name in stateful if name in contents]
    for name in things:
        stateful[name].restore(decode(contents[name], arrays))
    if _RANDOM in contents:
        set_random_state(decode(contents[_RANDOM], arrays))
    fitting = [name for name, variable in variables.items() if _fits(variable, arrays.get(name))]
    for name in fitting:
        _assign(variables[name], arrays[name])
    saved = {name for name in arrays if not name.startswith(OF_STATE)} | kept
    here = [*stateful, *variables]
    missing = [name for name in here if name not in {*things, *fitting}]
    return Restored(tuple(fitting), tuple(things), tuple(missing), tuple(sorted(saved - set(here))))


def _fits(variable: Variable | np.ndarray, array: np.ndarray | None) -> bool:
    return array is not None and tuple(array.shape) == tuple(variable.shape)


def _shards_of(variable: Variable | np.ndarray) -> list[Shard]:
    return [Shard.whole(variable)] if isinstance(variable, np.ndarray) else current().shards_of(variable)


def _copied(shards: list[Shard], into: Sequence[Shard]) -> list[Shard]:
    memory = {shard.offset: shard.value for shard in into}
    return [Shard(shard.offset, _copy(shard.value, memory.get(shard.offset))) for shard in shards]


def _copy(value: np.ndarray, into: np.ndarray | None) -> np.ndarray:
    if into is None or (into.dtype, into.shape) != (value.dtype, value.shape):
        return np.array(value)
    np.copyto(into, value)
    return into


def _assign(variable: Variable | np.ndarray, array: np.ndarray) -> None:
    """Sets a value, which may have been saved on another backend or in another precision."""
    if isinstance(variable, np.ndarray):
        variable[...] = array
        return
    dtype = keras.backend.standardize_dtype(variable.dtype)
    variable.assign(keras.ops.cast(array, dtype) if array.dtype.name != dtype else array)


def _is_allowed(name: str, allow: Iterable[str]) -> bool:
    # Not by `fnmatch`, to which the brackets in names mean something.
    return any(re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), name) for pattern in allow)


def _refuse(missing: Set[str], extra: Set[str], wrong: Mapping[str, str], allow: Sequence[str]) -> None:
    """An error of what is not in the checkpoint, only there, or otherwise there, unless it is allowed."""
    problems = [
        *_listed("not in the checkpoint: ", _not_allowed(missing, allow)),
        *_listed("only in the checkpoint: ", _not_allowed(extra, allow)),
        *_listed("", [wrong[name] for name in _not_allowed(wrong.keys(), allow)]),
    ]
    if problems:
        raise CheckpointError(
            f"HL536: The checkpoint is of another model or optimizer: {'; '.join(problems)}. Make them as they were when it "
            "was saved, or name what may differ: allow=['model.head.*'].",
        )


def _not_allowed(names: Set[str], allow: Sequence[str]) -> list[str]:
    return [name for name in sorted(names) if not _is_allowed(name, allow)]


def _listed(what: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [what + ", ".join(names[:_SHOWN]) + more]
