"""The states of all random number generators, which every checkpoint holds."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np

from handloom._keras import global_seed_generator
from handloom.backends import backend


def random_state() -> dict[str, Any]:
    """The states of Python, NumPy, the backend, and Keras's global seed generator, as JSON values and arrays."""
    version, internal, gauss = random.getstate()
    kind, key, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, np.array(internal, np.uint32), gauss],
        "numpy": [kind, np.asarray(key), position, has_gauss, cached],
        "backend": backend.random_state(),
        "keras": np.array(backend.to_numpy(global_seed_generator().state.value)),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restores these states. The state of another backend is ignored."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    np.random.set_state(tuple(state["numpy"]))
    backend.set_random_state(state["backend"])
    global_seed_generator().state.assign(state["keras"])
