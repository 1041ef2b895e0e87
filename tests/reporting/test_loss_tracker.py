"""Where a compiled model keeps the loss of an epoch."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom._reporting.loss_tracker import LossTracker, holding
from handloom._trace.loss_weight import step_weight


def number(tensor):
    return float(ops.convert_to_numpy(tensor))


def tracked(*updates):
    tracker = LossTracker(name="loss")
    for weight, update in updates:
        with step_weight(weight):
            tracker.update_state(*update)
    return number(tracker.result())


def test_a_loss_counts_by_the_weight_of_its_step():
    assert tracked((4, [1.0]), (2, [4.0])) == pytest.approx((4 * 1 + 2 * 4) / 6)


def test_a_weight_that_is_passed_goes_before_it():
    assert tracked((4, [1.0, 1]), (2, [4.0, 3])) == pytest.approx((1 * 1 + 3 * 4) / 4)


def test_by_itself_it_is_a_mean():
    assert tracked((1, [1.0]), (1, [4.0])) == 2.5


def model():
    made = hl.Model([keras.Input((1,)), layers.Dense(1)])
    made.compile("sgd", "mse", metrics=["mae"])
    return made


def test_while_it_holds_a_loss_it_gives_that_and_keeps_its_own():
    made = model()
    [tracker] = [metric for metric in made.metrics if isinstance(metric, LossTracker)]
    tracker.update_state(3.0)
    loss = ops.ones(())
    with holding(made, loss):
        assert tracker.result() is loss
    assert number(tracker.result()) == 3


def test_it_gives_its_own_again_after_an_error():
    made = model()
    with pytest.raises(KeyError), holding(made, ops.ones(())):
        raise KeyError
    assert number(made.metrics[0].result()) == 0


class AsTheGuidesSay(hl.Model):
    """Its loss goes into the model's own tracker without a weight."""

    def train_step(self, data):
        x, y = data
        loss = self.minimize(lambda: self.compute_loss(y=y, y_pred=self(x, training=True)))
        self._loss_tracker.update_state(loss)
        return {"loss": self._loss_tracker.result()}


def test_in_a_step_after_keras_s_guides_a_smaller_last_batch_counts_less(eagerly):
    x = np.arange(10, dtype="float32")[:, None]
    made = AsTheGuidesSay([keras.Input((1,)), layers.Dense(1, kernel_initializer="zeros")])
    made.compile(keras.optimizers.SGD(0.0), "mse")
    found = made.fit(x, x, batch_size=4, shuffle=False, verbose=0).history["loss"]
    np.testing.assert_allclose(found, [np.mean(x**2)], rtol=1e-6)
