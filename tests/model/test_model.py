"""`hl.Model`: own steps, what they report, optimizers by name, compile."""

import functools
import math

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.errors import HandloomWarning, OptimizerError, StepError
from tests.run.run_log import epochs_in

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 3)).astype("float32")
Y = (X @ [[1.0], [-2.0], [0.5]]).astype("float32")
SMALL = 0.1 * Y  # In float16 nothing overflows with these, and so no update is skipped.
WEIGHTS = RNG.uniform(0.1, 3, size=40).astype("float32")


def dense(units=1, **options):
    return layers.Dense(units, **options)


def mlp(cls=hl.Model, **options):
    inputs = keras.Input((3,))
    return cls(inputs, dense()(dense(4, activation="tanh", name="hidden", **options)(inputs)))


def fit(model, x=X, y=Y, **arguments):
    return model.fit(x, y, **({"batch_size": 20, "shuffle": False, "verbose": 0} | arguments)).history


def arrays(variables):
    return [ops.convert_to_numpy(variable) for variable in variables]


def same(before, after):
    return all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))


# ------------------------------------------------------------------ own steps


class WithComputeLoss(hl.Model):
    """The guide's own step, in words of any backend."""

    def train_step(self, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)

        def loss_fn():
            y_pred = self(x, training=True)
            return self.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight), y_pred

        loss, y_pred = self.minimize(loss_fn, has_aux=True)
        results = self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
        return results | {"loss": loss}


def test_an_own_step_with_compute_loss_equals_the_default_one(eagerly):
    default, own = (mlp(cls, kernel_regularizer="l2", activity_regularizer="l1") for cls in (hl.Model, WithComputeLoss))
    own.set_weights(default.get_weights())
    for model in (default, own):
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", metrics=["mae"], weighted_metrics=["mse"])
    expected, reported = (fit(model, sample_weight=WEIGHTS, epochs=2) for model in (default, own))
    assert set(reported) == set(expected) == {"loss", "mae", "mse"}
    for name in expected:
        np.testing.assert_allclose(reported[name], expected[name], rtol=1e-5)
    for one, other in zip(default.get_weights(), own.get_weights(), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)


def test_a_raw_loss_is_reported_as_the_mean_over_the_examples():
    """Keras reports 0.0 here, or the last batch."""

    class Raw(hl.Model):
        def train_step(self, data):
            x, y = data
            return {"loss": self.minimize(lambda: ops.mean((self(x) - y) ** 2))}

    model = mlp(Raw)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    expected = np.mean((model.predict(X, verbose=0) - Y) ** 2)
    np.testing.assert_allclose(fit(model, batch_size=25)["loss"], [expected], rtol=1e-5)


def test_a_regularizer_belongs_to_the_loss_whether_or_not_the_step_remembers_it():
    class Forgetful(hl.Model):
        def train_step(self, data):
            return {"loss": self.minimize(lambda: 0.0 * ops.mean(self(data)))}

    model = Forgetful([keras.Input((3,)), dense(use_bias=False, kernel_regularizer=keras.regularizers.L2(0.5))])
    model.compile(keras.optimizers.SGD(0.1))
    kernel = model.get_weights()[0]
    [loss] = fit(model, y=None, batch_size=40)["loss"]
    np.testing.assert_allclose(loss, 0.5 * np.sum(kernel**2), rtol=1e-5)
    np.testing.assert_allclose(model.get_weights()[0], kernel - 0.1 * kernel, rtol=1e-5)


class Reporting(hl.Model):
    """Reports the mean of the targets in every way there is."""

    def __init__(self):
        super().__init__()
        self.tracker = keras.metrics.Mean(name="tracked")
        self.largest = Largest(name="largest")

    def train_step(self, data):
        _, y = data
        mean = ops.mean(y)
        self.tracker.update_state(y)
        self.largest.update_state(y)
        return {"scalar": mean, "metric": self.tracker, "result": self.tracker.result(), "largest": self.largest,
                "nested": {"inside": mean + 1}, "number": 2}  # fmt: skip

    test_step = train_step


