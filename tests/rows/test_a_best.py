"""Row A11: validated each epoch, the best kept besides the last three, stopped after three bad epochs."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.checkpoint.retention import Slot
from tests.rows.real_data import diabetes

HELD_IN, BATCH, RATE, MOMENTUM, PATIENCE, EPOCHS = 64, 32, 0.01, 0.95, 3, 20


def data():
    """Few patients to train on, so that it soon gets worse for the others."""
    x, y = diabetes()
    return (x[:HELD_IN], y[:HELD_IN]), (x[HELD_IN:], y[HELD_IN:])


def by_numpy():
    """Linear regression by momentum: after each epoch the loss of those held out, the kernel, and the bias."""
    (x, y), (x_out, y_out) = (tuple(array.astype("float64") for array in part) for part in data())
    x, x_out = (np.append(array, np.ones((len(array), 1)), axis=1) for array in (x, x_out))
    weights, velocity, losses, kept = np.zeros((11, 1)), np.zeros((11, 1)), [], []
    for _ in range(EPOCHS):
        for first in range(0, HELD_IN, BATCH):
            batch = slice(first, first + BATCH)
            velocity = MOMENTUM * velocity - RATE * 2 * x[batch].T @ (x[batch] @ weights - y[batch]) / BATCH
            weights = weights + velocity
        losses.append(np.mean((x_out @ weights - y_out) ** 2))
        kept.append([weights[:-1], weights[-1]])
    return np.array(losses), kept


def stops_after(losses):
    """The last epoch, and the best of those up to it: the first three in a row that are no better end it."""
    for last in range(PATIENCE, len(losses)):
        best = int(np.argmin(losses[: last + 1]))
        if last - best == PATIENCE:
            return last, best
    raise AssertionError("it never gets worse")


def linear():
    return hl.Sequential([keras.Input((10,)), layers.Dense(1, kernel_initializer="zeros")])


def momentum():
    return keras.optimizers.SGD(RATE, momentum=MOMENTUM)


def by_model(run_dir):
    (x, y), held_out = data()
    model = linear()
    model.compile(momentum(), loss="mse")
    stopping = hl.callbacks.EarlyStopping("val_loss", patience=PATIENCE, restore_best_weights=True)
    options = {"shuffle": False, "verbose": 0, "validation_data": held_out, "callbacks": [stopping]}
    saves = {"run_dir": run_dir, "keep": 3, "best": "min:val_loss"}
    history = model.fit(x, y, batch_size=BATCH, epochs=EPOCHS, **options, **saves)
    return history.history["val_loss"], model


def by_step(run_dir):
    held_in, held_out = data()
    model, optimizer = linear(), momentum()

    def train_step(x, y):
        return {"loss": hl.minimize(lambda: ops.mean((model(x) - y) ** 2), model, optimizer)}

    def test_step(x, y):
        return {"loss": ops.mean((model(x) - y) ** 2)}

    history = hl.fit(
        train_step,
        hl.Feed(held_in, batch_size=BATCH),
        epochs=EPOCHS,
        state={"model": model, "optimizer": optimizer},
        validate=(test_step, held_out),
        callbacks=[hl.callbacks.EarlyStopping("val_loss", patience=PATIENCE, restore_best_weights=True)],
        run_dir=run_dir,
        keep=3,
        best="min:val_loss",
        verbose=0,
    )
    return history.history["val_loss"], model


def by_hand(run_dir):
    held_in, held_out = data()
    model, optimizer = linear(), momentum()
    feed, mean = hl.Feed(held_in, batch_size=BATCH), keras.metrics.Mean()

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
            for batch in hl.Feed(held_out):
                loss = test_step(*batch)
            losses.append(float(loss))
            checkpointer.save(step, {"val_loss": losses[-1]})
            if len(losses) - int(np.argmin(losses)) > PATIENCE:
                break
        checkpointer.restore(checkpointer.best_step)
    return losses, model


@pytest.mark.parametrize("loop", [by_model, by_step, by_hand])
def test_a11_it_stops_after_three_bad_epochs_with_the_best_and_the_last_three_kept(loop, tmp_path, shown):
    expected, weights = by_numpy()
    last, best = stops_after(expected)
    losses, model = loop(tmp_path)
    # The right epoch, though there was a bad one before the best; and not by a hair.
    assert (np.diff(expected[: best + 1]) > 0).any()
    assert np.partition(np.abs(expected[: last + 1] - expected[best]), 1)[1] > 1e-3
    assert len(losses) == last + 1
    np.testing.assert_allclose(losses, expected[: last + 1], rtol=1e-4)
    # The best weights: those of NumPy, and to the bit those of the checkpoint that was kept besides the last three.
    for found, right in zip(model.get_weights(), weights[best], strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-3, atol=1e-5)
    steps = [(epoch + 1) * HELD_IN // BATCH for epoch in (best, *range(last - 2, last + 1))]
    assert hl.Checkpointer(tmp_path / "checkpoints", {}).steps == steps
    arrays = hl.load_checkpoint(tmp_path / "checkpoints" / Slot(steps[0]).name).arrays
    saved = [array for name in ("kernel", "bias") for key, array in arrays.items() if key.endswith(f".{name}")]
    for found, right in zip(model.get_weights(), saved, strict=True):
        np.testing.assert_array_equal(found, right)
    shown(f"stopped after epoch {last + 1}, epoch {best + 1} restored: val_loss {losses[best]:.3f}, as in NumPy")
