"""`Model.explain`: its tables and its result."""

import keras
from keras import layers

import handloom as hl
from handloom.optimizers import GradientAccumulation, GradientTransforms, WeightAveraging
from tests.models import compiled, fit, sequential
from tests.numbers import ones


class Parts(hl.Model):
    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = layers.Dense(3), layers.BatchNormalization(), layers.Dense(1)

    def call(self, x, training=False):
        return self.head(self.norm(self.body(x), training=training))


def test_explain_lists_the_variables_and_the_progress_of_each_optimizer(capsys):
    scale_and_shift = (lambda path: path.endswith(("gamma", "beta")), keras.optimizers.SGD(0.25))
    body = GradientAccumulation(keras.optimizers.Adam(0.5), 2)
    model = compiled(Parts(), {"body": body, "norms": scale_and_shift, "*": "sgd"})
    fit(model, ones(8, 4), ones(8, 1), batch_size=2)
    body, norms, rest = model.explain().owners
    assert (body.name, body.optimizer) == ("body", "GradientAccumulation > Adam")
    assert (body.learning_rate, body.updates, body.parameters) == (0.5, 2, 4 * 3 + 3)
    assert (norms.learning_rate, norms.updates, norms.parameters) == (0.25, 4, 6)
    assert [path.split("/")[-1] for path in norms.variables] == ["gamma", "beta"]
    assert rest.parameters == 4
    assert "Optimizers" in capsys.readouterr().out


def test_explain_shows_one_optimizer_as_owner_of_all_that_is_not_frozen(capsys):
    model = compiled(Parts(), "sgd", keras.losses.MeanSquaredError(reduction="sum"))
    model(ones(1, 4))
    model.head.trainable = False
    explanation = model.explain()
    [owner] = explanation.owners
    assert (owner.name, owner.parameters) == ("*", 15 + 6)
    assert {path.split("/")[-1] for path in explanation.frozen} == {"moving_mean", "moving_variance", "kernel", "bias"}
    assert any("larger batches make larger steps" in note for note in explanation.notes)


def test_explain_shows_wrappers_around_all_optimizers_with_each():
    model = compiled(sequential(), GradientTransforms({"*": WeightAveraging("adam")}, []))
    assert model.explain().owners[0].optimizer == "GradientTransforms > WeightAveraging > Adam"


class GAN(Parts):
    """Its own `compile` takes two optimizers, as the GAN of Keras's guide."""

    def compile(self, body_optimizer, head_optimizer):
        super().compile()
        self.body_optimizer, self.head_optimizer = body_optimizer, head_optimizer

    def train_step(self, data):
        x, y = data

        def loss():
            return keras.ops.mean((self(x, training=True) - y) ** 2)

        hl.minimize(loss, self.body, self.body_optimizer)
        return {"loss": hl.minimize(loss, self.head, self.head_optimizer)}


def test_explain_lists_the_optimizers_of_a_model_with_its_own_compile():
    model = GAN()
    model.compile(WeightAveraging(keras.optimizers.Adam(0.5)), keras.optimizers.SGD(0.25))
    fit(model, ones(8, 4), ones(8, 1), batch_size=2)
    body, head = model.explain().owners
    assert (body.name, body.optimizer, body.learning_rate) == ("body_optimizer", "WeightAveraging > Adam", 0.5)
    assert (body.updates, body.parameters) == (4, 4 * 3 + 3)
    assert (head.name, head.optimizer, head.updates, head.parameters) == ("head_optimizer", "SGD", 4, 4)


def test_explain_shows_how_compiled_metrics_are_reported():
    model = compiled(sequential(), metrics=[keras.metrics.MeanAbsoluteError(name="mae")])
    fit(model, ones(4, 3), ones(4, 1))
    reported = {"loss": "mean over examples", "mae": "result of MeanAbsoluteError"}
    assert model.explain().reported["train_step"] == reported


def test_explain_shows_names_in_full_in_80_columns_and_nothing_that_does_not_concern_the_model(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    wrapped = {"*": GradientTransforms(GradientAccumulation(WeightAveraging("adam"), 2), [])}
    assert not compiled(sequential(), wrapped).explain().notes
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("GradientTransforms", "GradientAccumulation", "WeightAveraging", "Adam"))
    assert "not trainable" not in shown
    frozen, weighted = layers.Dense(1, trainable=False), ["mae"]
    [note] = compiled(sequential(layers.Dense(2), frozen), weighted_metrics=weighted).explain().notes
    assert note.startswith("The loss is divided by the number of examples, weighted_metrics by the sum")
    assert "because they are not trainable: 2\n" in capsys.readouterr().out
