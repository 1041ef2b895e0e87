"""The logs of an epoch: the values that callbacks read, and the values that callbacks write."""

import keras
import numpy as np
import pytest
from keras import ops

import handloom as hl
from tests.numbers import close, normal

X = np.arange(10, dtype="float32")  # In batches of 4: 0-3, 4-7, 8-9.
hook = keras.callbacks.LambdaCallback


def means(x):
    return {"mean": ops.mean(x)}


def fit(*looks, step=means, data=X, batch_size=4, **options):
    """Trains, and calls each function with the logs after each step; returns the reported values."""
    callbacks = [hook(on_train_batch_end=lambda batch, logs, look=look: look(logs)) for look in looks]
    feed = hl.Feed(data, batch_size=batch_size)
    return hl.fit(step, feed, callbacks=callbacks, verbose=0, **options).history


def test_logs_hold_the_means_and_the_results_of_metrics_so_far(eagerly):
    total, seen = keras.metrics.Sum(), []

    def step(x):
        total.update_state(x)
        return {"mean": ops.mean(x), "total": total}

    fit(lambda logs: seen.append([logs["mean"], logs["total"]]), step=step, epochs=2)
    close(seen, [[1.5, 6], [3.5, 28], [4.5, 45]] * 2)


def test_logs_are_a_mapping():
    def look(logs):
        assert logs.get("mean") == logs["mean"] == 4.5
        assert type(logs["mean"]) is float
        assert logs.get("nothing") is None
        assert "mean" in logs
        assert "nothing" not in logs
        assert (len(logs), list(logs), dict(logs)) == (1, ["mean"], {"mean": 4.5})
        assert repr(logs) == "{'mean': 4.5}"
        with pytest.raises(KeyError):
            logs["nothing"]

    fit(look, batch_size=10)


def test_logs_are_reset_after_an_exception(eagerly):
    class Means(hl.Model):
        def train_step(self, data):
            return means(data)

    def fail(batch, logs):
        if batch == 1:
            raise RuntimeError("broken")

    model = Means()
    with pytest.raises(RuntimeError, match="broken"):
        model.fit(100 * X, batch_size=4, callbacks=[hook(on_train_batch_end=fail)], verbose=0)
    close(model.fit(X, batch_size=4, verbose=0).history["mean"], [4.5])


def test_logs_hold_the_exact_mean_of_thousands_of_steps(eagerly):
    """In single precision, a total of these odd numbers beyond 2^24 would lose 1 a step."""
    steps, value = 2500, 2.0**13 + 1
    assert fit(data=np.full(steps, value, "float32"), batch_size=1)["mean"] == [value]


def test_logs_do_not_change_in_the_last_digit_when_they_are_read(eagerly):
    values = normal(200) ** 3
    assert fit(dict, data=values, batch_size=3) == fit(data=values, batch_size=3)


def test_logs_show_what_a_callback_writes_to_those_after_it_until_the_next_step(eagerly):
    before, after = [], []

    def write(logs):
        before.append(dict(logs))
        logs["twice"] = 2 * logs["mean"]
        logs.update(mean=-1.0)

    history = fit(write, lambda logs: after.append(dict(logs)))
    assert before == [{"mean": 1.5}, {"mean": 3.5}, {"mean": 4.5}]
    assert after == [{"mean": -1.0, "twice": value} for value in (3.0, 7.0, 9.0)]
    assert history == {"mean": [4.5]}


def test_logs_of_the_next_batch_have_what_a_callback_took_out():
    seen = []

    def write(logs):
        logs["extra"] = 1.0
        seen.append((len(logs), logs.pop("extra"), logs.pop("mean"), dict(logs)))

    assert fit(write)["mean"] == [4.5]
    assert seen == [(2, 1.0, mean, {}) for mean in (1.5, 3.5, 4.5)]


def test_logs_count_examples_without_reading_the_device(eagerly):
    counts = []
    fit(lambda logs: counts.append((logs.epoch.examples, len(logs.epoch.steps))), epochs=2)
    assert counts == [(4, 1), (8, 2), (10, 3)] * 2


def test_logs_measure_the_time_of_compilation():
    seconds = []
    fit(lambda logs: seconds.append(logs.epoch.seconds_compiling), epochs=2)
    assert 0 < seconds[0] == seconds[1] < seconds[2]  # The last batch is smaller.
    assert seconds[3:] == [0, 0, 0]
