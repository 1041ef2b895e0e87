"""Row A11: validation each epoch, the best checkpoint kept beside the last three, a stop after three bad epochs."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.checkpoint.retention import Slot
from tests.models import sequential
from tests.numbers import close, each_same
from tests.rows.real_data import diabetes

HELD_IN, BATCH, RATE, MOMENTUM, PATIENCE, EPOCHS = 64, 32, 0.01, 0.95, 3, 20
(X, X_OUT), (Y, Y_OUT) = (np.split(array, [HELD_IN]) for array in diabetes())  # Few to train on: it soon overfits.


def stops_after(losses):
    """The last epoch and the best up to it: three epochs in a row without an improvement end training."""
    for last in range(PATIENCE, len(losses)):
        best = int(np.argmin(losses[: last + 1]))
        if last - best == PATIENCE:
            return last, best
    raise AssertionError("the loss never gets worse")


def linear():
    model = sequential(layers.Dense(1, kernel_initializer="zeros"), inputs=10)
    return model, keras.optimizers.SGD(RATE, momentum=MOMENTUM)


def run_options(run_dir):
    stopping = hl.callbacks.EarlyStopping("val_loss", patience=PATIENCE, restore_best_weights=True)
    saves = {"run_dir": run_dir, "keep": 3, "best": "min:val_loss"}
    return {"epochs": EPOCHS, "callbacks": [stopping], "verbose": 0, **saves}


def by_model(run_dir):
    model, optimizer = linear()
    model.compile(optimizer, loss="mse")
    options = {"batch_size": BATCH, "shuffle": False, "validation_data": (X_OUT, Y_OUT)} | run_options(run_dir)
    return model.fit(X, Y, **options).history["val_loss"], model


def by_step(run_dir):
    model, optimizer = linear()

    def train_step(x, y):
        return {"loss": hl.minimize(lambda: ops.mean((model(x) - y) ** 2), model, optimizer)}

    def test_step(x, y):
        return {"loss": ops.mean((model(x) - y) ** 2)}

    options = {"state": {"model": model, "optimizer": optimizer}, "validate": (test_step, (X_OUT, Y_OUT))}
    history = hl.fit(train_step, hl.Feed((X, Y), batch_size=BATCH), **options, **run_options(run_dir)).history
    return history["val_loss"], model


def by_hand(run_dir):
    (model, optimizer), feed, mean = linear(), hl.Feed((X, Y), batch_size=BATCH), keras.metrics.Mean()

    @hl.function
    def train_step(x, y):
        return hl.minimize(lambda: ops.mean((model(x) - y) ** 2), model, optimizer)

    @hl.function
    def test_step(x, y):
        mean.update_state(ops.mean((model(x) - y) ** 2), sample_weight=len(x))
        return mean.result()

    losses, step = [], 0
    state = {"model": model, "optimizer": optimizer, "feed": feed}
    with hl.Checkpointer(run_dir / "checkpoints", state, keep=3, best="min:val_loss") as checkpointer:
        while len(losses) < EPOCHS:
            for batch in feed:
                train_step(*batch)
                step += 1
            mean.reset_state()
            for batch in hl.Feed((X_OUT, Y_OUT)):
                loss = test_step(*batch)
            losses.append(float(loss))
            checkpointer.save(step, {"val_loss": losses[-1]})
            if len(losses) - int(np.argmin(losses)) > PATIENCE:
                break
        checkpointer.restore(checkpointer.best_step)
    return losses, model


@pytest.mark.parametrize("loop", [by_model, by_step, by_hand])
def test_a11_early_stopping_and_checkpointer_restore_the_best_epoch_and_keep_it_beside_the_last_three(
    loop, tmp_path, shown
):
    losses, model = loop(tmp_path)
    last, best = stops_after(losses)
    # The best epoch is not the first that is followed by a worse one, and no other epoch is nearly as good.
    assert (np.diff(losses[: best + 1]) > 0).any()
    assert np.partition(np.abs(np.subtract(losses, losses[best])), 1)[1] > 1e-3
    assert len(losses) == last + 1
    # The weights are those of the best epoch, and bitwise those of the checkpoint kept beside the last three.
    kernel, bias = model.get_weights()
    close(np.mean((X_OUT @ kernel + bias - Y_OUT) ** 2), losses[best], rtol=1e-4)
    steps = [(epoch + 1) * HELD_IN // BATCH for epoch in (best, *range(last - 2, last + 1))]
    assert hl.Checkpointer(tmp_path / "checkpoints", {}).steps == steps
    arrays = hl.load_checkpoint(tmp_path / "checkpoints" / Slot(steps[0]).name).arrays
    saved = [array for name in ("kernel", "bias") for key, array in arrays.items() if key.endswith(f".{name}")]
    each_same([kernel, bias], saved)
    shown(f"stopped after epoch {last + 1}, restored epoch {best + 1}: val_loss {losses[best]:.3f}, as in NumPy")
