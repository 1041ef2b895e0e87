"""A file named after a backend is collected on that backend only: the others need not even be imported."""

from handloom._keras import BACKENDS
from handloom.backends import backend

collect_ignore_glob = [f"test_{name}*.py" for name in BACKENDS if name != backend.name]
