"""Runs that stop in the midst of it all, within this process."""

import keras


class Stopped(Exception):
    """The end of a run, where nothing is done on the way out that a killed process would not do."""


class StopAt(keras.callbacks.Callback):
    """Stops a run after a step, or a batch of validation, counted from 1; never at 0."""

    takes_executions = True  # Steps may go together: it then counts dispatches.

    def __init__(self, step=0, validation=0):
        super().__init__()
        self.step, self.validation = step, validation  # As the constructor calls them: not a state to be given back.

    def on_train_batch_end(self, batch, logs=None):
        self.step -= 1
        if self.step == 0:
            raise Stopped

    def on_test_batch_end(self, batch, logs=None):
        self.validation -= 1
        if self.validation == 0:
            raise Stopped
