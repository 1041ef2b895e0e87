"""Losses of a step: their denominators, and the added losses that none of them counts."""

import contextlib

import keras
import numpy as np
import pytest
from keras import layers, ops

from handloom._trace.losses import Denominators, OwnLosses, UncountedLosses, note_loss
from handloom._trace.observe import observing
from tests.models import built
from tests.numbers import close, each_close, ones
from tests.threads import in_a_thread

X = np.array([[1.0, 2.0], [3.0, 4.0]], "float32")
L1, L2 = keras.regularizers.L1(0.5), keras.regularizers.L2(0.5)
PENALTY, ACTIVITY = 0.5 * 2, 0.5 * (3 + 7) / 2  # Of L2 on a kernel of two ones, and of L1 on its outputs for X.


def dense(**options):
    return built(layers.Dense(1, kernel_initializer="ones", **options), 2)


@contextlib.contextmanager
def own_losses(*parts):
    """Watches the losses of some layers; those that were not read, and those that were, follow the block."""
    losses, terms = OwnLosses([v for layer in parts for v in layer.trainable_variables], list(parts)), []
    with observing(losses):
        yield terms
    terms += [losses.unread_terms(), [term for _, term in losses.read_terms()]]


def test_own_losses_are_those_that_were_read_and_those_that_were_not():
    layer = dense(activity_regularizer=L1, kernel_regularizer=L2)
    with own_losses(layer) as terms:
        layer(X)
    each_close(terms, [[PENALTY, ACTIVITY], []])
    with own_losses(layer) as terms:
        layer(X)
        _ = layer.losses, layer.losses
    each_close(terms, [[], [ACTIVITY, PENALTY]])
    with own_losses(layer) as terms:
        _ = layer.losses  # That of the earlier call is none of this function.
        layer(X)
    each_close(terms, [[ACTIVITY], [PENALTY]])


def test_own_losses_of_a_model_are_those_of_its_layers_also_of_layers_without_variables():
    inner = dense(kernel_regularizer=L2)
    model = keras.Sequential([keras.Input((2,)), inner, layers.ActivityRegularization(l1=0.5)])
    with own_losses(model) as terms:
        model(X)
    each_close(terms, [[PENALTY, ACTIVITY], []])
    with own_losses(model) as terms:
        model(X)
        _ = model.losses
    each_close(terms, [[], [ACTIVITY, PENALTY]])


def test_own_losses_are_read_layer_by_layer():
    one, other, stranger = dense(kernel_regularizer=L2), dense(kernel_regularizer=L2), dense(activity_regularizer=L1)
    with own_losses(one, other) as terms:
        _ = one.losses
        stranger(X)
        _ = stranger.losses
    each_close(terms, [[PENALTY], [PENALTY]])


def test_own_losses_count_each_of_several_losses_added_at_once():
    layer = dense()
    with own_losses(layer) as terms:
        layer.add_loss([ops.ones(()), 2 * ops.ones(())])
    each_close(terms, [[1, 2], []])


def test_own_losses_of_another_thread_are_neither_added_nor_read():
    layer = dense(kernel_regularizer=L2, activity_regularizer=L1)
    with own_losses(layer) as terms:
        in_a_thread(lambda: (layer(X), layer.losses))
    each_close(terms, [[PENALTY], []])


def test_own_losses_leave_the_losses_of_keras_as_they_are():
    layer = dense(kernel_regularizer=L2, activity_regularizer=L1)
    with own_losses(layer):
        layer(X)
        close(sum(layer.losses), PENALTY + ACTIVITY)
    close(sum(layer.losses), PENALTY + ACTIVITY)


@pytest.mark.parametrize(
    ("reduction", "weight", "by", "value"),
    [
        ("sum_over_batch_size", None, "examples", 2),
        ("sum_over_batch_size", [1.0, 3.0], "examples", 2),
        ("mean", None, "examples", 2),
        ("mean_with_sample_weight", [1.0, 3.0], "weights", 4),
        ("sum", None, "nothing", "sum"),
    ],
)
def test_denominators_note_the_divisor_of_a_keras_loss(reduction, weight, by, value):
    denominators, loss = Denominators(), keras.losses.MeanSquaredError(reduction=reduction)
    with observing(denominators):
        found = loss(ones(2, 1), 3 * ones(2, 1), None if weight is None else np.array(weight, "float32"))
    denominator = denominators.of(found)
    assert denominator.by == by
    assert denominator.value == value or float(denominator.value) == value
    assert denominators.of(found + 0) is None
    assert denominators.distinct() == [denominator]


def test_denominators_note_one_mask_once():
    denominators, outputs = Denominators(), layers.Masking()(np.array([[[1.0], [2.0], [0.0]]], "float32"))
    with observing(denominators):
        losses = [loss(ones(1, 3, 1), outputs) for loss in (keras.losses.MeanSquaredError(), keras.losses.Huber())]
    [denominator] = denominators.distinct()
    assert denominator.by == "mask"
    close(denominator.value, 2)
    assert all(denominators.of(loss) is not None for loss in losses)


def test_note_loss_reaches_the_innermost_denominators():
    outer, inner, loss = Denominators(), Denominators(), ops.ones(())
    note_loss(loss, [])  # No observer.
    with observing(outer), observing(inner):
        note_loss(loss, [])
    assert (inner.is_loss(loss), outer.is_loss(loss)) == (True, False)


def test_uncounted_losses_are_those_that_no_loss_of_a_training_step_includes():
    layer = dense(kernel_regularizer="l2", activity_regularizer="l2")
    optimizer = keras.optimizers.SGD(0.1)
    optimizer.build(layer.trainable_variables)

    def uncounted(*steps):
        losses = UncountedLosses()
        with observing(losses):
            for step in steps:
                step()
        return losses.descriptions()

    def call():
        layer(X)

    def update():
        optimizer.apply([ops.ones((2, 1)), ops.ones((1,))], layer.trainable_variables)

    def minimized():
        with own_losses(layer):
            layer(X)

    names = [f"the losses added by {layer.name!r}", f"the regularizer of {layer.kernel.path!r}"]
    assert uncounted(call, update) == names
    assert uncounted(call) == []  # It trains nothing.
    assert uncounted(call, update, lambda: layer.losses) == uncounted(minimized, update) == []
