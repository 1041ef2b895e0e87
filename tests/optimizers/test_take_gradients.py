"""`SAM` and `PCGrad`, which take the gradients themselves, against NumPy."""

import itertools

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.errors import ArgumentError, GradientError
from handloom.optimizers import SAM, GradientAccumulation, LossScaleOptimizer, PCGrad
from tests.models import built, compiled, fit, functional
from tests.numbers import close, normal, numpy, same

SGD = keras.optimizers.SGD
START = np.array([1.0, -2.0, 0.5], "float32")
CONFLICT = np.array([[1.0, 0.0, 0.0], [-1.0, 1.0, 0.0]])
PROJECTED = [0.5, 1.5, 0.0]  # The sum of (0.5, 0.5) and (0, 1).


# ---------------------------------------------------------------------- SAM


def test_sam_takes_the_gradient_uphill_and_assigns_other_variables_once(eagerly):
    weight, calls = keras.Variable([1.0, 2.0]), keras.Variable(0.0, trainable=False)
    optimizer = SAM(SGD(0.1), radius=0.05)

    def loss():
        calls.assign(calls + 1)
        return ops.sum(weight * weight * weight)

    step, expected = hl.function(lambda: hl.minimize(loss, weight, optimizer)), np.array([1.0, 2.0])
    for _ in range(3):
        step()
        uphill = expected + 0.05 * 3 * expected**2 / np.linalg.norm(3 * expected**2)
        expected = expected - 0.1 * 3 * uphill**2
    close(weight, expected)
    close(calls, 3)


@pytest.mark.parametrize("around", [LossScaleOptimizer, keras.optimizers.LossScaleOptimizer])
def test_sam_inside_loss_scaling_takes_the_same_gradients(around):
    x, models = normal(8, 3), []
    for optimizer in (SAM(SGD(0.1), radius=1.0), around(SAM(SGD(0.1), radius=1.0))):
        keras.utils.set_random_seed(0)
        models.append(compiled(functional(), optimizer))
        fit(models[-1], x, x[:, :1], batch_size=4)
    close(*(model.get_weights()[0] for model in models))


# ---------------------------------------------------------------------- PCGrad


def linear_losses(directions):
    """A variable, and losses with these gradients at any value of it."""
    w = keras.Variable(START)
    return w, lambda: ops.sum(ops.convert_to_tensor(np.array(directions, "float32")) * w, axis=1)


def projected(gradients, orders):
    """Algorithm 1 of Yu et al., with the orders given."""
    total = np.zeros(len(gradients[0]))
    for gradient, order in zip(gradients, orders, strict=True):
        changed = np.array(gradient, float)
        for other in order:
            product = changed @ gradients[other]
            if product < 0:
                changed = changed - product / (gradients[other] @ gradients[other]) * gradients[other]
        total += changed
    return total


def step_of(optimizer, directions):
    """The loss, and how far one compiled update moves the variable."""
    w, losses = linear_losses(directions)
    loss = hl.function(lambda: hl.minimize(losses, w, optimizer))()
    return float(loss), START - numpy(w)


@pytest.mark.parametrize("inner", [SGD, lambda rate: LossScaleOptimizer(SGD(rate))], ids=["plain", "scaled"])
def test_pcgrad_removes_from_two_conflicting_gradients_their_parts_along_each_other(inner, eagerly):
    loss, moved = step_of(PCGrad(inner(1.0)), CONFLICT)
    close(moved, PROJECTED, atol=1e-5)
    close(loss, START @ CONFLICT.sum(axis=0))


def test_pcgrad_sums_gradients_without_a_conflict(eagerly):
    directions = np.array([[1.0, 2.0, 0.0], [0.5, 0.0, 3.0]])
    close(step_of(PCGrad(SGD(1.0)), directions)[1], directions.sum(axis=0))


def test_pcgrad_projects_three_gradients_in_one_of_the_orders_of_the_paper():
    gradients = np.array([[1.0, 0.3, 0.0], [-1.0, 0.4, 0.6], [0.2, -1.0, -0.8]])
    orders = [list(itertools.permutations([other for other in range(3) if other != task])) for task in range(3)]
    possible = [projected(gradients, chosen) for chosen in itertools.product(*orders)]
    optimizer, seen = PCGrad(SGD(1.0)), []
    w, losses = linear_losses(gradients)
    step = hl.function(lambda: hl.minimize(losses, w, optimizer))
    for _ in range(12):
        w.assign(START)
        step()
        distances = [np.abs(START - numpy(w) - total).max() for total in possible]
        assert min(distances) < 1e-5
        seen.append(int(np.argmin(distances)))
    assert len(set(seen)) > 1


