"""Row A17: the architecture changes during training, and the run goes on, also when it is stopped."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.checkpoint.names import named
from handloom.optimizers import add_variables
from tests.resume.runs import bits
from tests.resume.stopped import StopAt, Stopped
from tests.rows.real_data import diabetes

X, Y = diabetes()
BATCH, EPOCHS, STEPS = 64, 2, 14  # Seven steps an epoch.


def dense(units, activation, seed):
    return layers.Dense(units, activation, kernel_initializer=keras.initializers.GlorotUniform(seed))


class Growing:
    """A network made anew, of the layers there are, whenever it changes; and what trains it."""

    def __init__(self):
        self.first, self.head = dense(8, "tanh", seed=0), dense(1, None, seed=1)
        self.blocks = [dense(8, "tanh", seed=2)]
        self.optimizer = None

    def model(self):
        inputs = keras.Input((10,))
        z = self.first(inputs)
        for block in self.blocks:
            z = layers.Add()([z, block(z)])
        return hl.Model(inputs, self.head(z))


def with_its_first_layer_frozen(growing):
    growing.first.trainable = False
    growing.optimizer = keras.optimizers.SGD(0.02, momentum=0.9)


def thawed_and_deeper(growing):
    growing.first.trainable = True
    growing.blocks.append(dense(8, "tanh", seed=3))


def with_another_optimizer(growing):
    growing.optimizer = keras.optimizers.Adam(0.01)


STAGES = [with_its_first_layer_frozen, thawed_and_deeper, with_another_optimizer]


def by_fit(run_dir, stop=0):
    """One `fit` after the other; stopped in the second after some steps."""
    growing, losses = Growing(), []
    for change in STAGES:
        change(growing)
        model = growing.model()
        model.compile(growing.optimizer, loss="mse")
        options = {"batch_size": BATCH, "epochs": EPOCHS, "shuffle": False, "verbose": 0}
        stopping = [StopAt(stop)] if change is thawed_and_deeper else []
        saves = {"run_dir": run_dir / change.__name__, "save": hl.every(steps=3)}
        losses += model.fit(X, Y, callbacks=stopping, **options, **saves).history["loss"]
    return losses, model, growing.optimizer


def by_hand(run_dir, stop=0):
    """The same in loops by hand."""
    growing, losses = Growing(), []
    for change in STAGES:
        change(growing)
        model, optimizer = growing.model(), growing.optimizer
        add_variables(optimizer, model)
        optimizer.build(model.trainable_variables)
        losses += train_by_hand(model, optimizer, run_dir / change.__name__, stop if change is thawed_and_deeper else 0)
    return losses, model, optimizer


def loss_of(model, x, y):
    return ops.mean(ops.square(ops.subtract(model(x), y)))


def train_by_hand(model, optimizer, folder, stop):
    mean, feed = keras.metrics.Mean(), hl.Feed((X, Y), batch_size=BATCH)

    @hl.function
    def step(x, y):
        loss = hl.minimize(lambda: loss_of(model, x, y), model, optimizer)
        mean.update_state(loss, sample_weight=len(y))
        return mean.result()

    state, losses = {"model": model, "optimizer": optimizer, "feed": feed, "mean": mean}, []
    with hl.Checkpointer(folder, state) as checkpointer:
        taken = checkpointer.restore() or 0
        while taken < STEPS:
            for taken, batch in enumerate(feed, start=taken + 1):  # noqa: B020
                loss = step(*batch)
                if taken % 3 == 0 or taken == STEPS:
                    checkpointer.save(taken)
                if taken == stop:
                    raise Stopped
            losses.append(float(loss))
            mean.reset_state()
    return losses


ways = pytest.mark.parametrize("run", [by_fit, by_hand])


# May take over 10 s: two runs of three stages, and each stage is compiled anew.
@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Each run, never stopped."""
    return {run: run(tmp_path_factory.mktemp(run.__name__)) for run in (by_fit, by_hand)}


def test_a17_training_goes_on_by_fit_as_by_hand(whole, shown):
    (losses, model, _), (by_hands, same, _) = whole[by_fit], whole[by_hand]
    assert len(losses) == len(STAGES) * EPOCHS
    np.testing.assert_allclose(losses, by_hands, rtol=1e-4)
    assert (np.diff(np.reshape(losses, (len(STAGES), EPOCHS))) < 0).all()
    for one, other in zip(model.get_weights(), same.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)
    shown(f"loss from {losses[0]:.3f} to {losses[-1]:.3f} over {len(STAGES)} stages, by fit as by hand")


def taking_a_step(model, optimizer):
    return hl.function(lambda x, y: hl.minimize(lambda: loss_of(model, x, y), model, optimizer))


def slots(optimizer):
    return {variable.path: ops.convert_to_numpy(variable.value) for variable in optimizer.variables}


def test_a17_old_slots_are_kept_and_new_ones_are_made(shown):
    """As the NumPy of momentum has it: what was known goes on with its velocity, what is new begins at rest."""
    growing = Growing()
    with_its_first_layer_frozen(growing)
    model, optimizer = growing.model(), growing.optimizer
    taking_a_step(model, optimizer)(X, Y)
    before = slots(optimizer)
    thawed_and_deeper(growing)
    model = growing.model()
    add_variables(optimizer, model)
    after = slots(optimizer)
    assert len(after) == len(before) + 4  # Kernel and bias of the first layer and of the new block.
    for path, value in after.items():
        np.testing.assert_array_equal(value, before.get(path, np.zeros_like(value)), err_msg=path)

    velocities = [ops.convert_to_numpy(velocity) for velocity in optimizer.momentums]
    weights, gradients = model.get_weights(), hl.grad(lambda: loss_of(model, X, Y), wrt=model)()
    taking_a_step(model, optimizer)(X, Y)
    for found, weight, velocity, gradient in zip(model.get_weights(), weights, velocities, gradients, strict=True):
        expected = weight + 0.9 * velocity - 0.02 * ops.convert_to_numpy(gradient)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    shown(f"{len(before)} slots kept to the bit, {len(after) - len(before)} new ones")


@ways
@pytest.mark.parametrize("stop", [2, 11], ids=["before its first save", "within its second epoch"])
def test_a17_a_run_that_is_stopped_after_the_change_resumes_exactly(run, stop, whole, tmp_path, shown):
    with pytest.raises(Stopped):
        run(tmp_path, stop)
    _, model, optimizer = run(tmp_path)
    _, *expected = whole[run]
    found, right = (
        {name: bits(variable.value) for name, variable in named({"model": net, "optimizer": of})[0].items()}
        for net, of in ((model, optimizer), expected)
    )
    assert found == right
    shown("resumed to the bit after the change")