class Largest(keras.metrics.Metric):
    """No mean: an average over batches would show."""

    def __init__(self, **options):
        super().__init__(**options)
        self.value = self.add_variable((), keras.initializers.Constant(-1e9), name="value")

    def update_state(self, values):
        self.value.assign(ops.maximum(self.value, ops.max(values)))

    def result(self):
        return self.value.value

    def reset_state(self):
        self.value.assign(-1e9)


def test_what_a_step_returns_is_reported_under_its_name(eagerly):
    ys = Y[:30] + np.arange(30, dtype="float32")[:, None]
    model = Reporting()
    for logs in (fit(model, X[:30], ys, epochs=2), model.evaluate(X[:30], ys, 20, verbose=0, return_dict=True)):
        last = {name: np.ravel(value)[-1] for name, value in logs.items()}
        assert set(last) == {"scalar", "metric", "result", "largest", "inside", "number"}
        for name in ("scalar", "metric", "result"):
            np.testing.assert_allclose(last[name], ys.mean(), rtol=1e-5)
        np.testing.assert_allclose(last["inside"], ys.mean() + 1, rtol=1e-5)
        np.testing.assert_allclose([last["largest"], last["number"]], [ys.max(), 2], rtol=1e-6)


def test_own_trackers_start_anew_each_epoch_without_a_word():
    model = Reporting()
    assert [metric.name for metric in model.metrics] == ["tracked", "largest"]
    rising = np.arange(40, dtype="float32")[:, None]

    class Falling(keras.utils.PyDataset):
        """Smaller targets in each epoch: a largest one that is kept would show."""

        epoch = 0

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return X[:20], rising[20 * index :][:20] - 100 * self.epoch

        def on_epoch_end(self):
            self.epoch += 1

    history = model.fit(Falling(workers=1), epochs=3, shuffle=False, verbose=0).history
    np.testing.assert_allclose(history["largest"], [39, -61, -161])
    np.testing.assert_allclose(history["metric"], [19.5, -80.5, -180.5], rtol=1e-6)


