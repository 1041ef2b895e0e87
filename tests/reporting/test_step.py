"""The results of a step: the values that are reported, their names, and the values that are refused."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.errors import HandloomWarning, StepError
from tests.models import compiled, fit, functional
from tests.numbers import close, same

X = np.arange(10, dtype="float32")  # In batches of 4: 0-3, 4-7, 8-9.


class Stateful(keras.Metric):
    """A metric that is one variable and one function of it and the batch."""

    def __init__(self, update, shape=(), dtype="float32", result=lambda value: value + 0):
        super().__init__(name="stateful", dtype=dtype)
        self.update, self.finish = update, result
        self.value = self.add_variable(shape, "zeros", dtype=dtype)

    def update_state(self, x):
        self.value.assign(self.update(self.value.value, x))

    def result(self):
        return self.finish(self.value.value)


def extremes():
    """The least and the greatest value, as an array."""
    return Stateful(lambda v, x: ops.stack([ops.minimum(v[0], ops.min(x)), ops.maximum(v[1], ops.max(x))]), shape=(2,))


def mean_and_sum():
    """Two results by name."""
    return Stateful(
        lambda value, x: value + ops.stack([ops.sum(x), float(x.shape[0])]),
        shape=(2,),
        result=lambda value: {"mean": value[0] / value[1], "sum": value[0] + 0},
    )


def updating(metric, give=lambda metric: metric, name="metric"):
    """A step that updates a metric and returns it, or its result."""

    def step(x):
        metric.update_state(x)
        return {name: give(metric)}

    return step


def reported(step, data=X, **options):
    """The values that a step reports of data in batches of 4, by epoch."""
    return hl.fit(step, hl.Feed(data, batch_size=4), verbose=0, **options).history


object_or_result = pytest.mark.parametrize(
    "give", [lambda metric: metric, lambda metric: metric.result()], ids=["object", "result"]
)

# ----------------------------------------------------------------------- scalars


def test_fit_counts_a_scalar_of_a_batch_without_examples_once_a_step():
    assert hl.fit(lambda x: {"x": x}, lambda: iter([1.0, 2.0, 6.0]), verbose=0).history["x"] == [3.0]


def test_fit_leaves_the_results_of_metrics_as_they_are_where_sample_weights_weight_scalars():
    mean, weight = keras.metrics.Mean(), X / 2

    def step(x, sample_weight):
        mean.update_state(x)
        return {"loss": ops.sum(x * sample_weight) / ops.sum(sample_weight), "mean": mean}

    history = reported(step, (X, weight))
    close([history["loss"], history["mean"]], [[np.average(X, weights=weight)], [4.5]])


@pytest.mark.backend("tensorflow", "torch")
def test_fit_keeps_double_precision(eagerly):
    [value] = reported(lambda x: {"x": 1 + ops.cast(ops.mean(x), "float64") * 1e-12})["x"]
    close(value - 1, 4.5e-12, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_fit_averages_half_precision_in_higher_precision(dtype):
    # A float16 total of 4096 steps of 1 would stop at 2048, a bfloat16 total at 256.
    assert reported(lambda x: {"x": ops.cast(ops.mean(x), dtype)}, np.ones(4096, "float32"))["x"] == [1.0]


def test_fit_reports_numbers_variables_and_truth_values(eagerly):
    values = {"int": 3, "float": 0.5, "numpy": np.float64(0.25), "variable": keras.Variable(2.0)}
    history = reported(lambda x: values | {"late": ops.any(x > 5)})
    assert {name: history[name] for name in values} == {"int": [3], "float": [0.5], "numpy": [0.25], "variable": [2]}
    close(history["late"], [0.6])


def test_fit_reports_nan_under_its_name_and_in_its_epoch_only(eagerly):
    batches = [np.full(4, np.nan, "float32"), np.ones(4, "float32")]
    history = hl.fit(lambda x: {"x": ops.mean(x), "y": 1.0}, iter(batches), epochs=2, steps_per_epoch=1, verbose=0)
    same(history.history["x"], [np.nan, 1.0])
    assert history.history["y"] == [1.0, 1.0]


# ----------------------------------------------------------------------- metrics


@object_or_result
def test_fit_reads_a_metric_at_the_end_of_the_epoch_and_resets_it_before(eagerly, give):
    precision = keras.metrics.Precision()
    precision.update_state(np.zeros(100), np.ones(100))  # Before the run: does not count.

    def step(truth, guess):
        precision.update_state(truth, guess)
        return {"precision": give(precision)}

    truth, guess = np.repeat([1.0, 0.0], 4).astype("float32"), np.ones(8, "float32")
    # 1.0 over the first batch, 0.5 after both; the mean of the batch values would be 0.75.
    assert reported(step, (truth, guess), epochs=2)["precision"] == [0.5, 0.5]


def test_fit_reports_the_last_value_of_what_is_computed_from_a_metric_result(eagerly):
    total, weight = keras.metrics.Sum(), keras.Variable(1.0)

    def step(x):
        total.update_state(x)
        loss, _ = hl.value_and_grad(lambda: ops.mean(x) * weight, wrt=weight)()
        result = total.result()
        values = {"total": result, "twice": 2 * result, "root": ops.sqrt(total.result()), "half": (result, 2)}
        return {"loss": loss, "mean": ops.mean(x), "pair": (ops.sum(x), len(x))} | values

    assert [float(np.float32(value)) for [value] in reported(step).values()] == pytest.approx(
        [4.5, 4.5, 4.5, 45, 90, np.sqrt(45), 22.5]
    )


@pytest.mark.parametrize("validates", [False, True], ids=["train", "test"])
def test_fit_reports_the_last_value_of_what_is_computed_from_the_variables_of_a_metric(eagerly, validates):
    mean, positives = keras.metrics.Mean(), keras.metrics.TruePositives()

    def step(x):
        before = 1 * mean.count
        mean.update_state(x)
        positives.update_state(x > 4, x > 5)
        above = positives.accumulator[0]
        values = {"mean": mean.total / mean.count, "count": mean.count, "before": before, "share": above / mean.count}
        return {"batch": ops.mean(x), "nan at first": above / above} | values

    def other(x):
        return {"x": ops.mean(x)}

    history = reported(other, validate=(step, hl.Feed(X, batch_size=4))) if validates else reported(step, state=mean)
    found = {name.removeprefix("val_"): value for name, [value] in history.items()}
    expected = {"batch": 4.5, "mean": 4.5, "count": 10, "before": 8, "share": 0.4, "nan at first": 1}
    close([found[name] for name in expected], list(expected.values()))


def test_fit_warns_of_a_value_computed_from_a_metric_result_and_the_batch(eagerly):
    total = keras.metrics.Sum()

    def step(x):
        total.update_state(x)
        return {"mixed": ops.mean(x) + total.result(), "pair": (total.result(), ops.sum(x))}

    with pytest.warns(HandloomWarning, match="HL205") as warned:
        history = reported(step)
    close([history["mixed"], history["pair"]], [[8.5 + 45], [45 / 17]])
    assert len(warned) == 2
    assert "step computes 'mixed' from the batch and a metric's running result" in str(warned[0].message)


def test_fit_reports_a_metric_that_is_an_array_and_does_not_change_it_in_the_next_epoch(eagerly):
    history = hl.fit(updating(extremes()), iter([X - 3, 10 * X]), epochs=2, steps_per_epoch=1, verbose=0).history
    same(history["metric"], [[-3, 6], [0, 90]])


@object_or_result
def test_fit_reports_each_result_of_a_metric_with_several_by_its_name(eagerly, give):
    assert reported(updating(mean_and_sum(), give)) == {"mean": [4.5], "sum": [45.0]}


def test_fit_reports_a_whole_number_exactly(eagerly):
    largest = Stateful(lambda value, x: ops.maximum(value, ops.max(x)), dtype="int32")
    number = 2**24 + 1  # The first that float32 does not have.
    assert reported(updating(largest), np.array([1, number, 2], dtype="int32"))["metric"] == [number]


def test_fit_leaves_out_a_metric_that_no_step_updates(eagerly):
    idle, busy = keras.metrics.Mean(), keras.metrics.Mean()

    def step(x):
        busy.update_state(x)
        return {"idle": idle, "busy": busy, "also idle": idle.result()}

    assert reported(step, epochs=2) == {"busy": [4.5, 4.5]}


def test_fit_reports_a_metric_that_a_callback_updates(eagerly):
    seen = keras.metrics.Sum()
    count = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.update_state([1.0]))
    assert reported(lambda x: {"seen": seen}, callbacks=[count])["seen"] == [2.0]  # As the last of three steps saw it.


def test_fit_reports_a_metric_whose_updates_do_not_change_its_state(eagerly):
    assert reported(updating(Stateful(lambda value, x: value)))["metric"] == [0.0]


def test_fit_leaves_out_a_metric_that_a_model_resets_but_does_not_update_in_this_epoch():
    class TwoKinds(hl.Model):
        def __init__(self):
            super().__init__()
            self.rows, self.sums = keras.metrics.Mean(), keras.metrics.Mean()

        def train_step(self, data):
            (self.sums if len(data.shape) == 1 else self.rows).update_state(data)
            return {"rows": self.rows, "sums": self.sums}

    model, seen, two = TwoKinds(), [], X[:, None]
    model.compile()
    epochs = iter([[two], [X, two], [X]])
    keep = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(set(logs)))
    model.fit(lambda: iter(next(epochs)), epochs=3, callbacks=[keep], verbose=0)
    assert seen == [{"rows"}, {"rows", "sums"}, {"sums"}]


def test_explain_tells_how_each_value_is_reduced(eagerly):
    precision = keras.metrics.Precision()

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
    fit(model, X[:, None], X[:, None], sample_weight=np.ones(10, "float32"))
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


# ------------------------------------------------------------------------- names


def test_fit_reports_the_values_of_inner_dicts_in_the_order_of_the_step(eagerly):
    metric = extremes()

    def step(x):
        metric.update_state(x)
        return {"z": metric, "group": {"y": ops.mean(x), "deeper": {"x": 3.0}}, 0: 1}

    assert list(reported(step)) == ["z", "y", "x", "0"]
    assert reported(lambda x: {}) == {}


def test_fit_reports_the_last_of_two_values_with_one_name():
    mean = keras.metrics.Mean()

    def step(x):
        mean.update_state(x)
        return {"loss": 100 * ops.mean(x), "metrics": {"loss": mean.result()}}

    assert reported(step)["loss"] == [4.5]
    assert reported(lambda x: {"metrics": {"loss": 1.0}, "loss": 2.0})["loss"] == [2.0]


@pytest.mark.parametrize("cls", [hl.Model, keras.Model])
def test_fit_reports_a_metric_with_the_name_of_the_loss_instead_of_the_loss_as_keras_does(cls):
    model = functional(layers.Dense(1, kernel_initializer="ones"), inputs=1, cls=cls)
    compiled(model, keras.optimizers.SGD(0.0), "mae", metrics=[keras.metrics.MeanSquaredError(name="loss")])
    assert fit(model, X[:, None], 3 * X[:, None], batch_size=4)["loss"] == [np.mean((2 * X) ** 2)]


def test_fit_averages_one_name_over_batches_of_different_structure():
    batches = [{"x": X[:4]}, {"x": X[4:], "more": X[4:]}]
    assert hl.fit(lambda batch: {"mean": ops.mean(batch["x"])}, lambda: iter(batches), verbose=0).history == {
        "mean": [4.5]
    }


# ------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("returned", "shown"),
    [
        (None, r"None \(of type NoneType\)"),
        (1.5, r"1.5 \(of type float\)"),
        (np.zeros((2, 3), "float32"), r"a tensor of shape \(2, 3\)"),
        ([("loss", 1.0)], r"\[\('loss', 1.0\)\] \(of type list\)"),
    ],
)
def test_fit_refuses_a_step_that_returns_no_dict(eagerly, returned, shown):
    words = rf"step must return a dict of scalars, such as {{'loss': loss}}; it returned {shown}.* \[HL201\]"

    def step(x):
        return returned

    with pytest.raises(StepError, match=words):
        reported(step)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (X[:3], r"step returned a tensor of shape \(3,\) as 'bad', not a scalar.*keras.ops.mean.*HL202"),
        ("high", r"step returned 'high' \(of type str\) as 'bad'.*HL203"),
        (None, r"step returned None \(of type NoneType\) as 'bad'.*Return scalars"),
        ([1.0, 2.0], r"\(of type list\) as 'bad'"),
        (object(), r"\(of type object\) as 'bad'"),
    ],
)
def test_fit_refuses_a_value_that_is_not_a_scalar(eagerly, value, words):
    def step(x):
        return {"fine": ops.mean(x), "bad": value}

    with pytest.raises(StepError, match=words):
        reported(step)
