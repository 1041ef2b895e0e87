"""JAX."""

from handloom.backends.jax.backend import backend as backend
