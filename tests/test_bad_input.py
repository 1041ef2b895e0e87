"""Bad input, through `Model.fit` and `hl.fit`: a clear error, whole weights, and training that goes on afterwards."""

import json
import signal

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.errors import DataError, OptimizerError, StepError

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 3)).astype("float32")
Y = X[:, :1] - X[:, 1:2]


class ByModel:
    """A compiled model and its default step."""

    def __init__(self, loss="mse", units=1):
        self.optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
        self.model = hl.Model([keras.Input((3,)), layers.Dense(units, name="the_layer")])
        self.model.compile(self.optimizer, loss)
        self.optimizer.build(self.model.trainable_variables)

    def fit(self, x=X, y=Y, **arguments):
        return self.model.fit(x, y, **({"batch_size": 10, "shuffle": False, "verbose": 0} | arguments)).history

    @property
    def state(self):
        return [ops.convert_to_numpy(variable) for variable in [*self.model.weights, *self.optimizer.variables]]


class ByStep(ByModel):
    """A plain step on the same model."""

    def step(self, x, y):
        return {"loss": hl.minimize(lambda: ops.mean((self.model(x) - y) ** 2), self.model, self.optimizer)}

    def fit(self, x=X, y=Y, **arguments):
        return hl.fit(self.step, hl.Feed((x, y), batch_size=10), **({"verbose": 0} | arguments)).history


@pytest.fixture(params=[ByModel, ByStep])
def way(request):
    return request.param()


def assert_untouched_and_usable(way, before):
    for one, other in zip(before, way.state, strict=True):
        np.testing.assert_array_equal(one, other)
    assert_usable(way)


def assert_usable(way):
    steps = int(way.optimizer.iterations)
    losses = way.fit(epochs=2)["loss"]
    assert np.isfinite(losses).all()
    assert int(way.optimizer.iterations) == steps + 8


def refused(way, error, words, **arguments):
    before = way.state
    with pytest.raises(error, match=words):
        way.fit(**arguments)
    assert_untouched_and_usable(way, before)


def test_arrays_of_unequal_lengths(way):
    refused(way, DataError, r"same number of examples.*x has 40, y has 30", y=Y[:30])


def test_data_without_examples(way):
    refused(way, DataError, "The data is empty: it has 0 examples", x=X[:0], y=Y[:0])


def test_a_source_without_batches():
    empty = {"x": (batch for batch in ()), "y": None, "batch_size": None}
    refused(ByModel(), DataError, r"The data is empty: the generator gave no batch", **empty)


def test_inputs_of_a_wrong_width(way):
    words = r"layer 'the_layer' is incompatible .* value 3, but received input with shape \(10, 2\)"
    refused(way, ValueError, words, x=X[:, :2])


def test_targets_of_a_wrong_shape(way):
    """The backends' own words: what the shapes are, or where they differ."""
    shapes = r"\(10, 7, 2\)|\[10,7,2\]|\(7\) must match|\(10\) must match"
    refused(way, (ValueError, RuntimeError), shapes, y=np.zeros((40, 7, 2), "float32"))


def test_a_wrong_shape_in_a_later_batch_leaves_what_the_batches_before_it_made(eagerly):
    way, same = ByModel(), ByModel()
    same.model.set_weights(way.model.get_weights())
    good = [(X[start : start + 10], Y[start : start + 10]) for start in (0, 10)]
    same.fit(iter(good), None, batch_size=None)
    with pytest.raises(ValueError, match="'the_layer' is incompatible"):
        way.fit(iter([*good, (X[20:30, :2], Y[20:30])]), None, batch_size=None)
    for one, other in zip(same.state, way.state, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-7)
    assert_usable(way)


def test_not_a_number_in_the_data_is_allowed_and_shows_in_the_log(way, tmp_path, eagerly):
    before = way.model.get_weights()
    x = X.copy()
    x[35, 1] = np.nan
    history = way.fit(x, run_dir=tmp_path, save=None)
    assert np.isnan(history["loss"]).tolist() == [True]
    [line] = [line for line in (tmp_path / "events.jsonl").read_text().splitlines() if '"kind": "epoch"' in line]
    assert json.loads(line)["values"]["loss"] == "NaN"
    way.model.set_weights(before)
    for slot in way.optimizer.variables[2:]:
        slot.assign(ops.zeros_like(slot.value))
    assert_usable(way)


def test_a_label_outside_the_classes():
    way = ByModel(keras.losses.SparseCategoricalCrossentropy(from_logits=True), units=3)
    labels = RNG.integers(0, 3, 40)
    wrong = labels.copy()
    wrong[17] = 3
    before = way.state
    with pytest.raises(
        DataError, match=r"y has the label 3 \(at \[17\], .* 3 outputs, for classes 0 to 2\. Number the"
    ):
        way.fit(y=wrong)
    for one, other in zip(before, way.state, strict=True):
        np.testing.assert_array_equal(one, other)
    assert np.isfinite(way.fit(y=labels)["loss"]).all()


# --------------------------------------------------------------- a step's own


