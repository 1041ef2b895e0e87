"""The one place that looks at which backend Keras runs on."""

import importlib

from handloom._keras import keras
from handloom.backends import _foreign as foreign
from handloom.backends._hugging_face import forgets_a_buffer
from handloom.backends._seeds import seed_sources_of_data
from handloom.backends._tensorflow_data import tensorflow_data
from handloom.backends._torch_data import torch_data
from handloom.backends.base import Backend

backend: Backend = importlib.import_module(f"handloom.backends.{keras.backend.backend()}").backend

__all__ = [
    "Backend",
    "backend",
    "foreign",
    "forgets_a_buffer",
    "seed_sources_of_data",
    "tensorflow_data",
    "torch_data",
]
