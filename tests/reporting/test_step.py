"""What a step returns: what is reported of it, under which names, and what is refused."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.errors import HandloomWarning, StepError

close = np.testing.assert_allclose
X = np.arange(10, dtype="float32")  # In batches of 4: 0-3, 4-7, 8-9.


class Extremes(keras.Metric):
    """The least and the greatest value, as an array."""

    def __init__(self, name="extremes"):
        super().__init__(name=name)
        self.values = self.add_variable((2,), "zeros")

    def update_state(self, x):
        low, high = self.values[0], self.values[1]
        self.values.assign(ops.stack([ops.minimum(low, ops.min(x)), ops.maximum(high, ops.max(x))]))

    def result(self):
        return ops.copy(self.values.value)


class Largest(keras.Metric):
    """The greatest whole number, as a whole number."""

    def __init__(self):
        super().__init__(name="largest", dtype="int32")
        self.value = self.add_variable((), "zeros", dtype="int32")

    def update_state(self, x):
        self.value.assign(ops.maximum(self.value, ops.max(x)))

    def result(self):
        return ops.copy(self.value.value)


class MeanAndSum(keras.Metric):
    """Two results by name."""

    def __init__(self):
        super().__init__(name="both")
        self.total = self.add_variable((), "zeros")
        self.count = self.add_variable((), "zeros")

    def update_state(self, x):
        self.total.assign_add(ops.sum(x))
        self.count.assign_add(x.shape[0])

    def result(self):
        return {"mean": self.total / self.count, "sum": self.total + 0.0}


def reported(step, data=X, epochs=1):
    """What a step reports of data in batches of 4, by epoch."""
    return hl.fit(step, hl.Feed(data, batch_size=4), epochs=epochs, verbose=0).history


def validated(step, data):
    """What a step reports of data in batches of 4 that it does not train on, where batches may weigh nothing."""
    history = hl.fit(lambda x: {}, X, validate=(step, hl.Feed(data, batch_size=4)), verbose=0).history
    return {name.removeprefix("val_"): values for name, values in history.items()}


def test_a_scalar_is_averaged_over_the_examples_of_uneven_batches(eagerly):
    history = reported(lambda x: {"mean": ops.mean(x), "square": ops.mean(x**2)})
    np.testing.assert_allclose(history["mean"], [X.mean()], rtol=1e-6)
    np.testing.assert_allclose(history["square"], [(X**2).mean()], rtol=1e-6)


def test_a_scalar_without_examples_in_the_batch_counts_once_a_step():
    history = hl.fit(lambda x: {"x": x}, hl.Feed(lambda: iter([1.0, 2.0, 6.0])), verbose=0).history
    np.testing.assert_allclose(history["x"], [3.0])


def test_sample_weights_weigh_the_averages(eagerly):
    weight = np.linspace(0.0, 2.0, 10).astype("float32")

    def step(x, sample_weight):
        return {"mean": ops.sum(x * sample_weight) / ops.sum(sample_weight)}

    np.testing.assert_allclose(reported(step, (X, weight))["mean"], [np.average(X, weights=weight)], rtol=1e-6)


def test_a_batch_of_weight_zero_has_no_part_in_the_average_even_if_it_gives_nan(eagerly):
    weight = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 3], dtype="float32")

    def step(x, sample_weight):
        return {"mean": ops.sum(x * sample_weight) / ops.sum(sample_weight)}

    np.testing.assert_allclose(validated(step, (X, weight))["mean"], [np.average(X, weights=weight)], rtol=1e-6)


def test_no_weight_at_all_is_reported_as_nan():
    def step(x, sample_weight):
        return {"mean": ops.sum(x * sample_weight) / ops.sum(sample_weight)}

    assert np.isnan(validated(step, (X, np.zeros(10, "float32")))["mean"]).all()


def test_sample_weights_leave_the_results_of_metrics_alone():
    last = keras.metrics.Mean(name="mean")

    def step(x, sample_weight):
        last.update_state(x)
        return {"loss": ops.sum(x * sample_weight) / ops.sum(sample_weight), "mean": last}

    weight = np.arange(10, dtype="float32")
    assert reported(step, (X, weight))["mean"] == [4.5]


@pytest.mark.parametrize("give", [lambda metric: metric, lambda metric: metric.result()], ids=["object", "result"])
def test_a_metric_is_asked_at_the_end_of_the_epoch(eagerly, give):
    precision = keras.metrics.Precision(name="precision")

    def step(truth, guess):
        precision.update_state(truth, guess)
        return {"precision": give(precision)}

    truth = np.array([1, 1, 1, 1, 0, 0, 0, 0], dtype="float32")
    guess = np.array([1, 1, 1, 1, 1, 1, 1, 1], dtype="float32")
    # 1.0 over the first batch, 0.5 after both; a mean of what the batches said would be 0.75.
    assert reported(step, (truth, guess))["precision"] == [0.5]


def test_a_metric_is_reset_each_epoch(eagerly):
    total = keras.metrics.Sum(name="total")

    def step(x):
        total.update_state(x)
        return {"total": total}

    assert reported(step, epochs=3)["total"] == [45.0, 45.0, 45.0]


def test_what_a_metric_saw_before_the_run_does_not_count(eagerly):
    total = keras.metrics.Sum(name="total")
    total.update_state(np.array([1000.0]))

    def step(x):
        total.update_state(x)
        return {"total": total.result()}

    assert reported(step)["total"] == [45.0]


def test_a_value_computed_from_a_metric_result_is_not_averaged(eagerly):
    total, weight = keras.metrics.Sum(name="total"), keras.Variable(1.0)

    def step(x):
        total.update_state(x)
        loss, _ = hl.value_and_grad(lambda: ops.mean(x) * weight, wrt=weight)()
        result = total.result()
        return {
            "loss": loss,
            "mean": ops.mean(x),
            "total": result,
            "twice": 2 * result,
            "root": ops.sqrt(total.result()),
        }

    found = reported(step)
    close([found[name] for name in ("total", "twice", "root")], [[45], [90], [np.sqrt(45)]], 1e-6)
    close([found["loss"], found["mean"]], [[4.5], [4.5]], 1e-6)


def test_a_value_computed_from_a_metric_result_and_the_batch_warns_and_is_the_last(eagerly):
    total = keras.metrics.Sum(name="total")

    def step(x):
        total.update_state(x)
        return {"mixed": ops.mean(x) + total.result()}

    with pytest.warns(
        HandloomWarning, match="computes 'mixed' from this batch and from the running result of a metric"
    ):
        close(reported(step)["mixed"], [8.5 + 45])


def test_a_metric_may_report_an_array(eagerly):
    extremes = Extremes()

    def step(x):
        extremes.update_state(x)
        return {"extremes": extremes}

    [value] = reported(step, X - 3)["extremes"]
    np.testing.assert_array_equal(value, [-3, 6])


def test_the_array_of_one_epoch_is_not_changed_by_the_next():
    extremes = Extremes()
    data = iter([X, 10 * X])

    def step(x):
        extremes.update_state(x)
        return {"extremes": extremes}

    history = hl.fit(step, data, epochs=2, steps_per_epoch=1, verbose=0).history
    np.testing.assert_array_equal(history["extremes"], [[0, 9], [0, 90]])


@pytest.mark.parametrize("give", [lambda metric: metric, lambda metric: metric.result()], ids=["object", "result"])
def test_a_metric_of_several_results_reports_each_by_its_name(eagerly, give):
    both = MeanAndSum()

    def step(x):
        both.update_state(x)
        return {"both": give(both)}

    assert reported(step) == {"mean": [4.5], "sum": [45.0]}


def test_a_whole_number_is_reported_exactly(eagerly):
    largest = Largest()

    def step(x):
        largest.update_state(x)
        return {"largest": largest}

    number = 2**24 + 1  # The first that float32 does not have.
    assert reported(step, np.array([1, number, 2], dtype="int32"))["largest"] == [number]


@pytest.mark.backend("tensorflow", "torch")
def test_double_precision_is_kept(eagerly):
    def step(x):
        return {"x": 1 + ops.cast(ops.mean(x), "float64") * 1e-12}

    [value] = reported(step)["x"]
    np.testing.assert_allclose(value - 1, 4.5e-12, rtol=1e-3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_averaged_in_more(dtype):
    def step(x):
        return {"x": ops.cast(ops.mean(x), dtype)}

    # A float16 total of 4096 steps of 1 would stop at 2048, a bfloat16 one at 256.
    feed = hl.Feed(np.ones(4096, "float32"), batch_size=4)
    assert hl.fit(step, feed, verbose=0).history["x"] == [1.0]


def test_numbers_variables_and_truth_values_are_reported(eagerly):
    variable = keras.Variable(2.0)
    assert reported(lambda x: {"int": 3, "float": 0.5, "numpy": np.float64(0.25), "variable": variable}) == {
        "int": [3.0],
        "float": [0.5],
        "numpy": [0.25],
        "variable": [2.0],
    }
    np.testing.assert_allclose(reported(lambda x: {"late": ops.any(x > 5)})["late"], [0.6], rtol=1e-6)


def test_nan_shows(eagerly):
    data = X.copy()
    data[5] = np.nan
    history = reported(lambda x: {"mean": ops.mean(x), "count": ops.sum(ops.ones_like(x))})
    assert np.isfinite(history["mean"]).all()
    history = reported(lambda x: {"mean": ops.mean(x), "count": ops.sum(ops.ones_like(x))}, data)
    assert np.isnan(history["mean"]).all()
    np.testing.assert_allclose(history["count"], [(4 * 4 + 4 * 4 + 2 * 2) / 10], rtol=1e-6)


def test_nan_of_one_epoch_is_gone_in_the_next():
    batches = [np.full(4, np.nan, "float32"), np.ones(4, "float32")]
    history = hl.fit(lambda x: {"x": ops.mean(x)}, iter(batches), epochs=2, steps_per_epoch=1, verbose=0).history
    np.testing.assert_array_equal(history["x"], [np.nan, 1.0])


# ------------------------------------------------------- metrics that nothing updates


def test_a_metric_that_no_step_updates_is_absent(eagerly):
    idle, busy = keras.metrics.Mean(name="idle"), keras.metrics.Mean(name="busy")

    def step(x):
        busy.update_state(x)
        return {"idle": idle, "busy": busy, "also idle": idle.result()}

    history = reported(step, X, epochs=2)
    assert set(history) == {"busy"}
    assert history["busy"] == [4.5, 4.5]


def test_a_metric_that_is_updated_outside_of_steps_is_reported(eagerly):
    seen = keras.metrics.Sum(name="seen")

    class Counts(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.update_state([1.0])

    history = hl.fit(lambda x: {"seen": seen}, hl.Feed(X, batch_size=4), callbacks=[Counts()], verbose=0).history
    assert history["seen"] == [2.0]  # As the last of three steps found it.


def test_a_metric_whose_state_its_updates_leave_alone_is_reported(eagerly):
    hits = keras.metrics.TruePositives(name="hits")

    def step(x):
        hits.update_state(0 * x, 0 * x)
        return {"hits": hits}

    assert reported(step, X)["hits"] == [0.0]


def test_a_metric_that_a_model_resets_but_does_not_update_this_epoch_is_absent():
    class TwoKinds(hl.Model):
        def __init__(self):
            super().__init__()
            self.rows, self.sums = keras.metrics.Mean(name="rows"), keras.metrics.Mean(name="sums")

        def train_step(self, data):
            (self.sums if len(data.shape) == 1 else self.rows).update_state(data)
            return {"rows": self.rows, "sums": self.sums}

    one, two = X, X[:, None]
    epochs = iter([[two], [one, two], [one]])
    model = TwoKinds()
    model.compile()
    seen = []

    class Keep(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append(set(logs))

    model.fit(lambda: iter(next(epochs)), epochs=3, callbacks=[Keep()], verbose=0)
    assert seen == [{"rows"}, {"rows", "sums"}, {"sums"}]


def test_how_each_value_is_reduced_is_known(eagerly):
    precision = keras.metrics.Precision(name="precision")

    class Reporting(hl.Model):
        def train_step(self, data):
            x, y, weight = data
            precision.update_state(y > 0, x > 0)
            mean = ops.sum(weight * y[:, 0]) / ops.sum(weight)
            error = keras.losses.MeanSquaredError()(y, x)
            return {"mean": mean, "pair": (ops.sum(y), 3.0), "precision": precision, "error": error}

        def test_step(self, data):
            return {"mean": ops.mean(data[1])}

    model = Reporting()
    model.compile()
    assert model.explain().reported == {}
    model.fit(X[:, None], X[:, None], sample_weight=np.ones(10, "float32"), verbose=0)
    model.evaluate(X[:, None], X[:, None], verbose=0)
    assert model.explain().reported == {
        "train_step": {
            "mean": "mean over sample weights",
            "pair": "sum over sum of weights",
            "precision": "result of Precision",
            "error": "mean over examples",
        },
        "test_step": {"mean": "mean over examples"},
    }


def test_inner_dicts_report_their_own_names():
    values = {"a": 1.0, "group": {"b": 2.0, "deeper": {"c": 3.0}}}
    assert reported(lambda x: values) == {"a": [1.0], "b": [2.0], "c": [3.0]}


def test_names_stand_in_the_order_in_which_the_step_returned_them(eagerly):
    extremes, mean = Extremes(), keras.metrics.Mean(name="mean")

    def step(x):
        extremes.update_state(x)
        mean.update_state(x)
        return {"z": extremes, "y": ops.mean(x), "x": mean, "w": 1}

    assert list(reported(step)) == ["z", "y", "x", "w"]


def test_of_one_name_in_two_inner_dicts_the_last_counts():
    mean = keras.metrics.Mean(name="loss")

    def step(x):
        mean.update_state(x)
        return {"loss": 100 * ops.mean(x), "metrics": {"loss": mean.result()}}

    assert reported(step)["loss"] == [4.5]
    assert reported(lambda x: {"metrics": {"loss": 1.0}, "loss": 2.0})["loss"] == [2.0]


@pytest.mark.parametrize("cls", [hl.Model, keras.Model])
def test_a_metric_called_like_the_loss_takes_its_place_as_in_keras(cls):
    inputs = keras.Input((1,))
    model = cls(inputs, layers.Dense(1, kernel_initializer="ones")(inputs))
    model.compile(keras.optimizers.SGD(0.0), loss="mae", metrics=[keras.metrics.MeanSquaredError(name="loss")])
    x = X[:, None]
    assert model.fit(x, 3 * x, batch_size=4, shuffle=False, verbose=0).history["loss"] == [np.mean((2 * X) ** 2)]


def test_a_name_that_is_no_string_is_reported_as_text():
    assert reported(lambda x: {0: 1.0}) == {"0": [1.0]}


def test_a_step_may_report_nothing(eagerly):
    assert reported(lambda x: {}) == {}


def test_steps_on_batches_of_different_structure_share_their_names():
    def step(batch):
        return {"mean": ops.mean(batch["x"])}

    batches = [{"x": X[:4]}, {"x": X[4:], "more": X[4:]}]
    assert hl.fit(step, lambda: iter(batches), verbose=0).history["mean"] == [4.5]


@pytest.mark.parametrize(
    ("returned", "named"),
    [
        (None, "None (of type NoneType)"),
        (1.5, "1.5 (of type float)"),
        (np.zeros((2, 3), "float32"), "a tensor of shape (2, 3)"),
        ([("loss", 1.0)], "[('loss', 1.0)] (of type list)"),
    ],
)
def test_a_step_that_returns_no_dict_is_told_what_to_return(eagerly, returned, named):
    def my_step(x):
        return returned

    with pytest.raises(StepError, match=r"must return .* a dict of scalars, such as {'loss': loss}") as caught:
        reported(my_step)
    assert "my_step" in str(caught.value)
    assert named in str(caught.value)


def test_a_step_that_returns_a_non_scalar_is_told_to_reduce_it(eagerly):
    def my_step(x):
        return {"fine": ops.mean(x), "errors": x**2}

    with pytest.raises(StepError, match=r"my_step returned a tensor of shape \(4,\) as 'errors'.*keras.ops.mean"):
        reported(my_step)


@pytest.mark.parametrize(
    ("value", "kind"), [("high", "str"), (None, "NoneType"), ([1.0, 2.0], "list"), (object(), "object")]
)
def test_a_step_that_returns_what_is_no_number_is_told_so(eagerly, value, kind):
    def my_step(x):
        return {"fine": ops.mean(x), "level": value}

    with pytest.raises(StepError, match=rf"my_step returned .*of type {kind}\) as 'level'.*scalars"):
        reported(my_step)


def test_a_model_whose_step_returns_no_dict_goes_on_after_it_was_mended(eagerly):
    class Careless(hl.Model):
        careful = False

        def train_step(self, data):
            loss = self.minimize(lambda: ops.mean((self(data) - 1) ** 2))
            return {"loss": loss} if self.careful else loss

    model = Careless([layers.Dense(1)])
    model.compile("sgd")
    with pytest.raises(StepError, match="train_step must return"):
        model.fit(X[:, None] / 10, verbose=0)
    Careless.careful = True
    history = model.fit(X[:, None] / 10, epochs=20, verbose=0).history["loss"]
    assert history[-1] < history[0]


def test_something_else_than_a_function_is_no_step():
    with pytest.raises(StepError, match="A step is a function of a batch; received 3"):
        hl.fit(3, X, verbose=0)


class NotReady(ValueError):
    def __init__(self, what, when):
        super().__init__(f"{what} is not ready before {when}")
        self.when = when


def test_an_error_in_a_step_comes_out_as_it_is(eagerly):
    def step(x):
        raise NotReady("the cake", 5)

    with pytest.raises(NotReady, match="the cake is not ready before 5") as caught:
        reported(step)
    assert caught.value.when == 5