def test_metrics_by_name_of_all_that_the_model_has():
    class ByName(Reporting):
        def train_step(self, data):
            super().train_step(data)
            return {metric.name: metric.result() for metric in self.metrics}

    history = fit(ByName(), batch_size=25, epochs=2)
    np.testing.assert_allclose(history["tracked"], [Y.mean()] * 2, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(history["largest"], [Y.max()] * 2, rtol=1e-6)


def test_an_own_step_may_build_on_the_default_one():
    class Doubled(hl.Model):
        def train_step(self, data):
            logs = super().train_step(data)
            return logs | {"double": 2 * logs["loss"]}

        def test_step(self, data):
            logs = super().test_step(data)
            return {"error": logs["loss"]}

    model = mlp(Doubled)
    model.compile("sgd", "mse", metrics=["mae"])
    history = fit(model, batch_size=25, validation_data=(X, Y))
    assert set(history) == {"loss", "mae", "double", "val_error"}
    np.testing.assert_allclose(history["double"], 2 * np.array(history["loss"]), rtol=1e-6)
    np.testing.assert_allclose(history["val_error"][0], np.mean((model.predict(X, verbose=0) - Y) ** 2), rtol=1e-5)


def test_own_test_and_predict_steps():
    class Own(hl.Model):
        def test_step(self, data):
            x, y = data
            return {"largest_error": ops.max(ops.abs(self(x) - y))}

        def predict_step(self, data):
            return {"negative": -self(data), "shape": ops.shape(data)[0] * ops.ones((len(data),))}

    model = mlp(Own)
    error = np.abs(ops.convert_to_numpy(model(X)) - Y)
    expected = np.average([error[:30].max(), error[30:].max()], weights=[30, 10])
    np.testing.assert_allclose(model.evaluate(X, Y, batch_size=30, verbose=0), expected, rtol=1e-5)
    predicted = model.predict(X, batch_size=30, verbose=0)
    np.testing.assert_allclose(predicted["negative"], -ops.convert_to_numpy(model(X)), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(predicted["shape"], [30.0] * 30 + [10.0] * 10)


def test_a_step_gets_just_the_data_that_was_given():
    seen = []

    class Seeing(hl.Model):
        def train_step(self, data):
            seen.append(data)
            return {"one": 1}

    with hl.run_eagerly(True):
        model = Seeing()
        for parts in [(X,), (X, Y), (X, Y, WEIGHTS), ({"a": X, "b": Y},), ([X, Y],), ([X, Y], Y)]:
            model.fit(*parts[:2], sample_weight=parts[2] if len(parts) == 3 else None, batch_size=40, verbose=0)
    assert [keras.tree.map_structure(lambda leaf: tuple(leaf.shape), data) for data in seen] == [
        (40, 3),
        ((40, 3), (40, 1)),
        ((40, 3), (40, 1), (40,)),
        {"a": (40, 3), "b": (40, 1)},
        ([(40, 3), (40, 1)],),
        ([(40, 3), (40, 1)], (40, 1)),
    ]


class GAN(hl.Model):
    """A constructor and a `compile` of its own, and two updates in a step."""

    def __init__(self, discriminator, generator):
        super().__init__()
        self.discriminator, self.generator = discriminator, generator

    def compile(self, d_optimizer, g_optimizer):
        super().compile()
        self.d_optimizer, self.g_optimizer = d_optimizer, g_optimizer

    def train_step(self, data):
        real, noise = data

        def d_loss():
            return ops.mean(self.discriminator(self.generator(noise))) - ops.mean(self.discriminator(real))

        def g_loss():
            return -ops.mean(self.discriminator(self.generator(noise)))

        return {
            "d_loss": self.minimize(d_loss, wrt=self.discriminator, optimizer=self.d_optimizer),
            "g_loss": self.minimize(g_loss, wrt=self.generator, optimizer=self.g_optimizer),
        }


def test_a_gan_with_its_own_constructor_and_compile_moves_each_network_by_its_own_optimizer():
    gan = GAN(
        discriminator=keras.Sequential([dense(4, activation="tanh"), dense()]),
        generator=keras.Sequential([dense(4, activation="tanh"), dense(3)]),
    )
    optimizers = {"discriminator": keras.optimizers.SGD(0.1), "generator": keras.optimizers.SGD(0.1)}
    gan.compile(*optimizers.values())
    noise = RNG.normal(size=(40, 2)).astype("float32")
    history = fit(gan, X, noise, epochs=2)
    assert set(history) == {"d_loss", "g_loss"}
    assert all(math.isfinite(value) for values in history.values() for value in values)
    assert [int(optimizer.iterations) for optimizer in optimizers.values()] == [4, 4]
    for standing, moving in [("discriminator", "generator"), ("generator", "discriminator")]:
        optimizers[standing].learning_rate, optimizers[moving].learning_rate = 0.0, 0.1
        before = {name: getattr(gan, name).get_weights() for name in optimizers}
        fit(gan, X, noise)
        assert same(before[standing], getattr(gan, standing).get_weights())
        assert not same(before[moving], getattr(gan, moving).get_weights())


@pytest.mark.backend("tensorflow")
def test_a_step_in_the_manner_of_tensorflow_runs_there(eagerly):
    import tensorflow as tf  # noqa: PLC0415

    class Taped(hl.Model):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                y_pred = self(x, training=True)
                loss = self.compute_loss(y=y, y_pred=y_pred)
            self.optimizer.apply_gradients(
                zip(tape.gradient(loss, self.trainable_variables), self.trainable_variables, strict=True)
            )
            return self.compute_metrics(x, y, y_pred) | {"loss": loss}

    assert_steps_as_the_default_one(Taped)


@pytest.mark.backend("torch")
def test_a_step_in_the_manner_of_torch_runs_there(eagerly):
    import torch  # noqa: PLC0415

    class Backward(hl.Model):
        def train_step(self, data):
            x, y = data
            self.zero_grad()
            y_pred = self(x, training=True)
            loss = self.compute_loss(y=y, y_pred=y_pred)
            loss.backward()
            with torch.no_grad():
                self.optimizer.apply([variable.value.grad for variable in self.trainable_variables])
            return self.compute_metrics(x, y, y_pred) | {"loss": loss}

    assert_steps_as_the_default_one(Backward)


def assert_steps_as_the_default_one(cls):
    default, own = mlp(), mlp(cls)
    own.set_weights(default.get_weights())
    histories = []
    for model in (default, own):
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
        model.optimizer.build(model.trainable_variables)
        histories.append(fit(model, epochs=3)["loss"])
    np.testing.assert_allclose(*histories, rtol=1e-5)
    for one, other in zip(default.get_weights(), own.get_weights(), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------- minimize


def test_minimize_trains_the_whole_model_unless_told_what():
    class Partly(hl.Model):
        part = None

        def train_step(self, data):
            x, y = data
            part = self.get_layer(self.part) if self.part else None
            return {"loss": self.minimize(lambda: ops.mean((self(x) - y) ** 2), wrt=part)}

    for part, moved in [(None, [True, True]), ("hidden", [True, False])]:
        model = mlp(Partly)
        model.part = part
        model.compile(keras.optimizers.SGD(0.1))
        before = model.get_weights()
        fit(model)
        now = [not np.array_equal(before[index], model.get_weights()[index]) for index in (0, 2)]
        assert now == moved


def test_parts_trained_in_turn_share_the_compiled_optimizer():
    """Keras's optimizer, built for the first part, would refuse the second."""

    class InTurn(hl.Model):
        def train_step(self, data):
            x, y = data
            loss = functools.partial(lambda: ops.mean((self(x) - y) ** 2))
            return {layer.name: self.minimize(loss, wrt=layer) for layer in self.layers if layer.weights}

    model = mlp(InTurn)
    model.compile("adam")
    before = model.get_weights()
    fit(model)
    assert not any(np.array_equal(one, other) for one, other in zip(before, model.get_weights(), strict=True))
    assert len(model.optimizer.variables) == 2 + 2 * 4


def test_minimize_without_an_optimizer_says_how_to_give_one():
    class Uncompiled(hl.Model):
        def train_step(self, data):
            return {"loss": self.minimize(lambda: ops.mean(self(data)))}

    with pytest.raises(OptimizerError, match=r"Uncompiled has no optimizer\. Compile it with one.* minimize\("):
        fit(mlp(Uncompiled), y=None)


def test_minimize_outside_of_fit_is_one_update_now():
    model = hl.Model([keras.Input((3,)), dense(use_bias=False)])
    model.compile(keras.optimizers.SGD(0.1))
    kernel = model.get_weights()[0]
    loss = model.minimize(lambda: ops.sum(model.trainable_variables[0] ** 2))
    np.testing.assert_allclose(float(loss), np.sum(kernel**2), rtol=1e-5)
    np.testing.assert_allclose(model.get_weights()[0], 0.8 * kernel, rtol=1e-5)


# ---------------------------------------------------------- optimizers by name


class TwoParts(hl.Model):
    def __init__(self, built=True):
        super().__init__()
        self.body = keras.Sequential([dense(4, name="lower"), dense(4, name="upper")], name="body")
        self.heads = [dense(name="head")]
        self.scale = self.add_weight(initializer="ones", name="scale")
        if built:
            self(X)

    def call(self, x):
        return self.scale * self.heads[0](self.body(x))


def gradients_by_hand(model):
    return hl.grad(lambda: ops.mean(ops.square(model(X) - ops.convert_to_tensor(Y))), wrt=model)()


@pytest.mark.parametrize("built", [True, False], ids=["built", "built by the first fit"])
def test_in_the_default_step_every_optimizer_steps_on_its_own_variables(built):
    model = TwoParts(built)
    rates = {"body": 0.1, "heads": 0.2, "scale": 0.05}
    model.compile({name: keras.optimizers.SGD(rate) for name, rate in rates.items()}, "mse")
    if not built:
        fit(model)
    names = {id(variable): name for name in rates for variable in part_variables(model, name)}
    before, grads = arrays(model.trainable_variables), arrays(gradients_by_hand(model))
    fit(model, batch_size=40)
    for variable, old, gradient in zip(model.trainable_variables, before, grads, strict=True):
        expected = old - rates[names[id(variable)]] * gradient
        np.testing.assert_allclose(ops.convert_to_numpy(variable), expected, rtol=1e-4, atol=1e-6)


def part_variables(model, name):
    part = getattr(model, name)
    return [part] if name == "scale" else keras.tree.flatten([layer.variables for layer in keras.tree.flatten(part)])


def test_a_star_owns_the_rest_and_a_dotted_path_a_part_of_a_part():
    model = TwoParts()
    model.body.lower = model.body.layers[0]
    still = keras.optimizers.SGD(0.0)
    model.compile({"body.lower": keras.optimizers.SGD(0.1), "*": still}, "mse")
    before = arrays(model.trainable_variables)
    fit(model)
    moved = {
        variable.path
        for variable, old in zip(model.trainable_variables, before, strict=True)
        if not np.array_equal(old, ops.convert_to_numpy(variable))
    }
    assert moved == {variable.path for variable in model.body.layers[0].trainable_variables}
    assert int(still.iterations) == int(model.optimizer["body.lower"].iterations) == 2


def test_a_named_optimizer_is_found_by_what_is_trained():
    class Own(TwoParts):
        def train_step(self, data):
            x, y = data

            def loss():
                return ops.mean((self(x) - y) ** 2)

            return {
                "body": self.minimize(loss, wrt=self.body),
                "rest": self.minimize(loss, wrt=[self.heads, self.scale]),
            }

    model = Own()
    model.compile({"body": "adam", "*": keras.optimizers.SGD(0.1)})
    history = fit(model)
    assert history["rest"][0] < history["body"][0]
    assert isinstance(model.optimizer["body"], keras.optimizers.Adam)
    assert [int(optimizer.iterations) for _, optimizer in model.optimizer.items()] == [2, 2]


def test_a_named_optimizers_learning_rate_takes_effect_at_once():
    model = TwoParts()
    model.compile({"body": keras.optimizers.SGD(0.1), "*": keras.optimizers.SGD(0.1)}, "mse")
    fit(model)
    model.optimizer["body"].learning_rate = 0.0
    body, head = model.body.get_weights(), model.heads[0].get_weights()
    fit(model)
    assert same(body, model.body.get_weights())
    assert not same(head, model.heads[0].get_weights())


@pytest.mark.once
@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            {"body"},
            r"No optimizer owns 'two_parts/scale', 'two_parts/head/kernel', .*; the optimizers are 'body'\. Add one",
        ),
        ({"body", "tail"}, r"optimizer for 'tail', but TwoParts has no such attribute"),
        ({"body.missing", "*"}, r"optimizer for 'body\.missing', .*'missing' is missing on Sequential"),
        ({"name", "*"}, r"optimizer for 'name', but what TwoParts has there is no layer or variable: 'two_parts'"),
    ],
)
def test_names_that_do_not_fit_the_model_are_refused_by_compile(names, words):
    model = TwoParts()
    with pytest.raises(OptimizerError, match=words):
        model.compile(dict.fromkeys(sorted(names), "sgd"), "mse")


