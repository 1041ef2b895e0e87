"""Callbacks. Those of Keras work unchanged; here are improved versions of some of them, and further ones."""

from handloom.callbacks._csv_logger import CSVLogger as CSVLogger
from handloom.callbacks._early_stopping import EarlyStopping as EarlyStopping
from handloom.callbacks._event_reader import Event as Event
from handloom.callbacks._event_reader import EventReader as EventReader
from handloom.callbacks._json_logger import JSONLogger as JSONLogger
from handloom.callbacks._learning_rate_scheduler import LearningRateScheduler as LearningRateScheduler
from handloom.callbacks._progress_bar import EpochLines as EpochLines
from handloom.callbacks._progress_bar import ProgressBar as ProgressBar
from handloom.callbacks._reduce_lr_on_plateau import ReduceLROnPlateau as ReduceLROnPlateau
from handloom.callbacks._state import callback_state as callback_state
from handloom.callbacks._state import restore_callback as restore_callback
from handloom.callbacks._tensorboard import TensorBoard as TensorBoard
from handloom.callbacks._terminate_on_nan import TerminateOnNaN as TerminateOnNaN
from handloom.callbacks._throughput import Throughput as Throughput

__all__ = [name for name in dir() if not name.startswith("_")]
