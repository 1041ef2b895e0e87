"""The position of a feed, by which a resumed run finds its next batch."""

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any

from handloom._util.short import short
from handloom.errors import DataError


@dataclasses.dataclass
class Position:
    """The position of a feed.

    Attributes:
        epoch: Epochs finished.
        batch: Batches yielded in the current epoch.
        restored: Whether the next iteration continues from there, instead of beginning the epoch again.
    """

    epoch: int = 0
    batch: int = 0
    restored: bool = False

    def restore(self, state: Mapping[str, Any]) -> None:
        """Moves to the position in the state of a feed."""
        self.epoch, self.batch, self.restored = state["epoch"], state["batch"], True


def check_state(state: Any, seed: int | None, length: int | None) -> None:
    """Checks that a feed can resume from a state.

    Args:
        state: The state of a feed.
        seed: The seed of this feed; `None` if it takes that of the state.
        length: The batches in an epoch of this feed; `None` if unknown.

    Raises:
        DataError: It cannot.
    """
    if not _is_state(state):
        raise DataError(f"HL404: The state of a feed has whole numbers epoch, batch and seed; received {short(state)}.")
    if seed not in (None, state["seed"]):
        raise DataError(
            f"HL405: The state is of a feed with seed={state['seed']}; this feed has seed={seed}.",
            "The order of the examples would differ.",
            f"Create the feed with seed={state['seed']}.",
        )
    if length is not None and state["batch"] > length:
        raise DataError(f"HL406: The state is at batch {state['batch']}; this feed has {length} batches an epoch.")


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences between two fingerprints of data in words, as far as both are known."""
    return [_difference(name, then[name], now[name]) for name in then if name in now and then[name] != now[name]]


def _is_state(state: Any) -> bool:
    counts = {"epoch", "batch", "seed"}
    if not isinstance(state, Mapping) or not counts <= set(state) <= counts | {"data", "source"}:
        return False
    whole = all(isinstance(state[name], numbers.Integral) for name in counts)
    return whole and min(state["epoch"], state["batch"]) >= 0 and isinstance(state.get("data", {}), Mapping)


def _difference(name: str, then: Any, now: Any) -> str:
    return f"the {name} have changed" if name.startswith("values of ") else f"{name} was {then} and is {now}"