@pytest.mark.once
def test_a_variable_owned_twice_is_refused_by_compile_with_both_names():
    model = TwoParts()
    model.body.upper = model.body.layers[1]
    with pytest.raises(
        OptimizerError, match=r"body/upper/kernel' is owned twice, by the optimizers 'body' and 'body\.u"
    ):
        model.compile({"body": "sgd", "body.upper": "sgd", "*": "sgd"}, "mse")


def test_a_model_built_by_its_first_fit_is_checked_there():
    model = TwoParts(built=False)
    model.compile({"body": "sgd"}, "mse")
    with pytest.raises(OptimizerError, match="No optimizer owns"):
        fit(model)
    model.compile({"body": "sgd", "*": "sgd"}, "mse")
    fit(model)


def test_what_is_frozen_needs_no_optimizer():
    model = TwoParts()
    model.heads[0].trainable = False
    model.compile({"body": "sgd", "scale": "sgd"}, "mse")
    head = model.heads[0].get_weights()
    fit(model)
    assert same(head, model.heads[0].get_weights())


@pytest.mark.once
def test_no_optimizer_at_all_and_one_that_is_none_are_refused():
    with pytest.raises(OptimizerError, match="No optimizer was given"):
        TwoParts().compile({}, "mse")
    with pytest.raises(OptimizerError, match=r"optimizer=\{'body': 'nosuch'\}: Could not interpret"):
        TwoParts().compile({"body": "nosuch"}, "mse")


