"""Device totals turned into host numbers, late: what stands in the logs whenever somebody looks."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

import handloom as hl

X = np.arange(10, dtype="float32")  # In batches of 4: 0-3, 4-7, 8-9.


class Watcher(keras.callbacks.Callback):
    """Looks at the logs after chosen steps, and keeps what it saw."""

    def __init__(self, when=lambda batch: True):
        super().__init__()
        self.when, self.seen = when, []

    def on_train_batch_end(self, batch, logs=None):
        if self.when(batch):
            self.seen.append(dict(logs))


def means(x):
    return {"mean": ops.mean(x)}


def weighted_means(x, sample_weight):
    return {"mean": ops.sum(x * sample_weight) / ops.sum(sample_weight)}


@st.composite
def splits(draw):
    """Examples, with weights, and where to cut them into batches."""
    count = draw(st.integers(1, 12))
    numbers = st.floats(-100, 100, width=32)
    values = draw(st.lists(numbers, min_size=count, max_size=count))
    weights = draw(st.lists(st.floats(0.125, 8, width=32), min_size=count, max_size=count))
    cuts = draw(st.sets(st.integers(1, max(count - 1, 1)), max_size=4))
    parts = [np.array(part, "float32") for part in (values, weights)]
    return *parts, sorted(cut for cut in cuts if cut < count)


@settings(max_examples=15, deadline=None)
@given(splits())
def test_the_mean_does_not_depend_on_how_examples_are_split_into_batches(split):
    values, _, cuts = split
    with hl.run_eagerly(True):  # Each size of batch would be compiled.
        history = hl.fit(means, lambda: iter(np.split(values, cuts)), verbose=0).history
    np.testing.assert_allclose(history["mean"], [np.mean(values, dtype="float64")], rtol=1e-5, atol=1e-4)


@settings(max_examples=15, deadline=None)
@given(splits())
def test_the_weighted_mean_does_not_depend_on_how_examples_are_split_into_batches(split):
    values, weights, cuts = split
    batches = list(zip(np.split(values, cuts), np.split(weights, cuts), strict=True))
    with hl.run_eagerly(True):
        history = hl.fit(weighted_means, lambda: iter(batches), verbose=0).history
    expected = np.average(values.astype("float64"), weights=weights.astype("float64"))
    np.testing.assert_allclose(history["mean"], [expected], rtol=1e-5, atol=1e-4)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.sets(st.integers(0, 5)))
def test_looking_at_the_logs_changes_nothing(sizes, looks):
    batches = np.split(np.arange(sum(sizes), dtype="float32") ** 2, np.cumsum(sizes)[:-1])
    with hl.run_eagerly(True):
        unwatched = hl.fit(means, lambda: iter(batches), verbose=0).history
        watcher = Watcher(lambda batch: batch in looks)
        watched = hl.fit(means, lambda: iter(batches), callbacks=[watcher], verbose=0).history
    np.testing.assert_allclose(watched["mean"], unwatched["mean"], rtol=1e-6)


def test_a_callback_that_looks_after_every_step_sees_the_mean_so_far(eagerly):
    watcher = Watcher()
    hl.fit(means, hl.Feed(X, batch_size=4), callbacks=[watcher], epochs=2, verbose=0)
    so_far = [X[:4].mean(), X[:8].mean(), X.mean()]
    np.testing.assert_allclose([logs["mean"] for logs in watcher.seen], so_far * 2, rtol=1e-6)


def test_a_callback_that_looks_now_and_then_sees_the_mean_so_far():
    watcher = Watcher(lambda batch: batch in (1, 4))
    hl.fit(means, hl.Feed(X, batch_size=2), callbacks=[watcher], verbose=0)
    np.testing.assert_allclose([logs["mean"] for logs in watcher.seen], [X[:4].mean(), X.mean()], rtol=1e-6)


def test_a_callback_sees_what_a_metric_says_by_then(eagerly):
    total, watcher = keras.metrics.Sum(name="total"), Watcher()

    def step(x):
        total.update_state(x)
        return {"total": total}

    hl.fit(step, hl.Feed(X, batch_size=4), callbacks=[watcher], verbose=0)
    assert [logs["total"] for logs in watcher.seen] == [6.0, 28.0, 45.0]


def test_logs_are_read_as_any_mapping():
    class Reader(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            assert logs.get("mean") == logs["mean"] == 4.5
            assert logs.get("nothing") is None
            assert "mean" in logs
            assert "nothing" not in logs
            assert (len(logs), list(logs), dict(logs)) == (1, ["mean"], {"mean": 4.5})
            assert repr(logs) == "{'mean': 4.5}"
            with pytest.raises(KeyError):
                logs["nothing"]

    hl.fit(means, hl.Feed(X, batch_size=10), callbacks=[Reader()], verbose=0)


def test_values_are_plain_numbers_and_arrays():
    watcher = Watcher()
    history = hl.fit(means, X, callbacks=[watcher], verbose=0)
    assert type(history.history["mean"][0]) is float
    assert type(watcher.seen[0]["mean"]) is float


def test_each_epoch_begins_anew(eagerly):
    data = iter([X[:5], X[5:]])
    history = hl.fit(means, data, epochs=2, steps_per_epoch=1, verbose=0).history
    assert history["mean"] == [2.0, 7.0]


def test_steps_before_an_exception_do_not_count_in_the_next_run(eagerly):
    class Means(hl.Model):
        def train_step(self, data):
            return means(data)

    def fail(batch, logs):
        if batch == 1:
            raise RuntimeError("broken")

    model = Means()
    with pytest.raises(RuntimeError, match="broken"):
        model.fit(100 * X, batch_size=4, callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=fail)], verbose=0)
    np.testing.assert_allclose(model.fit(X, batch_size=4, verbose=0).history["mean"], [4.5], rtol=1e-6)


def test_results_of_validation_are_averages_of_their_own(eagerly):
    history = hl.fit(
        means, hl.Feed(X, batch_size=4), validate=(means, hl.Feed(10 * X, batch_size=4)), verbose=0
    ).history
    np.testing.assert_allclose([history["mean"], history["val_mean"]], [[4.5], [45.0]], rtol=1e-6)


def test_validation_within_an_epoch_leaves_the_averages_of_training_alone():
    data = hl.Feed(X, batch_size=4)
    history = hl.fit(means, data, validate=(means, 10 * X), validate_every=hl.every(steps=1), verbose=0).history
    np.testing.assert_allclose(history["mean"], [4.5], rtol=1e-6)


def test_the_mean_of_thousands_of_steps_is_exact():
    """In single precision, a total of these odd numbers beyond 2^24 would lose one a step."""
    steps, value = 4000, 2.0**13 + 1
    feed = hl.Feed(np.full(steps, value, "float32"), batch_size=1)
    assert hl.fit(means, feed, verbose=0).history["mean"] == [value]


def test_looking_does_not_change_the_last_digit(eagerly):
    values = np.random.default_rng(0).normal(size=200).astype("float32") ** 3

    def run(*callbacks):
        return hl.fit(means, hl.Feed(values, batch_size=3), callbacks=callbacks, verbose=0).history

    assert run(Watcher()) == run()


# ------------------------------------------------------- what callbacks write


def fit_with(*hooks, **options):
    """Calls functions of the logs after each step."""
    heard = [lambda batch, logs, hook=hook: hook(logs) for hook in hooks]
    listeners = [keras.callbacks.LambdaCallback(on_train_batch_end=hear) for hear in heard]
    return hl.fit(means, hl.Feed(X, batch_size=4), callbacks=listeners, verbose=0, **options).history


def test_what_a_callback_writes_those_after_it_see_until_the_next_step(eagerly):
    before, after = [], []

    def write(logs):
        before.append(dict(logs))
        logs["twice"] = 2 * logs["mean"]
        logs.update(mean=-1.0)

    history = fit_with(write, lambda logs: after.append(dict(logs)))
    assert before == [{"mean": 1.5}, {"mean": 3.5}, {"mean": 4.5}]
    assert after == [{"mean": -1.0, "twice": value} for value in (3.0, 7.0, 9.0)]
    assert history == {"mean": [4.5]}


def test_what_was_written_can_be_taken_back():
    seen = []

    def write(logs):
        logs["extra"] = 1.0
        seen.append((len(logs), logs.pop("extra"), "extra" in logs, len(logs)))
        with pytest.raises(KeyError):
            del logs["mean"]

    fit_with(write)
    assert seen == [(2, 1.0, False, 1)] * 3


def test_examples_are_counted_without_reading(eagerly):
    counts = []
    fit_with(lambda logs: counts.append((logs.examples, len(logs.steps))), epochs=2)
    assert counts == [(4, 1), (8, 2), (10, 3)] * 2


def test_compiling_has_its_time_and_known_steps_none():
    seconds = []
    fit_with(lambda logs: seconds.append(logs.seconds_compiling), epochs=2)
    assert 0 < seconds[0] == seconds[1] < seconds[2]  # The last batch is a smaller one.
    assert seconds[3:] == [0, 0, 0]
