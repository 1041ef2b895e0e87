"""What `Model.explain` says and returns."""

import keras
import numpy as np
from keras import layers

import handloom as hl
from handloom.optimizers import GradientAccumulation, GradientTransforms, WeightAveraging


class Parts(hl.Model):
    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = layers.Dense(3), layers.BatchNormalization(), layers.Dense(1)

    def call(self, x, training=False):
        return self.head(self.norm(self.body(x), training=training))


def test_it_says_who_trains_what_and_how_far_it_is(capsys):
    model = Parts()
    scale_and_shift = (lambda path: path.endswith(("gamma", "beta")), keras.optimizers.SGD(0.25))
    model.compile(
        {"body": GradientAccumulation(keras.optimizers.Adam(0.5), 2), "norms": scale_and_shift, "*": "sgd"}, "mse"
    )
    model.fit(np.ones((8, 4), "float32"), np.ones((8, 1), "float32"), batch_size=2, verbose=0)
    body, norms, rest = model.explain().owners
    assert (body.name, body.optimizer, body.learning_rate, body.updates) == (
        "body",
        "GradientAccumulation > Adam",
        0.5,
        2,
    )
    assert body.parameters == 4 * 3 + 3
    assert (norms.learning_rate, norms.updates, norms.parameters) == (0.25, 4, 6)
    assert [path.split("/")[-1] for path in norms.variables] == ["gamma", "beta"]
    assert rest.parameters == 4
    assert "Who trains what" in capsys.readouterr().out


def test_one_optimizer_owns_everything_that_is_not_frozen(capsys):
    model = Parts()
    model.compile("sgd", keras.losses.MeanSquaredError(reduction="sum"))
    model(np.ones((1, 4), "float32"))
    model.head.trainable = False
    explanation = model.explain()
    [owner] = explanation.owners
    assert (owner.name, owner.parameters) == ("*", 15 + 6)
    assert {path.split("/")[-1] for path in explanation.frozen} == {"moving_mean", "moving_variance", "kernel", "bias"}
    assert any("larger batches make larger steps" in note for note in explanation.notes)


def test_a_loss_that_differs_from_its_metric_is_explained(capsys):
    model = Parts()
    model.compile("sgd", "mse", weighted_metrics=["mse"])
    model(np.ones((1, 4), "float32"))
    assert any("divided by the number of examples" in note for note in model.explain().notes)


def test_what_is_around_all_optimizers_is_told_with_each():
    model = hl.Sequential([keras.Input((3,)), layers.Dense(2), layers.Dense(1)])
    model.compile(GradientTransforms({"*": WeightAveraging("adam")}, []), loss="mse")
    assert model.explain().owners[0].optimizer == "GradientTransforms > WeightAveraging > Adam"


def test_compiled_metrics_are_told_one_by_one():
    model = hl.Sequential([keras.Input((3,)), layers.Dense(1)])
    model.compile("sgd", loss="mse", metrics=[keras.metrics.MeanAbsoluteError(name="mae")])
    model.fit(np.ones((4, 3)), np.ones((4, 1)), verbose=0)
    assert model.explain().reported["train_step"] == {
        "loss": "mean over examples",
        "mae": "result of MeanAbsoluteError",
    }
