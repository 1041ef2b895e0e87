"""Several steps in one dispatch: which go together, and that the results are those of single steps."""

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import layers, ops

import handloom as hl
from handloom._run.grouping import grouped, steps_a_dispatch
from handloom._util.progress import Progress
from tests.models import compiled, sequential
from tests.numbers import close, each_close, normal

X = normal(70, 3)
Y = X[:, :1] ** 2

EVERY = st.builds(lambda steps: hl.every(steps=steps), st.integers(1, 12)) | st.just(hl.every(seconds=1))


def groups_of(count, size, due, begin=0):
    """The groups of an epoch's batches from one on, as lists of their numbers."""
    progress, found = Progress(step=begin, batch=begin), []
    for group in grouped(iter(range(begin, count)), size, progress, due):
        found.append(group)
        progress.advance(len(group))
    return found


@given(st.integers(1, 40), st.integers(2, 9), st.lists(EVERY, max_size=3))
def test_grouped_has_every_batch_once_in_order_and_nothing_is_due_within_a_group(count, size, due):
    groups = groups_of(count, size, due)
    assert [batch for group in groups for batch in group] == list(range(count))
    assert all(len(group) in (1, size) for group in groups[:-1])
    for group in groups:
        inside = range(group[0] + 1, group[-1] + 1)  # The numbers of steps taken within the group.
        assert not any(schedule.steps and step % schedule.steps == 0 for schedule in due for step in inside)


@given(st.integers(1, 40), st.integers(2, 9), st.lists(EVERY, max_size=3), st.data())
def test_grouped_makes_the_same_groups_from_any_position_between_two(count, size, due, data):
    groups = groups_of(count, size, due)
    place = data.draw(st.integers(0, len(groups) - 1))
    assert groups_of(count, size, due, begin=groups[place][0]) == groups[place:]


def test_grouped_makes_full_groups_where_nothing_is_due():
    assert list(map(len, groups_of(10, 4, []))) == [4, 4, 2]
    assert list(map(len, groups_of(10, 4, [hl.every(steps=6)]))) == [4, 1, 1, 4]


@pytest.mark.parametrize(
    ("asked", "recorded", "each_step", "expected"),
    [(8, None, True, 1), (8, 4, False, 8), ("auto", None, False, 1), ("auto", 4, False, 4), (np.int64(8), 2, False, 8)],
)
def test_steps_a_dispatch_is_the_number_asked_for_or_for_auto_that_of_the_resumed_run(
    asked, recorded, each_step, expected
):
    assert steps_a_dispatch(asked, recorded, each_step=each_step) == expected


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, "all", None])
def test_steps_per_execution_must_be_a_positive_whole_number(steps):
    with pytest.raises(ValueError, match=r"steps_per_execution=...\) takes a whole number, at least 1; received"):
        hl.fit(lambda x: {}, X, steps_per_execution=steps)


# ------------------------------------------------------------------------ in a run


class Calls(keras.callbacks.Callback):
    """Records the batches at which it is called."""

    def __init__(self, takes_executions):
        super().__init__()
        self.takes_executions, self.begun, self.ended = takes_executions, [], []

    def on_train_batch_begin(self, batch, logs=None):
        self.begun.append(batch)

    def on_train_batch_end(self, batch, logs=None):
        self.ended.append(batch)


def fit(steps, *callbacks, epochs=2, **options):
    keras.utils.set_random_seed(3)
    model = sequential(layers.Dense(4, "relu"), layers.Dropout(0.3), layers.Dense(1))
    compiled(model, keras.optimizers.Adam(0.01), metrics=["mae"], steps_per_execution=steps)
    options = {"batch_size": 8, "verbose": 0, "seed": 1} | options  # 9 batches, the last one smaller.
    model.fit(X, Y, epochs=epochs, callbacks=list(callbacks), **options)
    return model


@pytest.mark.parametrize("steps", [2, 4, 9, 100])
def test_steps_per_execution_changes_no_result(steps):
    one, several = fit(1), fit(steps)
    for name, values in one.history.history.items():
        close(several.history.history[name], values, rtol=1e-4)
    each_close(several.get_weights(), one.get_weights(), rtol=1e-3, atol=1e-5)
    assert int(several.optimizer.iterations) == 18


def test_steps_per_execution_changes_no_result_of_a_plain_step():
    def history(steps):
        keras.utils.set_random_seed(0)
        model, optimizer = keras.Sequential([layers.Dense(1)]), keras.optimizers.SGD(0.1)
        error = keras.metrics.MeanAbsoluteError()

        def step(x, y):
            loss = hl.minimize(lambda: ops.mean((model(x) - y) ** 2), model, optimizer)
            error.update_state(y, model(x))
            return {"loss": loss, "error": error}

        return hl.fit(step, (X, Y), epochs=3, verbose=0, steps_per_execution=steps).history

    one, two = history(1), history(2)
    for name, values in one.items():
        close(two[name], values)


@pytest.mark.parametrize(
    ("takes_executions", "begun", "ended"), [(False, range(9), range(9)), (True, [0, 4, 8], [3, 7, 8])]
)
def test_steps_per_execution_calls_a_callback_at_each_step_or_at_each_dispatch(takes_executions, begun, ended):
    calls = Calls(takes_executions)
    fit(1, calls, epochs=1, steps_per_execution=4)  # Of `fit`, over that of `compile`.
    assert (calls.begun, calls.ended) == (list(begun), list(ended))


def test_steps_per_execution_lets_callbacks_of_handloom_act_when_they_are_due():
    def rates(steps):
        seen = []

        def schedule(step, rate):
            seen.append(step)
            return rate * 0.9

        scheduler = hl.callbacks.LearningRateScheduler(schedule, every=hl.every(steps=5))
        model = fit(steps, scheduler, hl.callbacks.Throughput())
        return seen, float(model.optimizer.learning_rate), model.history.history["steps_per_second"]

    (seen, rate, speed), (expected, rate_of_one, _) = rates(4), rates(1)
    assert seen == expected == [0, 5, 10, 15]
    assert rate == rate_of_one
    assert all(steps > 0 for steps in speed)


def test_steps_per_execution_is_ignored_in_eager_execution():
    with hl.run_eagerly(True):
        assert int(fit(4).optimizer.iterations) == 18