@pytest.mark.once
def test_named_optimizers_are_a_mapping_and_say_what_they_are_not():
    model = TwoParts()
    model.compile({"body": "sgd", "*": "adam"}, "mse")
    assert list(model.optimizer) == ["body", "*"]
    assert len(model.optimizer) == 2
    with pytest.raises(KeyError, match=r"no optimizer named 'head'; there are 'body', '\*'"):
        model.optimizer["head"]
    with pytest.raises(AttributeError, match=r'no one learning rate; use optimizer\["body"\]\.learning_rate'):
        model.optimizer.learning_rate  # noqa: B018


def test_an_optimizer_that_owns_nothing_trained_here_is_an_error():
    class Stranger(TwoParts):
        def train_step(self, data):
            return {"loss": self.minimize(lambda: ops.sum(STRANGE.value**2), wrt=STRANGE)}

    STRANGE = keras.Variable(1.0, name="strange")
    model = Stranger()
    model.compile({"*": "sgd"})
    with pytest.raises(OptimizerError, match=r"No optimizer of the model owns '.*strange': not among the model's"):
        fit(model)


# -------------------------------------------------------------------- compile


def test_a_serialized_optimizer_is_one_optimizer():
    model = mlp()
    model.compile(keras.optimizers.serialize(keras.optimizers.SGD(0.25)), "mse")
    assert isinstance(model.optimizer, keras.optimizers.SGD)
    np.testing.assert_allclose(float(model.optimizer.learning_rate), 0.25)


