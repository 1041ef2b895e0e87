"""The backend that Keras runs on; no other module looks it up."""

import importlib

from handloom._keras import TESTED_KERAS, keras
from handloom._util.versions import warn_if_untested
from handloom.backends.base import Backend

backend: Backend = importlib.import_module(f"handloom.backends.{keras.backend.backend()}.backend").backend

warn_if_untested("Keras", keras.__version__, *TESTED_KERAS)
warn_if_untested(backend.title, backend.versions()[backend.name], *backend.tested)

__all__ = ["Backend", "backend"]
