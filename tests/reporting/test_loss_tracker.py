"""The metric in which a compiled model keeps the loss of an epoch."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom._reporting.loss_tracker import LossTracker, holding
from handloom._trace.loss_weight import step_weight
from tests.models import compiled, fit, functional
from tests.numbers import close, normal


@pytest.mark.parametrize(
    ("updates", "expected"),
    [
        ([(4, [1.0]), (2, [4.0])], (4 * 1 + 2 * 4) / 6),
        ([(4, [1.0, 1]), (2, [4.0, 3])], (1 * 1 + 3 * 4) / 4),
        ([(1, [1.0]), (1, [4.0])], 2.5),
    ],
    ids=["by the weight of the step", "by a given weight first", "a mean otherwise"],
)
def test_loss_tracker_weights_a_loss(updates, expected):
    tracker = LossTracker(name="loss")
    for weight, update in updates:
        with step_weight(weight):
            tracker.update_state(*update)
    close(tracker.result(), expected)


def test_holding_makes_the_loss_tracker_return_a_loss_and_keeps_its_state():
    model = compiled(functional(), metrics=["mae"])
    [tracker] = [metric for metric in model.metrics if isinstance(metric, LossTracker)]
    tracker.update_state(3.0)
    loss = ops.ones(())
    with holding(model, loss):
        assert tracker.result() is loss
    close(tracker.result(), 3)
    with pytest.raises(KeyError), holding(model, loss):
        raise KeyError
    close(tracker.result(), 3)


class AsInTheGuides(hl.Model):
    """Its loss goes into the model's own tracker without a weight."""

    def train_step(self, data):
        x, y = data
        loss = self.minimize(lambda: self.compute_loss(y=y, y_pred=self(x, training=True)))
        self._loss_tracker.update_state(loss)
        return {"loss": self._loss_tracker.result()}


def test_loss_tracker_counts_a_smaller_last_batch_less_in_a_step_after_the_guides_of_keras(eagerly):
    x = np.arange(10, dtype="float32")[:, None]
    model = functional(layers.Dense(1, kernel_initializer="zeros"), inputs=1, cls=AsInTheGuides)
    compiled(model, keras.optimizers.SGD(0.0))
    close(fit(model, x, x, batch_size=4)["loss"], [np.mean(x**2)])


def test_get_metrics_result_after_fit_evaluate_or_a_batch_has_their_last_values_as_in_keras():
    x, y = normal(10, 3), normal(10, 1, seed=1)
    models = [compiled(functional(cls=cls), metrics=["mae"]) for cls in (keras.Model, hl.Model)]
    models[1].set_weights(models[0].get_weights())
    seen = [[], []]
    for model, results in zip(models, seen, strict=True):

        def note(*_, model=model, results=results):
            results.extend(float(value) for _, value in sorted(model.get_metrics_result().items()))

        fit(model, x, y, epochs=2, batch_size=4, callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=note)])
        note()
        fit(model, x, y, batch_size=4, validation_data=(x[:5], y[:5]))
        note()
        model.evaluate(x[:6], y[:6], verbose=0)
        note()
    close(seen[1], seen[0])
    loss = models[1].train_on_batch(x, y)[0]
    close(models[1].get_metrics_result()["loss"], loss)
