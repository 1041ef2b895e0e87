"""What tests of callbacks share."""

import keras
import pytest

from handloom._reporting.logs import Sums


class Reads(keras.callbacks.Callback):
    """Notes before which steps of an epoch the logs had been read, which waits for the device."""

    def __init__(self):
        super().__init__()
        self.read, self.before_step = False, []

    def on_epoch_begin(self, epoch, logs=None):
        self.read = False

    def on_train_batch_begin(self, batch, logs=None):
        self.before_step.append(self.read)
        self.read = False


@pytest.fixture
def reads(monkeypatch):
    noting, original = Reads(), Sums.add

    def add(self, *steps):
        noting.read = True
        return original(self, *steps)

    monkeypatch.setattr(Sums, "add", add)
    return noting
