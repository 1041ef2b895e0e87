"""The backend that Keras runs on; no other module looks it up."""

import importlib

from handloom._keras import keras
from handloom.backends.base import Backend

backend: Backend = importlib.import_module(f"handloom.backends.{keras.backend.backend()}.backend").backend

__all__ = ["Backend", "backend"]
