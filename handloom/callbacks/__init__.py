"""Callbacks. Those of Keras work unchanged; here are improved versions of some of them, and further ones."""

from handloom.callbacks._csv_logger import CSVLogger
from handloom.callbacks._display import EpochLines, ProgressBar
from handloom.callbacks._early_stopping import EarlyStopping
from handloom.callbacks._event_reader import Event, EventReader
from handloom.callbacks._json_logger import JSONLogger
from handloom.callbacks._learning_rate_scheduler import LearningRateScheduler
from handloom.callbacks._reduce_lr_on_plateau import ReduceLROnPlateau
from handloom.callbacks._state import callback_state, restore_callback
from handloom.callbacks._tensorboard import TensorBoard
from handloom.callbacks._terminate_on_nan import TerminateOnNaN
from handloom.callbacks._throughput import Throughput

__all__ = [
    "CSVLogger",
    "EarlyStopping",
    "EpochLines",
    "Event",
    "EventReader",
    "JSONLogger",
    "LearningRateScheduler",
    "ProgressBar",
    "ReduceLROnPlateau",
    "TensorBoard",
    "TerminateOnNaN",
    "Throughput",
    "callback_state",
    "restore_callback",
]
