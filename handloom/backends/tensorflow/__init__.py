"""TensorFlow."""

from handloom.backends.tensorflow.backend import backend as backend