class Mendable(hl.Model):
    """A step of its own that returns, and trains, what it is told to."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(1, name="the_layer")
        self.returns = lambda loss: {"loss": loss}
        self.compile(keras.optimizers.SGD(0.1))
        self(X)

    def call(self, x):
        return self.dense(x)

    def train_step(self, data):
        x, y = data
        return self.returns(self.minimize(lambda: ops.mean((self(x) - y) ** 2)))


class OwnStep:
    def __init__(self):
        self.model = Mendable()
        self.optimizer = self.model.optimizer
        self.optimizer.build(self.model.trainable_variables)

    state = ByModel.state
    fit = ByModel.fit


class PlainStep(OwnStep):
    def fit(self, **arguments):
        return hl.fit(
            lambda x, y: self.model.train_step((x, y)), hl.Feed((X, Y), batch_size=10), verbose=0, **arguments
        ).history


@pytest.mark.parametrize("kind", [OwnStep, PlainStep])
@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (
            lambda loss: loss,
            r"must return a dict of scalars, such as \{'loss': loss\}; it returned",
        ),
        (lambda loss: None, r"a dict of scalars, .*it returned None .*HL201"),
        (lambda loss: {"loss": ops.ones((10, 1))}, r"returned a tensor of shape \(10, 1\) as 'loss'.*keras\.ops\.mean"),
    ],
    ids=["a tensor", "nothing", "no scalar"],
)
def test_a_step_that_returns_something_else_than_scalars_by_name(kind, returned, words):
    way = kind()
    before = way.state
    way.model.returns = returned
    with pytest.raises(StepError, match=words):
        way.fit()
    way.model.returns = lambda loss: {"loss": loss}
    assert_untouched_and_usable(way, before)


class TwoParts(hl.Model):
    def __init__(self):
        super().__init__()
        self.left, self.right = layers.Dense(1, name="left"), layers.Dense(1, name="right")
        self.both = [self.left, self.right]

    def call(self, x):
        return self.left(x) + self.right(x)


@pytest.mark.parametrize("built", [True, False], ids=["built", "built by the first fit"])
@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            ["left"],
            r"No optimizer owns '[\w/]*right/kernel', .*'left'\. Add one for the rest, optimizer=\{\.\.\., \"\*\":",
        ),
        (["left", "both"], r"'[\w/]*left/kernel' is owned twice, by the optimizers 'left' and 'both'\. Name parts"),
    ],
    ids=["nobody's", "owned twice"],
)
def test_a_variable_that_is_not_owned_just_once(built, names, words):
    model = TwoParts()
    if built:
        model(X)

    def compile_and_fit(names):
        model.compile(dict.fromkeys(names, "sgd"), "mse")
        return model.fit(X, Y, verbose=0).history["loss"]

    with pytest.raises(OptimizerError, match=words):
        compile_and_fit(names)
    before = model.get_weights()
    assert np.isfinite(compile_and_fit(["left", "*"])).all()
    assert not built or not np.array_equal(before[0], model.get_weights()[0])


@pytest.mark.parametrize("way", [ByModel, ByStep, OwnStep, PlainStep], indirect=True)
def test_an_interrupt(way, eagerly):
    class Interrupt(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 2:
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        way.fit(callbacks=[Interrupt()], epochs=3)
    assert int(way.optimizer.iterations) == 3
    assert_usable(way)


# ------------------------------------------------------------------------ optimizers

BAD_OPTIONS = {
    "clipvalue": {"clipvalue": -1.0},
    "clipnorm": {"clipnorm": -0.5},
    "global_clipnorm": {"global_clipnorm": 0.0},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 0},
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_an_option_of_keras_optimizers_that_keras_would_pass_over(name):
    [value] = BAD_OPTIONS[name].values()
    words = rf"SGD has {name}={value}: .*leave it out"
    model, variable = ByModel().model, keras.Variable(1.0)
    for optimizer in (keras.optimizers.SGD, lambda **bad: {"*": keras.optimizers.SGD(**bad)}):
        with pytest.raises(OptimizerError, match=words):
            model.compile(optimizer(**BAD_OPTIONS[name]), "mse")
    with pytest.raises(OptimizerError, match=words):
        hl.minimize(lambda: variable * 1.0, variable, keras.optimizers.SGD(**BAD_OPTIONS[name]))
    model.fit(X, Y, verbose=0)  # By the optimizer that it had.


@pytest.mark.parametrize("wrapper", [hl.optimizers.GradientAccumulation, hl.optimizers.UpdateEvery])
@pytest.mark.parametrize("steps", [0, -1, 1.5, True])
def test_so_many_steps_to_an_update(wrapper, steps):
    with pytest.raises(ValueError, match=rf"{wrapper.__name__}\(steps=...\) takes a whole number, at least 1;"):
        wrapper("sgd", steps)


@pytest.mark.parametrize("kind", ["ClipByValue", "ClipByNorm", "ClipByGlobalNorm"])
@pytest.mark.parametrize("limit", [-1.0, 0.0, "1"])
def test_a_limit_of_clipping(kind, limit):
    with pytest.raises(ValueError, match=rf"{kind}\(limit=...\) takes a positive number; received"):
        getattr(hl.optimizers, kind)(limit)
