"""Runs that stop at any step, within this process."""

import keras


class Stopped(Exception):
    """Ends a run as if its process had been killed: nothing handles it."""


class StopAt(keras.callbacks.Callback):
    """Stops a run after a step, or a batch of validation, counted from 1; never at 0."""

    takes_executions = True  # If steps are dispatched together, it counts dispatches.

    def __init__(self, step=0, validation=0):
        super().__init__()
        self.step, self.validation = step, validation  # Named as the arguments: not a part of the saved state.

    def on_train_batch_end(self, batch, logs=None):
        self.step -= 1
        if self.step == 0:
            raise Stopped

    def on_test_batch_end(self, batch, logs=None):
        self.validation -= 1
        if self.validation == 0:
            raise Stopped
