"""Bad input, through `Model.fit` and `hl.fit`: a clear error, unchanged weights, and training that works afterwards."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.errors import ArgumentError, DataError, StepError
from tests.models import compiled, sequential
from tests.numbers import each_close, each_same, normal, values_of
from tests.run.run_log import epochs_in

X = normal(40, 3)
Y = X[:, :1] - X[:, 1:2]


class CustomStep(hl.Model):
    """Its step returns the loss in the form that a test chooses."""

    form = staticmethod(lambda loss: {"loss": loss})

    def train_step(self, data):
        x, y = data
        return self.form(self.minimize(lambda: ops.mean((self(x) - y) ** 2)))


class ByModel:
    """A compiled model and its step, the default one or that of a subclass."""

    def __init__(self, cls=hl.Model):
        self.optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
        self.model = compiled(sequential(layers.Dense(1, name="the_layer"), cls=cls), self.optimizer)
        self.optimizer.build(self.model.trainable_variables)

    def fit(self, x=X, y=Y, **options):
        options = {"batch_size": 10, "shuffle": False, "verbose": 0} | options
        return self.model.fit(x, y, **options).history

    @property
    def values(self):
        return values_of(self.model, self.optimizer)

    def assert_usable(self):
        steps = int(self.optimizer.iterations)
        assert np.isfinite(self.fit(epochs=2)["loss"]).all()
        assert int(self.optimizer.iterations) == steps + 8

    def assert_refuses(self, error, words, **options):
        before = self.values
        with pytest.raises(error, match=words):
            self.fit(**options)
        each_same(self.values, before)


class ByStep(ByModel):
    """A plain step on the same model."""

    def __init__(self, cls=CustomStep):
        super().__init__(cls)

    def fit(self, x=X, y=Y, **options):
        step = lambda x, y: self.model.train_step((x, y))  # noqa: E731
        return hl.fit(step, hl.Feed((x, y), batch_size=10), **({"verbose": 0} | options)).history


both = pytest.mark.parametrize("make", [ByModel, ByStep])


@both
@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        ({"y": Y[:30]}, DataError, r"same number of examples.*x has 40, y has 30"),
        ({"x": X[:0], "y": Y[:0]}, DataError, r"The data is empty: it has 0 examples"),
        ({"x": X[:, :2]}, ValueError, r"'the_layer' is incompatible .* received input with shape \(10, 2\)"),
        # In the words of each backend: the shapes, or where they differ.
        (
            {"y": np.zeros((40, 7, 2), "float32")},
            (ValueError, RuntimeError),
            r"\(10, 7, 2\)|\[10,7,2\]|\(7\) must match|\(10\) must match",
        ),
    ],
    ids=["of unequal lengths", "without examples", "with inputs of a wrong width", "with targets of a wrong shape"],
)
def test_fit_refuses_arrays(make, data, error, words):
    way = make()
    way.assert_refuses(error, words, **data)
    way.assert_usable()


def test_fit_refuses_a_source_without_batches():
    way = ByModel()
    way.assert_refuses(DataError, "the generator gave no batch", x=(batch for batch in ()), y=None, batch_size=None)
    way.assert_usable()


BATCHES = [(X[start : start + 10], Y[start : start + 10]) for start in range(0, 40, 10)]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"x": (X, Y), "y": None}, r"the data has no targets.*fit\(x, y\)"),
        ({"x": BATCHES[:3], "y": None}, r"the data has no targets.*fit\(lambda: iter\(batches\)\)"),
        ({"validation_data": BATCHES[:2]}, r"a list of 2 parts.*validation_data=lambda: iter\(batches\)"),
        ({"validation_data": BATCHES[:3]}, "a list of 3 parts"),
        ({"validation_data": BATCHES}, r"4 parts; it can be x, \(x, y\) or"),
        ({"x": hl.Feed(BATCHES), "y": None, "batch_size": None}, r"4 parts; it can be x, \(x, y\) or"),
    ],
)
def test_fit_refuses_a_list_of_batches_or_one_pair(data, words):
    way = ByModel()
    way.assert_refuses(DataError, words, **data)
    way.assert_usable()


def test_evaluate_refuses_one_pair():
    with pytest.raises(DataError, match="the data has no targets"):
        ByModel().model.evaluate((X, Y), verbose=0)


@pytest.mark.parametrize("parts", [2, 3], ids=["without weights", "with weights"])
def test_fit_evaluate_and_hl_fit_refuse_a_batch_without_examples(parts, eagerly):
    way, empty = ByModel(), [(X[:0], Y[:0], Y[:0, 0])[:parts]]
    way.assert_refuses(DataError, "A batch is empty", x=iter(empty), y=None, batch_size=None)
    with pytest.raises(DataError, match="A batch is empty"):
        way.fit(validation_data=lambda: iter(empty))
    with pytest.raises(DataError, match="A batch is empty"):
        way.model.evaluate(lambda: iter(empty))
    with pytest.raises(DataError, match="A batch is empty"):
        hl.fit(lambda *batch: {"mean": ops.mean(batch[0])}, lambda: iter(empty), verbose=0)


def test_fit_keeps_the_steps_before_a_batch_of_a_wrong_shape(eagerly):
    way, same = ByModel(), ByModel()
    same.model.set_weights(way.model.get_weights())
    good = [(X[start : start + 10], Y[start : start + 10]) for start in (0, 10)]
    same.fit(iter(good), None, batch_size=None)
    with pytest.raises(ValueError, match="'the_layer' is incompatible"):
        way.fit(iter([*good, (X[20:30, :2], Y[20:30])]), None, batch_size=None)
    each_close(way.values, same.values)
    way.assert_usable()


@both
def test_fit_allows_nan_in_the_data_and_logs_it(make, tmp_path, eagerly):
    way, x = make(), X.copy()
    x[35, 1] = np.nan
    before = way.model.get_weights()
    assert np.isnan(way.fit(x, run_dir=tmp_path, save=None)["loss"]).tolist() == [True]
    assert np.isnan([epoch["loss"] for epoch in epochs_in(tmp_path)]).tolist() == [True]
    way.model.set_weights(before)
    for slot in way.optimizer.variables[2:]:
        slot.assign(ops.zeros_like(slot.value))
    way.assert_usable()


@pytest.mark.parametrize("make", [lambda: ByModel(CustomStep), ByStep], ids=["model", "plain step"])
@pytest.mark.parametrize(
    ("form", "words"),
    [
        (lambda loss: loss, r"must return a dict of scalars, such as \{'loss': loss\}; it returned"),
        (lambda loss: None, "it returned None"),
        (lambda loss: {"loss": ops.ones((10, 1))}, r"returned a tensor of shape \(10, 1\) as 'loss'.*keras\.ops\.mean"),
    ],
    ids=["a tensor", "nothing", "no scalar"],
)
def test_fit_refuses_a_step_that_returns_no_dict_of_scalars(make, form, words):
    way = make()
    way.model.form = form
    way.assert_refuses(StepError, words)
    way.model.form = CustomStep.form
    way.assert_usable()


@pytest.mark.parametrize(
    ("name", "value"),
    [("clipvalue", -1.0), ("clipnorm", -0.5), ("global_clipnorm", 0.0), ("gradient_accumulation_steps", 0)],
)
def test_compile_and_minimize_refuse_an_option_of_keras_optimizers_that_keras_would_ignore(name, value):
    words = rf"SGD\({name}=...\) takes a .*; received {value}.*HL00"
    way, variable = ByModel(), keras.Variable(1.0)
    for optimizer in (keras.optimizers.SGD, lambda **bad: {"*": keras.optimizers.SGD(**bad)}):
        with pytest.raises(ArgumentError, match=words):
            way.model.compile(optimizer(**{name: value}), "mse")
    with pytest.raises(ArgumentError, match=words):
        hl.minimize(lambda: variable * 1.0, variable, keras.optimizers.SGD(**{name: value}))
    way.assert_usable()  # With the optimizer that it had.


@pytest.mark.parametrize("wrapper", [hl.optimizers.GradientAccumulation, hl.optimizers.UpdateEvery])
@pytest.mark.parametrize("steps", [0, -1, 1.5, True])
def test_gradient_accumulation_and_update_every_take_a_positive_whole_number(wrapper, steps):
    with pytest.raises(ValueError, match=rf"{wrapper.__name__}\(steps=...\) takes a whole number, at least 1;"):
        wrapper("sgd", steps)
