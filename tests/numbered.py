"""Data sets in a module that worker processes import quickly."""

import os
import signal

import keras
import numpy as np

X = np.arange(10, dtype="float32")
Y = np.arange(10, dtype="int32") ** 2


class Numbered(keras.utils.PyDataset):
    """Batches of four: `X` and `Y`, the last one smaller."""

    def __init__(self, **options):
        super().__init__(**options)
        self.epochs_begun = self.epochs_ended = 0

    def __len__(self):
        return 3

    def __getitem__(self, index):
        chosen = slice(4 * index, 4 * index + 4)
        return X[chosen], Y[chosen]

    def on_epoch_begin(self):
        self.epochs_begun += 1

    def on_epoch_end(self):
        self.epochs_ended += 1


class Killed(keras.utils.PyDataset):
    """Kills the process that reads it."""

    kills = True

    def __len__(self):
        return 2

    def __getitem__(self, index):
        if self.kills:
            os.kill(os.getpid(), signal.SIGKILL)
        return np.int32(index)


class Processes(keras.utils.PyDataset):
    """Gives the id of the process that read it, plus an offset."""

    offset = 0

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return np.int32(self.offset + os.getpid())
