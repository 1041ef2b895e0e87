"""A complete loop by hand: progress bar, validation, best and last three checkpoints, early stopping, exact resume."""

from pathlib import Path

import keras
from keras import layers
from rich.progress import Progress
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import handloom as hl

PATIENCE = 3


def main(run_dir: Path, epochs: int = 30) -> str:
    """Trains until the loss stops improving, saves the best model, and returns the accuracy on held-out digits."""
    hl.set_random_seed(0)
    x, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(x / 16, y, test_size=1 / 3, random_state=0, stratify=y)
    feed = hl.Feed((x_train, y_train), batch_size=64, shuffle=True)

    model = keras.Sequential([keras.Input((64,)), layers.Dense(64, "relu"), layers.Dropout(0.3), layers.Dense(10)])
    optimizer = keras.optimizers.Adam(1e-2)
    optimizer.build(model.trainable_variables)
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    val_loss, val_accuracy = keras.metrics.Mean(), keras.metrics.SparseCategoricalAccuracy()

    @hl.function
    def train_step(x, y):
        return hl.minimize(lambda: loss_fn(y, model(x, training=True)), model, optimizer)

    @hl.function
    def test_step(x, y):
        logits = model(x, training=False)
        val_loss.update_state(loss_fn(y, logits), sample_weight=len(y))
        val_accuracy.update_state(y, logits)
        return {"val_loss": val_loss.result(), "val_accuracy": val_accuracy.result()}

    def validate():
        val_loss.reset_state()
        val_accuracy.reset_state()
        for batch in hl.Feed((x_test, y_test), batch_size=256):
            results = test_step(*batch)
        return {name: float(value) for name, value in results.items()}

    state = {"model": model, "optimizer": optimizer, "feed": feed}
    checkpointer = hl.Checkpointer(run_dir / "checkpoints", state, keep=3, best="min:val_loss")
    with checkpointer, Progress() as progress:
        step, end = checkpointer.restore() or 0, epochs * len(feed)
        bar = progress.add_task("Training", total=end, completed=step)
        while step < end and step - (checkpointer.best_step or step) < PATIENCE * len(feed):
            for batch in feed:
                loss = train_step(*batch)
                step += 1
                progress.update(bar, completed=step)
            results = validate()
            checkpointer.save(step, results)
            values = "  ".join(f"{name} {value:.4f}" for name, value in {"loss": float(loss), **results}.items())
            progress.print(f"Epoch {step // len(feed)}  {values}")
        best = checkpointer.restore(checkpointer.best_step) or 0
    model.save(run_dir / "model.keras")
    return f"Accuracy on held-out digits: {validate()['val_accuracy']:.3f}, after the best epoch, {best // len(feed)}."
