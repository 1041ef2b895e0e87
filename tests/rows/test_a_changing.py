"""Row A17: the architecture changes during training, and the run continues, also after a stop."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.checkpoint.names import named
from handloom.optimizers import add_variables
from tests.numbers import close, each_close, numpy, same
from tests.resume.runs import bits
from tests.resume.stopped import StopAt, Stopped
from tests.rows.real_data import diabetes

X, Y = diabetes()
BATCH, EPOCHS, STEPS = 64, 2, 14  # Seven steps an epoch.


def dense(units, activation, seed):
    return layers.Dense(units, activation, kernel_initializer=keras.initializers.GlorotUniform(seed))


class Growing:
    """A network that is created again from its layers whenever they change; and its optimizer."""

    def __init__(self):
        self.first, self.head = dense(8, "tanh", seed=0), dense(1, None, seed=1)
        self.blocks, self.optimizer = [dense(8, "tanh", seed=2)], None

    def freeze_and_start(self):
        self.first.trainable = False
        self.optimizer = keras.optimizers.SGD(0.02, momentum=0.9)

    def unfreeze_and_deepen(self):
        self.first.trainable = True
        self.blocks.append(dense(8, "tanh", seed=3))

    def swap_optimizer(self):
        self.optimizer = keras.optimizers.Adam(0.01)

    def model(self):
        inputs = keras.Input((10,))
        z = self.first(inputs)
        for block in self.blocks:
            z = layers.Add()([z, block(z)])
        return hl.Model(inputs, self.head(z))


STAGES = [Growing.freeze_and_start, Growing.unfreeze_and_deepen, Growing.swap_optimizer]


def run(train, run_dir, stop=0):
    """Trains in three stages; stops in the second one after `stop` steps."""
    growing, losses = Growing(), []
    for change in STAGES:
        change(growing)
        model = growing.model()
        last_step = stop if change is Growing.unfreeze_and_deepen else 0
        losses += train(model, growing.optimizer, run_dir / change.__name__, last_step)
    return losses, model, growing.optimizer


def by_fit(model, optimizer, run_dir, stop):
    model.compile(optimizer, loss="mse")
    options = {"batch_size": BATCH, "epochs": EPOCHS, "shuffle": False, "verbose": 0, "callbacks": [StopAt(stop)]}
    return model.fit(X, Y, run_dir=run_dir, save=hl.every(steps=3), **options).history["loss"]


def loss_of(model, x, y):
    return ops.mean(ops.square(ops.subtract(model(x), y)))


def by_hand(model, optimizer, run_dir, stop):
    add_variables(optimizer, model)
    optimizer.build(model.trainable_variables)
    mean, feed = keras.metrics.Mean(), hl.Feed((X, Y), batch_size=BATCH)

    @hl.function
    def step(x, y):
        loss = hl.minimize(lambda: loss_of(model, x, y), model, optimizer)
        mean.update_state(loss, sample_weight=len(y))
        return mean.result()

    state, losses = {"model": model, "optimizer": optimizer, "feed": feed, "mean": mean}, []
    with hl.Checkpointer(run_dir, state) as checkpointer:
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


# May take over 10 s: two runs of three stages, each of which is compiled again.
@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Each run without a stop."""
    return {train: run(train, tmp_path_factory.mktemp(train.__name__)) for train in (by_fit, by_hand)}


def test_a17_fit_and_a_loop_by_hand_train_on_through_changes(whole, shown):
    (losses, model, _), (losses_by_hand, other, _) = whole[by_fit], whole[by_hand]
    assert len(losses) == len(STAGES) * EPOCHS
    close(losses, losses_by_hand, rtol=1e-4)
    assert (np.diff(np.reshape(losses, (len(STAGES), EPOCHS))) < 0).all()
    each_close(model.get_weights(), other.get_weights(), rtol=1e-3, atol=1e-5)
    shown(f"loss from {losses[0]:.3f} to {losses[-1]:.3f} over {len(STAGES)} stages, by fit as by hand")


def slots(optimizer):
    return {variable.path: numpy(variable) for variable in optimizer.variables}


def test_a17_add_variables_keeps_old_slots_and_creates_new_ones(shown):
    """Old weights keep their velocity and new ones start at rest, as in the NumPy of momentum."""

    def take_step():
        hl.function(lambda x, y: hl.minimize(lambda: loss_of(model, x, y), model, optimizer))(X, Y)

    growing = Growing()
    growing.freeze_and_start()
    model, optimizer = growing.model(), growing.optimizer
    take_step()
    before = slots(optimizer)
    growing.unfreeze_and_deepen()
    model = growing.model()
    add_variables(optimizer, model)
    after = slots(optimizer)
    assert len(after) == len(before) + 4  # Kernel and bias of the first layer and of the new block.
    for path, value in after.items():
        same(value, before.get(path, np.zeros_like(value)))

    velocities, weights = [numpy(velocity) for velocity in optimizer.momentums], model.get_weights()
    gradients = hl.grad(lambda: loss_of(model, X, Y), wrt=model)()
    take_step()
    of_each = zip(weights, velocities, gradients, strict=True)
    each_close(model.get_weights(), [w + 0.9 * v - 0.02 * numpy(gradient) for w, v, gradient in of_each], rtol=1e-4)
    shown(f"{len(before)} slots bitwise unchanged, {len(after) - len(before)} new ones")


@pytest.mark.parametrize("train", [by_fit, by_hand])
@pytest.mark.parametrize("stop", [2, 11], ids=["before its first save", "within its second epoch"])
def test_a17_fit_and_checkpointer_resume_exactly_after_a_change(train, stop, whole, tmp_path, shown):
    def state_of(model, optimizer):
        variables = named({"model": model, "optimizer": optimizer})[0]
        return {name: bits(variable.value) for name, variable in variables.items()}

    with pytest.raises(Stopped):
        run(train, tmp_path, stop)
    assert state_of(*run(train, tmp_path)[1:]) == state_of(*whole[train][1:])
    shown("bitwise identical when resumed after the change")