def test_without_an_optimizer_a_model_evaluates_but_does_not_fit():
    model = mlp()
    model.compile(optimizer=None, loss="mse", metrics=["mae"])
    error = model.predict(X, verbose=0) - Y
    np.testing.assert_allclose(model.evaluate(X, Y, verbose=0), [np.mean(error**2), np.abs(error).mean()], rtol=1e-5)
    with pytest.raises(OptimizerError, match=r"Functional has no optimizer|Model has no optimizer"):
        fit(model)


@pytest.mark.once
@pytest.mark.parametrize("method", ["fit", "evaluate", "train_on_batch", "test_on_batch"])
def test_the_default_steps_ask_for_compile(method):
    with pytest.raises(StepError, match=rf"Call compile\(\) before {method}\(\): Model uses the default"):
        getattr(mlp(), method)(X, Y)


def test_predict_and_own_steps_need_no_compile():
    class Own(hl.Model):
        def train_step(self, data):
            return {"mean": ops.mean(data)}

        test_step = train_step

    model = mlp(Own)
    assert model.predict(X, verbose=0).shape == (40, 1)
    np.testing.assert_allclose(fit(model, y=None)["mean"], [X.mean()], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(model.evaluate(X, verbose=0), X.mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.once
@pytest.mark.parametrize("wrong", [{"loss": "nosuch"}, {"metrics": ["nosuch"]}])
def test_names_that_keras_does_not_know_are_its_own_errors(wrong):
    model = mlp()
    model.compile(**({"optimizer": "sgd", "loss": "mse"} | wrong))
    with pytest.raises(ValueError, match=r"Could not interpret .* nosuch"):
        fit(model)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_dtype_policies_train_to_much_the_same(policy):
    usual = mlp()
    keras.config.set_dtype_policy(policy)
    model = mlp()
    model.set_weights(usual.get_weights())
    for each in (usual, model):
        each.compile(keras.optimizers.SGD(0.1), "mse")
    expected, losses = (fit(each, y=SMALL, epochs=5)["loss"] for each in (usual, model))
    np.testing.assert_allclose(losses, expected, rtol=0.05)
    assert losses[-1] < 0.5 * losses[0]
    assert model.compute_dtype == policy.removeprefix("mixed_")


def test_under_mixed_float16_every_optimizer_scales_its_loss():
    keras.config.set_dtype_policy("mixed_float16")
    model = TwoParts()
    model.compile({"body": "sgd", "*": keras.optimizers.SGD(0.1)}, "mse")
    assert all(isinstance(inner, keras.optimizers.LossScaleOptimizer) for _, inner in model.optimizer.items())
    losses = fit(model, epochs=3)["loss"]
    assert losses[-1] < losses[0]
    model.compile("sgd", "mse", auto_scale_loss=False)
    assert isinstance(model.optimizer, keras.optimizers.SGD)


def test_a_step_that_forgets_to_scale_learns_under_mixed_float16():
    """With Keras its updates are divided by 2**15."""

    class Forgetful(hl.Model):
        def train_step(self, data):
            x, y = data
            loss, gradients = hl.value_and_grad(lambda: ops.mean(ops.subtract(self(x), y) ** 2), wrt=self)()
            self.optimizer.apply(gradients, self.trainable_variables)
            return {"loss": loss}

    usual = mlp()
    keras.config.set_dtype_policy("mixed_float16")
    model = mlp(Forgetful)
    model.set_weights(usual.get_weights())
    losses = []
    for each in (usual, model):
        each.compile(keras.optimizers.SGD(0.1), "mse")
        each.optimizer.build(each.trainable_variables)
        losses.append(fit(each, y=SMALL, epochs=5)["loss"])
    np.testing.assert_allclose(*losses, rtol=0.05)


def test_statistics_and_seeds_change_once_a_step():
    inputs = keras.Input((3,))
    normalization = layers.BatchNormalization(momentum=0.5)
    dropout = layers.Dropout(0.5, seed=1)
    model = hl.Model(inputs, dense()(dropout(normalization(inputs))))
    model.compile("sgd", "mse")
    seed = ops.convert_to_numpy(dropout.seed_generator.state)
    mean = np.zeros(3)
    for batch in (X[:20], X[20:]):
        mean = 0.5 * mean + 0.5 * batch.mean(axis=0)
    fit(model)
    np.testing.assert_allclose(normalization.get_weights()[2], mean, rtol=1e-4, atol=1e-6)
    moved = ops.convert_to_numpy(dropout.seed_generator.state) - seed
    model.evaluate(X, Y, batch_size=20, verbose=0)
    np.testing.assert_allclose(normalization.get_weights()[2], mean, rtol=1e-4, atol=1e-6)
    assert moved.any()
    np.testing.assert_array_equal(ops.convert_to_numpy(dropout.seed_generator.state) - seed, moved)


# ----------------------------------------------------------------------- runs


def test_steps_in_one_execution_change_no_number():
    histories = []
    for steps in (1, 4):
        keras.utils.set_random_seed(0)
        model = mlp()
        model.compile(keras.optimizers.SGD(0.1), "mse", metrics=["mae"], steps_per_execution=steps)
        histories.append(fit(model))
    assert histories[0] == histories[1]


def test_evaluate_and_predict_take_a_number_of_steps():
    class Count(hl.Model):
        def test_step(self, data):
            return {"mean": ops.mean(data)}

        def predict_step(self, data):
            return data

    numbers = np.arange(40, dtype="float32")[:, None]
    model = Count()
    assert model.evaluate(numbers, batch_size=10, steps=2, verbose=0) == 9.5
    np.testing.assert_array_equal(model.predict(numbers, batch_size=15, verbose=0), numbers)
    np.testing.assert_array_equal(model.predict(numbers, batch_size=15, steps=2, verbose=0), numbers[:30])
    with pytest.warns(HandloomWarning, match="ran out after 4 of 7 steps"):
        assert model.evaluate(numbers, batch_size=10, steps=7, verbose=0) == 19.5
    with pytest.warns(HandloomWarning, match="ran out after 3 of 4 steps"):
        np.testing.assert_array_equal(model.predict(numbers, batch_size=15, steps=4, verbose=0), numbers)


def test_a_run_directory_holds_the_log(tmp_path):
    model = mlp()
    model.compile("sgd", "mse")
    fit(model, epochs=2, run_dir=tmp_path / "run")
    assert len(epochs_in(tmp_path / "run")) == 2
