"""Weights of a model that is never called itself, such as a GAN: saved and loaded as those of any other model."""

import keras
import pytest
from keras import layers, ops

import handloom as hl
from handloom.errors import SavedModelError
from tests.numbers import normal, same, same_values

X = normal(8, 3)


class GAN(hl.Model):
    def __init__(self):
        super().__init__()
        self.generator, self.discriminator = keras.Sequential([layers.Dense(3)]), layers.Dense(1)

    def train_step(self, data):
        loss = self.minimize(lambda: ops.mean(self.discriminator(self.generator(data)) ** 2))
        return {"loss": loss}


def gan():
    model = GAN()
    model.compile("sgd")
    return model


def trained(**options):
    model = gan()
    model.fit(X, batch_size=4, epochs=2, verbose=0, **options)
    return model


def built():
    model = gan()
    model.discriminator(model.generator(X))
    return model


@pytest.mark.parametrize("eager", [False, True])
def test_fit_marks_a_model_that_is_never_called_as_built(eager):
    with hl.run_eagerly(eager):
        assert trained().built


def test_train_on_batch_marks_a_model_that_is_never_called_as_built():
    model = gan()
    model.train_on_batch(X)
    assert model.built


def test_save_weights_and_load_weights_of_a_model_that_is_never_called(tmp_path):
    model, path = trained(), tmp_path / "gan.weights.h5"
    model.save_weights(path)
    for other in (trained(), built()):
        other.load_weights(path)
        same_values([model.generator, model.discriminator], [other.generator, other.discriminator])


@pytest.mark.parametrize("save_freq", ["epoch", 1])
def test_model_checkpoint_saves_the_weights_of_a_model_that_is_never_called(tmp_path, save_freq):
    path = tmp_path / "gan.weights.h5"
    saving = keras.callbacks.ModelCheckpoint(path, save_weights_only=True, save_freq=save_freq)
    model, other = trained(callbacks=[saving]), built()
    other.load_weights(path)
    same_values([model.generator, model.discriminator], [other.generator, other.discriminator])


def test_model_checkpoint_in_hl_fit_saves_the_weights_of_a_keras_model_that_is_never_called(tmp_path):
    class Plain(keras.Model):
        def __init__(self):
            super().__init__()
            self.head = layers.Dense(1)

    model, optimizer, path = Plain(), keras.optimizers.SGD(0.1), tmp_path / "plain.weights.h5"

    def step(x):
        return {"loss": hl.minimize(lambda: ops.mean(model.head(x) ** 2), model.head, optimizer)}

    saving = keras.callbacks.ModelCheckpoint(path, save_weights_only=True)
    state = {"model": model, "optimizer": optimizer}
    hl.fit(step, hl.Feed(X, batch_size=4), state=state, callbacks=[saving], verbose=0)
    assert model.built
    other = Plain()
    other.head(X)
    other.built = True
    other.load_weights(path)
    same(other.head.kernel, model.head.kernel)


@pytest.mark.parametrize("method", ["save_weights", "load_weights"])
def test_load_weights_and_save_weights_of_a_model_that_is_not_built_say_what_to_call(tmp_path, method):
    model = gan()
    model.discriminator(X)
    with pytest.raises(SavedModelError, match=r"GAN is not built: it lacks the weights of sequential.*Call the.*HL604"):
        getattr(model, method)(tmp_path / "gan.weights.h5")


def test_save_weights_leaves_a_model_with_its_own_build_to_it(tmp_path):
    class Built(hl.Model):
        def build(self, shape):
            self.scale = self.add_weight(shape=(), initializer="ones")

        def call(self, x):
            return self.scale * x

    model = Built()
    with pytest.raises(SavedModelError, match="HL604"):
        model.save_weights(tmp_path / "own.weights.h5")
    model(X)
    model.save_weights(tmp_path / "own.weights.h5")
