"""The seed of everything random in a run."""

import random
from typing import Any

import numpy as np
import optree

from handloom._interop.tensors import seed_libraries
from handloom._keras import global_seed_generator, keras, layers_of, seed_generators_of, seed_keras
from handloom._util.arguments import whole_number
from handloom.backends import backend
from handloom.errors import ArgumentError

_LARGEST = 2**31 - 1


def set_random_seed(seed: int) -> None:
    """Sets the random states of Python, NumPy, Keras and the backend, as `keras.utils.set_random_seed` does.

    TensorFlow is seeded, but not imported. Compiled steps take the new seed too.

    Args:
        seed: From 0 to 2147483647.

    Raises:
        ArgumentError: It is not such a number.
    """
    _seed_everywhere("hl.set_random_seed", seed)


def seed_run(seed: int | None, state: Any) -> None:
    """Seeds a run; does nothing for `None`.

    Sets the random states of Python, NumPy and the backends, from which Keras and sources of data draw, and the seeds
    of what the run trains: seed generators (of dropout, noise and the like) and initializers of layers that are not
    built yet. Objects with a seed of their own keep it.

    Args:
        seed: From 0 to 2147483647.
        state: A structure of layers, seed generators and anything else, in an order that is the same each time.

    Raises:
        ArgumentError: It is not such a number.
    """
    if seed is None:
        return
    global_seed_generator()  # Must exist, so that each run with the seed draws the same numbers.
    _seed_everywhere("fit", seed)
    numbers = np.random.default_rng(seed)
    leaves = optree.tree_leaves(state)
    layers = {id(inner): inner for leaf in leaves if isinstance(leaf, keras.Layer) for inner in layers_of(leaf)}
    generators = [leaf for leaf in leaves if isinstance(leaf, keras.random.SeedGenerator)]
    generators += [generator for layer in layers.values() for generator in seed_generators_of(layer)]
    for generator in {id(generator): generator for generator in generators}.values():
        if generator.get_config()["seed"] is None:
            generator.state.assign([int(numbers.integers(_LARGEST)), 0])
    for initializer in [inner for layer in layers.values() if not layer.built for inner in vars(layer).values()]:
        if isinstance(initializer, keras.initializers.Initializer) and initializer.get_config().get("seed", 0) is None:
            initializer.seed = int(numbers.integers(_LARGEST))


def _seed_everywhere(function: str, seed: int) -> None:
    seed = whole_number(function, seed=seed, least=0)
    if seed > _LARGEST:
        raise ArgumentError(f"HL031: {function}(seed=...) takes a number up to {_LARGEST}; received {seed}.")
    random.seed(seed)
    np.random.seed(seed)
    seed_keras(seed)
    backend.seed_random_state(seed)
    seed_libraries(seed)
