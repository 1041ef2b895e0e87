"""What is noted of a user's function, and that Keras is as it was afterwards."""

import functools
import threading

import keras
import numpy as np
import pytest
from keras import layers, ops

from handloom._trace.observe import OwnVariable, losses_of, metrics_used, new_variables

close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def patched():
    """What the watching replaces, as it stands in the classes themselves."""
    return [
        vars(keras.Variable).get("__init__"),
        vars(keras.Metric).get("__getattribute__"),
        vars(keras.Layer).get("add_loss"),
        vars(keras.Layer).get("losses"),
    ]


def in_a_thread(work):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def dense(**options):
    layer = layers.Dense(1, kernel_initializer="ones", **options)
    layer.build((None, 2))
    return layer


X = np.array([[1.0, 2.0], [3.0, 4.0]], "float32")


# ---------------------------------------------------------------------- undone


WATCHES = {
    "new_variables": new_variables,
    "metrics_used": metrics_used,
    "losses_of": lambda: losses_of([], []),
}
each_watch = pytest.mark.parametrize("watch", WATCHES.values(), ids=WATCHES.keys())


@each_watch
def test_keras_is_as_it_was_afterwards(watch):
    before = patched()
    with watch():
        assert patched() != before
    assert all(now is then for now, then in zip(patched(), before, strict=True))


@each_watch
def test_keras_is_as_it_was_after_an_exception(watch):
    before = patched()
    with pytest.raises(KeyboardInterrupt), watch():
        raise KeyboardInterrupt
    assert all(now is then for now, then in zip(patched(), before, strict=True))


@each_watch
def test_keras_is_as_it_was_after_watching_inside_watching(watch):
    before = patched()
    with watch():
        between = patched()
        with pytest.raises(KeyError), watch():
            raise KeyError
        assert all(now is then for now, then in zip(patched(), between, strict=True))
    assert all(now is then for now, then in zip(patched(), before, strict=True))


# ---------------------------------------------------------------------- variables


def test_created_variables_are_listed_in_order():
    with new_variables() as created:
        one = keras.Variable(1.0)
        two = keras.Variable("zeros", shape=(2,))
    assert created[0] is one
    assert created[1] is two
    assert len(created) == 2


def test_variables_of_layers_metrics_optimizers_and_seeds_are_listed():
    with new_variables() as created:
        layer = dense()
        metric = keras.metrics.Mean()
        optimizer = keras.optimizers.SGD(0.1)
        seeds = keras.random.SeedGenerator(0)
    held = [*layer.variables, *metric.variables, *optimizer.variables, seeds.state]
    assert set(map(id, created)) >= set(map(id, held))


def test_variables_of_handlooms_own_are_not_listed():
    with new_variables() as created:
        OwnVariable(1.0)
    assert created == []


def test_variables_made_before_and_after_are_not_listed():
    keras.Variable(1.0)
    with new_variables() as created:
        pass
    keras.Variable(1.0)
    assert created == []


def test_both_of_two_watches_list_what_the_inner_one_sees():
    with new_variables() as outer:
        first = keras.Variable(1.0)
        with new_variables() as inner:
            second = keras.Variable(2.0)
    assert list(map(id, outer)) == [id(first), id(second)]
    assert list(map(id, inner)) == [id(second)]


def test_variables_of_another_thread_are_not_listed():
    with new_variables() as created:
        in_a_thread(lambda: keras.Variable(1.0))
    assert created == []


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ((np.array([1.0, 2.0], "float32"),), {}),
        (([1.0, 2.0],), {"dtype": "float32"}),
        (("ones",), {"shape": (2,)}),
        (("ones", (2,), "float32", False), {}),
        (([1, 2], None, "int32"), {"trainable": False}),
        ((), {"initializer": [1.0, 2.0], "trainable": False, "name": "named"}),
        ((3.0,), {}),
    ],
    ids=["array", "list", "initializer", "by position", "integers", "by name", "number"],
)
def test_a_variable_made_while_watched_is_the_one_it_would_have_been(args, options):
    expected = keras.Variable(*args, **options)
    with new_variables():
        watched = keras.Variable(*args, **options)
    np.testing.assert_array_equal(watched.numpy(), expected.numpy())
    assert (watched.shape, watched.dtype) == (expected.shape, expected.dtype)
    assert watched.trainable == expected.trainable


# ---------------------------------------------------------------------- metrics


def test_updated_metrics_are_noted_once_in_order():
    unused, first, second = (keras.metrics.Mean(name=name) for name in ("unused", "first", "second"))
    with metrics_used() as used:
        first.update_state(1.0)
        second.update_state(2.0)
        first.update_state(3.0)
    assert used.updated == (first, second)
    assert unused not in used.updated


def test_watching_changes_no_metric():
    metric = keras.metrics.Mean()
    with metrics_used():
        metric.update_state([1.0, 4.0], sample_weight=[1.0, 2.0])
        close(metric.result(), 3)
    close(metric.result(), 3)


def test_a_metric_that_is_called_is_noted():
    metric = keras.metrics.MeanAbsoluteError()
    with metrics_used() as used:
        result = metric([1.0], [3.0])
    assert used.updated == (metric,)
    assert used.source(result) is not None


