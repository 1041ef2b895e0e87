"""Several steps in one dispatch: which go together, and that the results are those of single steps."""

import keras
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import layers

import handloom as hl
from handloom._run.grouping import grouped
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


# ------------------------------------------------------------------------ in a run


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


@pytest.mark.parametrize(
    ("takes_executions", "begun", "ended"), [(False, range(9), range(9)), (True, [0, 4, 8], [3, 7, 8])]
)
def test_steps_per_execution_calls_a_callback_at_each_step_or_at_each_dispatch(takes_executions, begun, ended):
    numbers, count = {"begun": [], "ended": []}, keras.callbacks.Callback()
    count.takes_executions = takes_executions
    count.on_train_batch_begin = lambda batch, logs: numbers["begun"].append(batch)
    count.on_train_batch_end = lambda batch, logs: numbers["ended"].append(batch)
    fit(1, count, epochs=1, steps_per_execution=4)  # The option of `fit` counts, not that of `compile`.
    assert numbers == {"begun": list(begun), "ended": list(ended)}


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
