"""The one place that looks at which backend Keras runs on."""

import importlib

from handloom._keras import keras
from handloom.backends.base import Backend

backend: Backend = importlib.import_module(f"handloom.backends.{keras.backend.backend()}.backend").backend

__all__ = ["Backend", "backend"]