@pytest.mark.parametrize("read", ["", "to report", "to include"])
def test_pcgrad_adds_penalties_unprojected_unless_a_loss_includes_them(read, eagerly):
    layer = built(layers.Dense(1, use_bias=False, kernel_regularizer=keras.regularizers.L2(0.5)), 2)
    layer.kernel.assign([[1.0], [2.0]])
    before = numpy(layer.kernel).copy()

    def losses():
        first, second = ops.unstack(ops.reshape(layer(np.eye(2, dtype="float32")), (2,)))
        penalty = sum(layer.losses) if read else 0.0
        return ops.stack([first, second - 2 * first + (penalty if read == "to include" else 0)])

    optimizer = PCGrad(SGD(0.1))
    total = hl.function(lambda: hl.minimize(losses, layer, optimizer))()
    # Of (1, 0) and (-2, 1): the first loses its part along the second, the second that along the first.
    expected = np.array([[1 - 2 / 5 * 2 + 0], [2 / 5 + 1]]) + before
    if read == "to include":  # The same of (1, 0) and (-2, 1) + before.
        expected = np.array([[1 - 1 / 10 + 0], [3 / 10 + 3]])
    close((before - numpy(layer.kernel)) / 0.1, expected)
    close(total, 1 + (2 - 2) + 0.5 * (1 + 4))


def test_pcgrad_with_a_loss_that_does_not_reach_all_variables_leaves_them_to_the_others():
    a, b = keras.Variable(1.0), keras.Variable(1.0)
    hl.minimize(lambda: ops.stack([a * 2.0, a * -1.0 + b]), [a, b], PCGrad(SGD(1.0)))
    close([a, b], [1 - 1, 1 - 2])  # (2, 0) becomes (1, 1), and (-1, 1) becomes (0, 1).


def test_pcgrad_inside_gradient_accumulation_is_accumulated(eagerly):
    w, losses = linear_losses(CONFLICT)
    optimizer = GradientAccumulation(PCGrad(SGD(1.0)), 2)
    step = hl.function(lambda: hl.minimize(losses, w, optimizer))
    step()
    same(w, START)
    step()
    close(START - numpy(w), PROJECTED, atol=1e-5)


def test_pcgrad_runs_the_loss_function_once_and_returns_its_aux(eagerly):
    w, losses = linear_losses(CONFLICT)
    calls, optimizer = keras.Variable(0.0), PCGrad(SGD(1.0))

    def with_aux():
        calls.assign_add(1.0)
        return losses(), {"losses": losses()}

    loss, aux = hl.function(lambda: hl.minimize(with_aux, w, optimizer, has_aux=True))()
    close(aux["losses"], [1, -3])
    close([loss, calls], [-2, 1])


def test_pcgrad_requires_several_losses_and_no_sam_around_it_and_other_optimizers_one_loss():
    w = keras.Variable(START)
    with pytest.raises(GradientError, match=r"as one vector.*shape \(\).*keras.ops.stack\(\[a, b\]\).*HL116"):
        hl.minimize(lambda: ops.sum(w), w, PCGrad("sgd"))
    with pytest.raises(GradientError, match=r"shape \(2,\).*HL117"):
        hl.minimize(lambda: ops.stack([w[0], w[1]]), w, SGD())
    with pytest.raises(ArgumentError, match=r"SAM is around PCGrad: both take the gradients.*HL351"):
        SAM(GradientAccumulation(PCGrad("sgd"), 2))


@pytest.mark.parametrize(("optimizer", "name"), [(PCGrad(SGD(0.5), seed=3), "seed"), (SAM(SGD(0.5), 3), "radius")])
def test_pcgrad_and_sam_are_loaded_from_their_config(optimizer, name):
    loaded = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert (type(loaded), getattr(loaded, name), float(loaded.learning_rate)) == (type(optimizer), 3, 0.5)
