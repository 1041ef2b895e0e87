"""Several steps in one dispatch: which go together, and that nothing else is other than one by one."""

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import layers, ops

import handloom as hl
from handloom._run.grouping import grouped, steps_a_dispatch
from handloom._util.progress import Progress

numbers = np.random.default_rng(0)
X = numbers.normal(size=(70, 3)).astype("float32")
Y = X[:, :1] ** 2

EVERY = st.builds(lambda steps: hl.every(steps=steps), st.integers(1, 12)) | st.just(hl.every(seconds=1))


def groups_of(count, size, triggers, begin=0):
    """The groups of an epoch's batches from one on, as lists of their numbers."""
    progress, found = Progress(step=begin, batch=begin), []
    for group in grouped(iter(range(begin, count)), size, progress, triggers):
        found.append(group)
        progress.advance(len(group))
    return found


@given(st.integers(1, 40), st.integers(2, 9), st.lists(EVERY, max_size=3))
def test_every_batch_is_in_one_group_in_order_and_what_is_due_falls_between_two(count, size, triggers):
    groups = groups_of(count, size, triggers)
    assert [batch for group in groups for batch in group] == list(range(count))
    assert all(len(group) in (1, size) for group in groups[:-1])
    for group in groups:
        inside = range(group[0] + 1, group[-1] + 1)  # The numbers of steps taken within the group.
        assert not any(trigger.steps and step % trigger.steps == 0 for trigger in triggers for step in inside)


@given(st.integers(1, 40), st.integers(2, 9), st.lists(EVERY, max_size=3), st.data())
def test_from_any_place_between_two_groups_the_rest_is_grouped_alike(count, size, triggers, data):
    groups = groups_of(count, size, triggers)
    place = data.draw(st.integers(0, len(groups) - 1))
    assert groups_of(count, size, triggers, begin=groups[place][0]) == groups[place:]


def test_without_anything_due_groups_are_full_but_for_the_last():
    assert list(map(len, groups_of(10, 4, []))) == [4, 4, 2]
    assert list(map(len, groups_of(10, 4, [hl.every(steps=6)]))) == [4, 1, 1, 4]


@pytest.mark.parametrize("given_", [0, -1, 1.5, True, "all", None])
def test_what_is_no_number_of_steps_is_an_error(given_):
    with pytest.raises(ValueError, match=r"steps_per_execution=...\) takes a whole number, at least 1; received"):
        hl.fit(lambda x: {}, X, steps_per_execution=given_)


def test_steps_per_execution_is_one_where_a_callback_needs_every_step():
    assert steps_a_dispatch(8, None, each_step=True) == 1
    assert steps_a_dispatch(8, 4, each_step=False) == 8


def test_steps_per_execution_auto_is_one_or_what_the_resumed_run_had():
    assert steps_a_dispatch("auto", None, each_step=False) == 1
    assert steps_a_dispatch("auto", 4, each_step=False) == 4
    assert steps_a_dispatch(np.int64(8), None, each_step=False) == 8


# ------------------------------------------------------------------------ in a run


class Calls(keras.callbacks.Callback):
    """Which batches it is told of."""

    def __init__(self, *, content):
        super().__init__()
        self.takes_executions, self.begun, self.ended = content, [], []

    def on_train_batch_begin(self, batch, logs=None):
        self.begun.append(batch)

    def on_train_batch_end(self, batch, logs=None):
        self.ended.append(batch)


def fit(steps, *callbacks, epochs=2, **options):
    keras.utils.set_random_seed(3)
    model = hl.Sequential([keras.Input((3,)), layers.Dense(4, "relu"), layers.Dropout(0.3), layers.Dense(1)])
    model.compile(keras.optimizers.Adam(0.01), loss="mse", metrics=["mae"], steps_per_execution=steps)
    options = {"batch_size": 8, "verbose": 0, "seed": 1} | options  # 9 batches, the last one smaller.
    model.fit(X, Y, epochs=epochs, callbacks=list(callbacks), **options)
    return model


@pytest.mark.parametrize("steps", [2, 4, 9, 100])
def test_steps_together_do_what_single_ones_do(steps):
    one, several = fit(1), fit(steps)
    for name, values in one.history.history.items():
        np.testing.assert_allclose(several.history.history[name], values, rtol=1e-4)
    for weights, others in zip(one.get_weights(), several.get_weights(), strict=True):
        np.testing.assert_allclose(others, weights, rtol=1e-3, atol=1e-5)
    assert int(several.optimizer.iterations) == 18


def test_an_own_step_in_fit_too():
    def history(steps):
        keras.utils.set_random_seed(0)
        model, optimizer = keras.Sequential([layers.Dense(1)]), keras.optimizers.SGD(0.1)
        error = keras.metrics.MeanAbsoluteError(name="error")

        def step(x, y):
            loss = hl.minimize(lambda: ops.mean((model(x) - y) ** 2), model, optimizer)
            error.update_state(y, model(x))
            return {"loss": loss, "error": error}

        return hl.fit(step, (X, Y), epochs=3, verbose=0, steps_per_execution=steps).history

    for name, values in history(1).items():
        np.testing.assert_allclose(history(2)[name], values, rtol=1e-5)


def test_a_callback_that_asks_for_each_step_gets_each_step():
    calls = Calls(content=False)
    fit(4, calls, epochs=1)
    assert calls.begun == calls.ended == list(range(9))


def test_one_that_does_not_gets_the_first_and_the_last_of_each_group():
    calls = Calls(content=True)
    fit(4, calls, epochs=1)
    assert calls.begun == [0, 4, 8]
    assert calls.ended == [3, 7, 8]


def test_fit_may_be_told_another_number_than_compile():
    calls = Calls(content=True)
    fit(1, calls, epochs=1, steps_per_execution=4)
    assert calls.ended == [3, 7, 8]
    with pytest.raises(ValueError, match="received 0"):
        fit(4, steps_per_execution=0)


def test_our_own_callbacks_act_when_they_are_asked_to():
    def rates(steps):
        seen = []

        def schedule(step, rate):
            seen.append(step)
            return rate * 0.9

        scheduler = hl.callbacks.LearningRateScheduler(schedule, every=hl.every(steps=5))
        model = fit(steps, scheduler, hl.callbacks.Throughput())
        return seen, float(model.optimizer.learning_rate), model.history.history["steps_per_second"]

    (seen, rate, speed), (expected, its_rate, _) = rates(4), rates(1)
    assert seen == expected == [0, 5, 10, 15]
    assert rate == its_rate
    assert all(steps > 0 for steps in speed)


def test_op_by_op_it_is_one_by_one():
    with hl.run_eagerly(True):
        model = fit(4)
    assert int(model.optimizer.iterations) == 18
