"""Callbacks that Handloom adds to Keras's own, all of which work unchanged."""

from handloom.callbacks._display import EpochLines as EpochLines
from handloom.callbacks._display import ProgressBar as ProgressBar
from handloom.callbacks._json_logger import JSONLogger as JSONLogger

__all__ = ["EpochLines", "JSONLogger", "ProgressBar"]