def test_a_metric_of_the_users_own_is_noted():
    class Count(keras.metrics.Metric):
        def __init__(self):
            super().__init__()
            self.count = self.add_variable((), "zeros", name="count")

        def update_state(self, values):
            self.count.assign_add(ops.sum(ops.ones_like(values)))

        def result(self):
            return {"count": ops.copy(self.count.value)}

    metric = Count()
    with metrics_used() as used:
        metric.update_state(ops.ones(3))
        result = metric.result()
    assert used.updated == (metric,)
    assert used.source(result["count"]) is not None


def test_metrics_inside_a_metric_are_noted_too():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1)])
    model.compile(loss="mse", metrics=["mae"])
    with metrics_used() as used:
        model.compute_metrics(X, ops.ones((2, 1)), ops.zeros((2, 1)))
    assert "mae" in {metric.name for metric in used.updated}


def test_results_are_told_from_other_tensors():
    metric, other = keras.metrics.Mean(), ops.ones(())
    metric.update_state(5.0)
    with metrics_used() as used:
        result = metric.result()
    assert used.source(result) is not None
    assert used.source(other) is None
    assert used.source(result + 0) is None
    assert used.updated == ()


def test_before_its_first_update_each_metric_is_reported():
    counts = []
    metric = keras.metrics.Sum()
    metric.update_state(10.0)

    def on_update(metric):
        counts.append(float(metric.result()))
        metric.reset_state()

    with metrics_used(on_update):
        metric.update_state(1.0)
        metric.update_state(2.0)
    assert counts == [10]
    close(metric.result(), 3)


def test_metrics_of_another_thread_are_not_noted():
    metric = keras.metrics.Mean()
    with metrics_used() as used:
        in_a_thread(lambda: metric.update_state(1.0))
    assert used.updated == ()
    close(metric.result(), 1)


def test_both_of_two_watches_note_a_metric():
    metric = keras.metrics.Mean()
    with metrics_used() as outer, metrics_used() as inner:
        metric.update_state(1.0)
    assert outer.updated == inner.updated == (metric,)


# ---------------------------------------------------------------------- losses


def total(penalties):
    return ops.convert_to_numpy(sum(penalties))


def watched(layer):
    return losses_of(layer.trainable_variables, [layer])


def test_a_regularizer_is_left_out_unless_it_was_read():
    layer = dense(kernel_regularizer=keras.regularizers.L2(0.5))
    with watched(layer) as losses:
        pass
    close(total(losses.left_out()), 0.5 * 2)
    with watched(layer) as losses:
        _ = layer.losses
    assert losses.left_out() == []


def test_an_added_loss_is_left_out_unless_it_was_read():
    layer = dense(activity_regularizer=keras.regularizers.L1(0.5))
    with watched(layer) as losses:
        layer(X)
    close(total(losses.left_out()), 0.5 * (3 + 7) / 2)
    with watched(layer) as losses:
        layer(X)
        _ = layer.losses
    assert losses.left_out() == []


def test_a_loss_added_after_they_were_read_is_left_out():
    layer = dense(activity_regularizer=keras.regularizers.L1(0.5), kernel_regularizer=keras.regularizers.L2(0.5))
    with watched(layer) as losses:
        _ = layer.losses
        layer(X)
    close(total(losses.left_out()), 0.5 * (3 + 7) / 2)


def test_reading_the_losses_of_a_model_reads_those_of_its_layers():
    model = keras.Sequential([keras.Input((2,)), dense(kernel_regularizer="l2", activity_regularizer="l2")])
    with watched(model) as losses:
        model(X)
        _ = model.losses
    assert losses.left_out() == []


def test_reading_the_losses_of_one_layer_leaves_those_of_the_other():
    one, other = (dense(kernel_regularizer=keras.regularizers.L2(factor)) for factor in (0.5, 0.25))
    with losses_of([*one.trainable_variables, *other.trainable_variables], [one, other]) as losses:
        _ = one.losses
    close(total(losses.left_out()), 0.25 * 2)


def test_losses_of_a_layer_that_is_not_watched_do_not_count():
    layer, other = dense(), dense(activity_regularizer="l2", kernel_regularizer="l2")
    with watched(layer) as losses:
        other(X)
    assert losses.left_out() == []


def test_a_layer_without_variables_inside_a_watched_one_counts():
    model = keras.Sequential([keras.Input((2,)), dense(), layers.ActivityRegularization(l1=0.5)])
    with watched(model) as losses:
        model(X)
    close(total(losses.left_out()), 0.5 * (3 + 7) / 2)


def test_several_losses_added_at_once_all_count():
    layer = dense()
    with watched(layer) as losses:
        layer.add_loss([ops.ones(()), 2 * ops.ones(())])
    close(total(losses.left_out()), 3)


def test_losses_of_another_thread_are_neither_added_nor_read():
    layer = dense(kernel_regularizer=keras.regularizers.L2(0.5), activity_regularizer="l2")
    with watched(layer) as losses:
        in_a_thread(lambda: (layer(X), layer.losses))
    close(total(losses.left_out()), 0.5 * 2)


def test_the_losses_themselves_are_those_of_keras():
    layer = dense(kernel_regularizer=keras.regularizers.L2(0.5), activity_regularizer=keras.regularizers.L1(0.5))
    with watched(layer):
        layer(X)
        close(total(layer.losses), 0.5 * 2 + 0.5 * (3 + 7) / 2)
    close(total(layer.losses), 0.5 * 2 + 0.5 * (3 + 7) / 2)
