"""A backend's folder is collected on that backend only: the others need not even be imported."""

from handloom._keras import BACKENDS
from handloom.backends import backend

collect_ignore = [name for name in BACKENDS if name != backend.name]
