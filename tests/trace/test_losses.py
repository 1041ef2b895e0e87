"""Losses of a step: what they were divided by, and which nobody counted."""

import contextlib

import keras
import numpy as np
import pytest
from keras import layers, ops

from handloom._trace.losses import Denominators, OwnLosses, UncountedLosses, note_loss
from handloom._trace.observe import observing
from tests.numbers import close, ones
from tests.threads import in_a_thread

X = np.array([[1.0, 2.0], [3.0, 4.0]], "float32")


def dense(**options):
    layer = layers.Dense(1, kernel_initializer="ones", **options)
    layer.build((None, 2))
    return layer


def total(penalties):
    return sum(penalties)


@contextlib.contextmanager
def own_losses(*parts):
    """Watches the losses of some layers."""
    losses = OwnLosses([variable for layer in parts for variable in layer.trainable_variables], list(parts))
    with observing(losses):
        yield losses


def test_a_regularizer_is_left_out_unless_it_was_read():
    layer = dense(kernel_regularizer=keras.regularizers.L2(0.5))
    with own_losses(layer) as losses:
        pass
    close(total(losses.left_out()), 0.5 * 2)
    with own_losses(layer) as losses:
        _ = layer.losses
    assert losses.left_out() == []


def test_an_added_loss_is_left_out_unless_it_was_read():
    layer = dense(activity_regularizer=keras.regularizers.L1(0.5))
    with own_losses(layer) as losses:
        layer(X)
    close(total(losses.left_out()), 0.5 * (3 + 7) / 2)
    with own_losses(layer) as losses:
        layer(X)
        _ = layer.losses
    assert losses.left_out() == []


def test_a_loss_added_after_they_were_read_is_left_out():
    layer = dense(activity_regularizer=keras.regularizers.L1(0.5), kernel_regularizer=keras.regularizers.L2(0.5))
    with own_losses(layer) as losses:
        _ = layer.losses
        layer(X)
    close(total(losses.left_out()), 0.5 * (3 + 7) / 2)


def test_reading_the_losses_of_a_model_reads_those_of_its_layers():
    model = keras.Sequential([keras.Input((2,)), dense(kernel_regularizer="l2", activity_regularizer="l2")])
    with own_losses(model) as losses:
        model(X)
        _ = model.losses
    assert losses.left_out() == []


def test_reading_the_losses_of_one_layer_leaves_those_of_the_other():
    one, other = (dense(kernel_regularizer=keras.regularizers.L2(factor)) for factor in (0.5, 0.25))
    with own_losses(one, other) as losses:
        _ = one.losses
    close(total(losses.left_out()), 0.25 * 2)


def test_losses_of_a_layer_that_is_not_among_them_do_not_count():
    layer, other = dense(), dense(activity_regularizer="l2", kernel_regularizer="l2")
    with own_losses(layer) as losses:
        other(X)
    assert losses.left_out() == []


def test_a_layer_without_variables_inside_another_counts():
    model = keras.Sequential([keras.Input((2,)), dense(), layers.ActivityRegularization(l1=0.5)])
    with own_losses(model) as losses:
        model(X)
    close(total(losses.left_out()), 0.5 * (3 + 7) / 2)


def test_several_losses_added_at_once_all_count():
    layer = dense()
    with own_losses(layer) as losses:
        layer.add_loss([ops.ones(()), 2 * ops.ones(())])
    close(total(losses.left_out()), 3)


def test_losses_of_another_thread_are_neither_added_nor_read():
    layer = dense(kernel_regularizer=keras.regularizers.L2(0.5), activity_regularizer="l2")
    with own_losses(layer) as losses:
        in_a_thread(lambda: (layer(X), layer.losses))
    close(total(losses.left_out()), 0.5 * 2)


def test_the_losses_themselves_are_those_of_keras():
    layer = dense(kernel_regularizer=keras.regularizers.L2(0.5), activity_regularizer=keras.regularizers.L1(0.5))
    with own_losses(layer):
        layer(X)
        close(total(layer.losses), 0.5 * 2 + 0.5 * (3 + 7) / 2)
    close(total(layer.losses), 0.5 * 2 + 0.5 * (3 + 7) / 2)


def masked(value):
    return layers.Masking()(np.array([[[1.0], [2.0], [0.0]], [[3.0], [0.0], [0.0]]], "float32")) * value


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
def test_denominators_are_what_a_keras_loss_divides_by(reduction, weight, by, value):
    denominators, loss = Denominators(), keras.losses.MeanSquaredError(reduction=reduction)
    with observing(denominators):
        found = loss(ones(2, 1), 3 * ones(2, 1), None if weight is None else np.array(weight, "float32"))
    denominator = denominators.of(found)
    assert denominator.by == by
    assert denominator.value == value or float(denominator.value) == value
    assert denominators.of(found + 0) is None
    assert denominators.distinct() == [denominator]


def test_losses_under_one_mask_have_one_denominator():
    denominators, outputs = Denominators(), layers.Masking()(np.array([[[1.0], [2.0], [0.0]]], "float32"))
    with observing(denominators):
        losses = [loss(ones(1, 3, 1), outputs) for loss in (keras.losses.MeanSquaredError(), keras.losses.Huber())]
    [denominator] = denominators.distinct()
    assert denominator.by == "mask"
    close(denominator.value, 2)
    assert all(denominators.of(loss) is not None for loss in losses)


def test_note_loss_is_for_the_innermost_denominators():
    outer, inner, loss = Denominators(), Denominators(), ops.ones(())
    note_loss(loss, [])  # Nobody is there.
    with observing(outer), observing(inner):
        note_loss(loss, [])
    assert (inner.is_loss(loss), outer.is_loss(loss)) == (True, False)


def test_uncounted_losses_are_those_of_no_loss_of_a_step_that_trains():
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
        with own_losses(layer) as own:
            layer(X)
        own.left_out()

    names = [f"the losses added by {layer.name!r}", f"the regularizer of {layer.kernel.path!r}"]
    assert uncounted(call, update) == names
    assert uncounted(call) == []  # It trains nothing.
    assert uncounted(call, update, lambda: layer.losses) == uncounted(minimized, update) == []
