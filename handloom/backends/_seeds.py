"""Random states of frameworks that data may come from, whichever of them is the backend."""

from __future__ import annotations

import sys


def seed_sources_of_data(seed: int) -> None:
    """Seeds the generator that a `DataLoader` draws its order from; that of `tf.data` is seeded by Keras."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)
