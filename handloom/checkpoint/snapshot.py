"""The state that a checkpoint holds: the values of variables, and the states of other objects, as arrays and JSON."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from handloom._keras import Variable, keras
from handloom._util.first_few import first_few
from handloom._util.shard import Shard, Shards
from handloom.checkpoint.encoding import Arrays, decode, encode
from handloom.checkpoint.names import keras_objects, named
from handloom.checkpoint.random_state import random_state, set_random_state
from handloom.distribute._strategy import current
from handloom.errors import CheckpointError

OF_STATE = "@"
"""Begins the names of arrays in the states of feeds and callbacks, but never the name of a variable."""
_RANDOM = "@random"


def take(state: Mapping[str, Any], into: Shards) -> tuple[dict[str, list[Shard]], dict[str, Any]]:
    """Copies a state to host memory.

    Args:
        state: Models, layers, optimizers, metrics, variables, and objects with `state()` and `restore(state)`, in dicts
            and lists.
        into: The shards of an earlier copy, which may be overwritten: fresh memory costs more than the copying.

    Returns:
        The shards of arrays that this process holds, by name, and the JSON values. Both include the states of random
        number generators.
    """
    variables, stateful = named(state)
    shards = {name: _copied(_shards_of(variable), into.get(name, ())) for name, variable in variables.items()}
    arrays: dict[str, np.ndarray] = {}
    contents = {name: encode(thing.state(), f"{OF_STATE}{name}", arrays) for name, thing in stateful.items()}
    contents[_RANDOM] = encode(random_state(), _RANDOM, arrays)
    return shards | {name: [Shard.whole(array)] for name, array in arrays.items()}, contents


@dataclasses.dataclass(frozen=True)
class Restored:
    """The result of a restore.

    Attributes:
        variables: The names of variables and arrays that now have the values of the checkpoint.
        things: The names of other objects that now have their saved state.
        missing: The names that the checkpoint lacks, or has in another shape; these stay unchanged.
        unused: The names that only the checkpoint has.
    """

    variables: tuple[str, ...] = ()
    things: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


def check(state: Mapping[str, Any], arrays: Mapping[str, Any], allow: Sequence[str] = ()) -> None:
    """Checks that the arrays of a checkpoint fit a state, before they are read.

    Args:
        state: As for `take`.
        arrays: The name of each array in the checkpoint to an object with its `shape`.
        allow: Patterns of names that may be missing, left over or of another shape, such as `"model.head.*"`.

    Raises:
        CheckpointError: They do not fit.
    """
    variables, _ = named(state)
    saved = {name for name in arrays if not name.startswith(OF_STATE)}
    wrong = {
        name: f"{name} is {tuple(arrays[name].shape)} in the checkpoint and {tuple(variables[name].shape)} here"
        for name in saved & variables.keys()
        if not _fits(variables[name], arrays[name])
    }
    _check_names(state, variables.keys() - saved, saved - variables.keys(), allow, wrong)


def put(state: Mapping[str, Any], arrays: Arrays, contents: Mapping[str, Any], allow: Sequence[str] = ()) -> Restored:
    """Restores a state that `check` has accepted.

    Other objects come first, in the order of the state, then random number generators, then variables: restoring an
    object may draw random numbers and change variables.

    Raises:
        CheckpointError: The other objects are not those in the checkpoint. Nothing has been restored then.
    """
    variables, stateful = named(state)
    saved = contents.keys() - {_RANDOM}
    _check_names(state, stateful.keys() - saved, saved - stateful.keys(), allow, {})
    things = [name for name in stateful if name in saved]
    for name in things:
        stateful[name].restore(decode(contents[name], arrays))
    if _RANDOM in contents:
        set_random_state(decode(contents[_RANDOM], arrays))
    fitting = [name for name, variable in variables.items() if _fits(variable, arrays.get(name))]
    for name in fitting:
        _assign(variables[name], arrays[name])
    here = [*stateful, *variables]
    missing = [name for name in here if name not in {*things, *fitting}]
    unused = saved.union(name for name in arrays if not name.startswith(OF_STATE)).difference(here)
    return Restored(tuple(fitting), tuple(things), tuple(missing), tuple(sorted(unused)))


def _fits(variable: Variable | np.ndarray, array: Any) -> bool:
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
    """Sets a value that may have been saved on another backend or in another precision."""
    if isinstance(variable, np.ndarray):
        variable[...] = array
        return
    dtype = keras.backend.standardize_dtype(variable.dtype)
    variable.assign(keras.ops.cast(array, dtype) if array.dtype.name != dtype else array)


def _check_names(
    state: Any, missing: Iterable[str], extra: Iterable[str], allow: Sequence[str], wrong: Mapping[str, str]
) -> None:
    """Raises an error that lists names which only one side has, and others that are `wrong`, unless allowed."""
    patterns = [re.compile(".*".join(map(re.escape, pattern.split("*")))) for pattern in allow]  # `[` is literal.
    problems = []
    for intro, names in (("not in the checkpoint: ", missing), ("only in the checkpoint: ", extra), ("", wrong)):
        refused = [name for name in sorted(names) if not any(pattern.fullmatch(name) for pattern in patterns)]
        if refused:
            problems.append(intro + first_few([wrong.get(name, name) for name in refused], 5))
    if problems:
        raise CheckpointError(
            f"HL536: The checkpoint does not fit the state: {'; '.join(problems)}.",
            fix=_builds(state, extra)
            or "Make the state as it was when it was saved, or name what may differ: allow=['model.head.*'].",
        )


def _builds(state: Any, extra: Iterable[str]) -> str:
    """The calls that build what a checkpoint has variables of, and is not built here."""
    calls: dict[str, str] = {}
    for name, thing in keras_objects(state).items():
        unbuilt = not getattr(thing, "built", True) and any(other.startswith(f"{name}.") for other in extra)
        if unbuilt and not name.startswith(tuple(f"{outer}." for outer in calls)):
            variables = "model.trainable_variables" if isinstance(thing, keras.optimizers.Optimizer) else "input_shape"
            calls[name] = f"{name}.build({variables})"
    return f"Not everything is built yet; before restore(), call {' and '.join(calls.values())}." if calls else ""
