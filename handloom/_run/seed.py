"""One number for all that is random in a run."""

from __future__ import annotations

import numbers
from collections.abc import Iterator
from typing import Any

import numpy as np
import optree

from handloom._interop.torch_data import seed_sources_of_data
from handloom._keras import keep_global_seed_generator, keras, layers_of, seed_generators_of
from handloom.backends import backend
from handloom.errors import ArgumentError

_LARGEST = 2**31 - 1


def seed_run(seed: int | None, state: Any) -> None:
    """Seeds a run; does nothing for `None`.

    Set are the random states of Python, NumPy and the backends, from which Keras and sources of data draw, and the
    seeds of what the run trains: seed generators (of dropout, noise and the like) and initializers of layers that are
    not built yet. What was given a seed of its own keeps it.

    Args:
        seed: From 0 to 2147483647.
        state: A structure of layers, seed generators and anything else, in an order that is the same each time.

    Raises:
        ValueError: If it is no such number.
    """
    if seed is None:
        return
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or not 0 <= seed <= _LARGEST:
        raise ArgumentError(f"HL031: seed takes a whole number from 0 to {_LARGEST}; received {seed!r}.")
    with keep_global_seed_generator():
        keras.utils.set_random_seed(int(seed))
    backend.seed_random_state(int(seed))
    seed_sources_of_data(int(seed))
    layers = [leaf for leaf in optree.tree_leaves(state) if isinstance(leaf, keras.Layer)]
    numbered = np.random.default_rng(seed)
    for generator in _unseeded_generators(state, layers):
        generator.state.assign([int(numbered.integers(_LARGEST)), 0])
    for initializer in _unseeded_initializers(layers):
        initializer.seed = int(numbered.integers(_LARGEST))


def _unseeded_generators(state: Any, layers: list[keras.Layer]) -> Iterator[keras.random.SeedGenerator]:
    own = [leaf for leaf in optree.tree_leaves(state) if isinstance(leaf, keras.random.SeedGenerator)]
    inside = [generator for layer in layers for inner in layers_of(layer) for generator in seed_generators_of(inner)]
    distinct = {id(generator): generator for generator in [*own, *inside]}
    yield from (generator for generator in distinct.values() if generator.get_config()["seed"] is None)


def _unseeded_initializers(layers: list[keras.Layer]) -> Iterator[keras.initializers.Initializer]:
    """The initializers that layers not yet built will draw from."""
    waiting = {id(inner): inner for layer in layers for inner in layers_of(layer) if not inner.built}
    for layer in waiting.values():
        for attribute in vars(layer).values():
            is_initializer = isinstance(attribute, keras.initializers.Initializer)
            if is_initializer and attribute.get_config().get("seed", 0) is None:
                yield attribute
