"""`hl.fit` with plain steps: epochs, arguments of the step, validation, interrupts and exceptions."""

import functools
import gc
import os
import signal
import threading

import keras
import numpy as np
import pytest
from keras import ops

import handloom as hl
from handloom._run.grouping import limited
from handloom.errors import ArgumentError, HandloomWarning, StepError
from tests.numbers import close, each_close, numpy, ones

X = np.arange(40, dtype="float32")  # In batches of 10: means 4.5, 14.5, 24.5, 34.5.
hook = keras.callbacks.LambdaCallback


def mean(x):
    return {"mean": ops.mean(x)}


def fit(step=mean, data=None, **options):
    data = hl.Feed(X, batch_size=10) if data is None else data
    return hl.fit(step, data, **({"verbose": 0} | options))


def counter():
    """A step that counts itself in a variable, and the variable."""
    count = keras.Variable(0.0, trainable=False)

    def step(x):
        count.assign(count + 1)
        return {"count": count.value}

    return step, count


# ------------------------------------------------------------------------- epochs


def test_fit_takes_one_pass_over_the_data_per_epoch_and_returns_the_history_of_keras(eagerly):
    step, count = counter()
    history = fit(step, epochs=3)
    assert isinstance(history, keras.callbacks.History)
    assert (history.epoch, history.history, history.params["steps"]) == ([0, 1, 2], {"count": [2.5, 6.5, 10.5]}, 4)
    assert all(type(value) is float for value in history.history["count"])
    close(count, 12)


def test_fit_takes_no_steps_for_no_epochs():
    events = []
    history = fit(epochs=0, callbacks=[hook(on_train_begin=events.append, on_train_end=events.append)])
    assert (history.history, history.epoch, events) == ({}, [], [{}, {}])


def test_fit_with_steps_per_epoch_reads_on_where_the_epoch_before_ended(eagerly):
    history = fit(epochs=np.int64(4), steps_per_epoch=np.int32(3))
    close(history.history["mean"], [14.5, 53.5 / 3, 63.5 / 3, 24.5])


def test_fit_warns_when_the_data_runs_out_within_an_epoch():
    batches = (X[start : start + 10] for start in range(0, 40, 10))
    with pytest.warns(HandloomWarning, match=r"after 4 of 6 steps.*at most 4 steps.*pass a function .*HL751"):
        assert fit(data=batches, steps_per_epoch=6).history["mean"] == [19.5]


@pytest.mark.once
def test_limited_gives_no_batch_for_zero_steps_and_all_for_none():
    assert [list(limited(iter("abc"), steps)) for steps in (0, 2, None)] == [[], ["a", "b"], ["a", "b", "c"]]


@pytest.mark.once
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epochs": -1}, r"fit\(epochs=...\) takes a whole number, at least 0; received -1"),
        ({"epochs": 1.5}, "at least 0; received 1.5"),
        ({"epochs": True}, "at least 0; received True"),
        ({"steps_per_epoch": 0}, r"fit\(steps_per_epoch=...\) takes a whole number, at least 1; received 0"),
        ({"steps_per_execution": 0}, r"fit\(steps_per_execution=...\) takes a whole number, at least 1; received 0"),
        ({"seed": 1.5}, r"fit\(seed=...\) takes a whole number, at least 0; received 1.5"),
        ({"seed": 2**31}, r"fit\(seed=...\) takes a number up to 2147483647; received 2147483648.*HL031"),
        ({"resume": "yes"}, r"resume takes 'auto', 'exact' or 'never'; received 'yes'.*HL006"),
        (
            {"save": 3},
            r"save takes hl\.every\(epochs=1\), or None; received 3\. .*=hl\.every\(steps=3\) or",
        ),
        ({"allow": "state.*"}, r"allow takes a list; .* Pass \['state\.\*'\].*HL007"),
        ({"validate_every": 2}, r"validate_every takes hl\.every\(epochs=1\); received 2"),
        ({"validate": lambda: 0.5}, r"validate\(\) returned 0\.5.*Return numbers in a dict.*HL211"),
        *(
            ({"validate": wrong}, r"validate received .*Pass a pair \(step, data\), the step first, or a .*HL210")
            for wrong in (3, "mean", (mean,), (mean, X, X), (3, X), (X, mean))
        ),
    ],
)
def test_fit_refuses_an_option(options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        fit(**options)


# ---------------------------------------------------------- arguments of the step


def sums(*batch):
    return {f"part{index}": ops.sum(part) for index, part in enumerate(batch)}


class Holder:
    def method(self, x, y):
        return sums(x, y)

    __call__ = method


ONES = ones(10)
TWO = (ONES, 2 * ONES)


STEPS = {
    "x": (lambda x: sums(x), ONES),  # noqa: PLW0108
    "a tuple": (lambda data: sums(*data), TWO),
    "x, y": (lambda x, y: sums(x, y), TWO),  # noqa: PLW0108
    "*parts": (sums, (ONES, 2 * ONES, 3 * ONES)),
    "x, *rest": (lambda x, *rest: sums(x, *rest), (ONES, 2 * ONES, 3 * ONES)),  # noqa: PLW0108
    "a default": (lambda x, y, z=None: sums(x, y), TWO),
    "by keyword": (lambda x, y, *, scale=1: sums(x, y), TWO),  # noqa: PLW0108
    "a dict": (lambda x: sums(x["a"], x["b"]), {"a": ONES, "b": 2 * ONES}),
    "dict, y": (lambda x, y: sums(x["a"], y), ({"a": ONES}, 2 * ONES)),
    "a list": (lambda x: sums(*x), [ONES, 2 * ONES]),
    "a method": (Holder().method, TWO),
    "an object": (Holder(), TWO),
    "a partial": (functools.partial(lambda scale, x, y: sums(scale * x, y), 1.0), TWO),
    "a compiled function": (hl.function(Holder().method), TWO),
}


@pytest.mark.parametrize(("step", "data"), STEPS.values(), ids=STEPS)
def test_fit_passes_a_step_with_several_arguments_the_parts_of_a_batch_and_any_other_the_whole(step, data):
    with hl.run_eagerly(True):
        history = fit(step, hl.Feed(data, batch_size=10)).history
    assert history == {f"part{index}": [10.0 * (index + 1)] for index in range(len(history))}
    assert len(history) == (1 if data is ONES else len(data))


def test_fit_weights_the_averages_by_examples_where_the_data_has_no_sample_weights():
    history = fit(lambda x, y, sample_weight=None: {"mean": ops.mean(x)}, hl.Feed((X, X), batch_size=25)).history
    close(history["mean"], [X.mean()])


@pytest.mark.parametrize(
    ("step", "data", "words"),
    [
        (lambda x, y: {}, ONES, r"<lambda>\(x, y\) cannot take a batch of 1 parts: missing .*'y'"),
        (lambda x, y: {}, (ONES, ONES, ONES), r"batch of 3 parts: too many .* takes only one argument.*HL206"),
        (None, ONES, r"The step is an object of type NoneType, .*Pass a function of a batch.*HL251"),
        ((ONES, ONES), mean, r"step is an object of type tuple, .* then the data: hl\.fit\(step, data\)\. \[HL251\]$"),
    ],
)
def test_fit_refuses_a_step_that_it_cannot_call(step, data, words, eagerly):
    with pytest.raises(StepError, match=words):
        fit(step, data)


# --------------------------------------------------------------------- validation


def test_fit_validates_with_a_step_on_all_of_its_data_at_the_end_of_each_epoch(eagerly):
    history = fit(epochs=2, validate=(mean, X[:8])).history
    assert history == {"mean": [19.5, 19.5], "val_mean": [3.5, 3.5]}


def test_fit_validates_by_a_function():
    calls = iter(range(1, 9))
    history = fit(epochs=2, validate=lambda: {"score": ops.ones(()) * next(calls), "number": 3}).history
    assert (history["val_score"], history["val_number"]) == ([1.0, 2.0], [3.0, 3.0])


@pytest.mark.parametrize(
    ("when", "steps", "reported"),
    [
        (hl.every(epochs=1), [4, 8, 12], [4, 8, 12]),
        (hl.every(epochs=2), [8], [8]),
        (hl.every(steps=3), [3, 6, 9, 12], [3, 6, 12]),
        (hl.every(steps=5), [5, 10], [5, 10]),
        (hl.every(steps=20), [], None),
        (hl.every(seconds=1e-9), list(range(1, 13)), [4, 8, 12]),
        (hl.every(seconds=3600), [], None),
    ],
    ids=str,
)
def test_fit_validates_when_it_is_due_and_reports_the_last_results_of_an_epoch(when, steps, reported):
    step, count = counter()
    ran = []

    def validate():
        ran.append(int(count))
        return {"step": ran[-1]}

    history = fit(step, epochs=3, validate=validate, validate_every=when).history
    assert ran == steps
    assert history.get("val_step") == reported


def test_fit_keeps_metrics_and_averages_while_it_validates_within_an_epoch(eagerly):
    metric = keras.metrics.Mean()

    def step(x):
        metric.update_state(x)
        return {"metric": metric} | mean(x)

    validate = (step, hl.Feed(X + 100, batch_size=30))
    history = fit(step, epochs=2, validate=validate, validate_every=hl.every(steps=3)).history
    assert history == {"metric": [19.5] * 2, "mean": [19.5] * 2, "val_metric": [119.5] * 2, "val_mean": [119.5] * 2}


def test_fit_stops_without_a_model_when_a_callback_says_so():
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = batch == 1

    step, count = counter()
    assert fit(step, epochs=3, callbacks=[Stop()]).epoch == [0]
    close(count, 2)
    assert fit(step, epochs=3).epoch == [0, 1, 2]


# ------------------------------------------------------- interrupts and exceptions


class Trainer:
    """Adam on a small problem, with everything that a step changes: weights, slots, a count."""

    def __init__(self):
        self.weights = keras.Variable(ones(3))
        self.optimizer = keras.optimizers.Adam(0.1)
        self.optimizer.build([self.weights])
        self.count = keras.Variable(0.0, trainable=False)
        self.before_update = lambda: None

    def step(self, x):
        self.before_update()
        self.count.assign(self.count + 1)
        loss = hl.minimize(lambda: ops.sum((self.weights * x[0] - 1) ** 2), self.weights, self.optimizer)
        return {"loss": loss}

    @property
    def state(self):
        return [numpy(variable) for variable in [*self.optimizer.variables, self.weights, self.count]]

    @property
    def steps(self):
        return int(self.optimizer.iterations)

    def fit(self, data=None, epochs=1, **hooks):
        data = hl.Feed(X[:12] / 12, batch_size=1) if data is None else data
        return fit(self.step, data, epochs=epochs, callbacks=[hook(**hooks)])


@functools.cache
def unbroken_run(epochs, eagerly):
    """The state after every number of steps."""
    trainer, states = Trainer(), []
    states.append(trainer.state)
    trainer.fit(on_train_batch_end=lambda batch, logs: states.append(trainer.state), epochs=epochs)
    return states


def assert_trains_on(trainer, eagerly):
    """The state is that of an unbroken run after a whole number of steps, and the next run begins at its beginning."""
    steps = trainer.steps
    each_close(trainer.state, unbroken_run(max(steps // 12 + 1, 2), eagerly)[steps], atol=1e-7)
    trainer.before_update = lambda: None
    trainer.fit()
    assert trainer.steps == steps + 12


def once(function, *args):
    """A function that acts on its first call only: a step is traced more than once."""
    left = [True]
    return lambda: left and left.pop() and function(*args)


def interrupt():
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("moment", ["on_train_batch_begin", "on_train_batch_end", "on_epoch_end"])
def test_fit_keeps_whole_steps_after_ctrl_c_between_two(moment, eagerly):
    trainer = Trainer()
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(**{moment: lambda *_: trainer.steps >= 5 and interrupt()}, epochs=2)
    assert trainer.steps == (12 if moment == "on_epoch_end" else 5)
    assert_trains_on(trainer, eagerly)


@pytest.mark.parametrize(("times", "steps"), [(1, 1), (2, 0)], ids=["once, at its end", "twice, at once"])
def test_fit_is_interrupted_by_ctrl_c_within_a_step(times, steps, eagerly):
    trainer = Trainer()
    trainer.before_update = once(lambda: [interrupt() for _ in range(times)])
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert trainer.steps == steps
    assert_trains_on(trainer, eagerly)


@pytest.fixture
def _no_collection():
    """JAX runs Python while garbage is collected, where Python loses every exception, that of Ctrl-C too."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collection")
def test_fit_keeps_whole_steps_after_ctrl_c_at_any_moment(eagerly):
    for delay in (0.0001, 0.001, 0.003, 0.01):
        trainer = Trainer()
        timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
        begin = once(timer.start)
        with pytest.raises(KeyboardInterrupt):
            trainer.fit(on_train_batch_end=lambda batch, logs, begin=begin: begin(), epochs=10_000)
        timer.join()
        assert_trains_on(trainer, eagerly)


class Broken(Exception):
    """An error in the user's code, which cannot be created again from its message."""

    def __init__(self, what, when):
        super().__init__(f"{what} broke at {when}")
        self.when = when


def broken(*_):
    raise Broken("It", 5)


@pytest.mark.parametrize(
    ("where", "steps"),
    [("on_train_begin", 0), ("on_train_batch_begin", 5), ("on_train_batch_end", 5), ("step", 0), ("data", 5)],
)
def test_fit_raises_an_exception_of_the_user_unchanged_and_keeps_whole_steps(where, steps, eagerly):
    def batches():
        yield from (X[start : start + 1] / 12 for start in range(5))
        broken()

    trainer, hooks = Trainer(), {}
    if where == "step":
        trainer.before_update = broken
    elif where != "data":
        hooks[where] = lambda *_: trainer.steps >= steps and broken()
    with pytest.raises(Broken, match="It broke at 5") as caught:
        trainer.fit(batches if where == "data" else None, **hooks)
    assert caught.value.when == 5
    assert trainer.steps == steps
    assert_trains_on(trainer, eagerly)


def test_fit_refuses_arrays_one_by_one_and_options_of_a_feed_and_says_what_to_type():
    with pytest.raises(ArgumentError, match=r"hl\.fit takes its data as one .* hl\.fit\(step, \(x, y\)\)\. \[HL035\]"):
        hl.fit(lambda x, y: {}, ones(4, 1), ones(4, 1))
    for option in ({"batch_size": 32}, {"shuffle": True}, {"drop_remainder": True}):
        [(name, value)] = option.items()
        with pytest.raises(
            ArgumentError, match=rf"no argument {name}\..* hl\.Feed\(\(x, y\), {name}={value}\)\. \[HL036\]"
        ):
            hl.fit(lambda x, y: {}, (ones(4, 1), ones(4, 1)), **option)
    for name, fix in (("epoch", r"Did you mean epochs\?"), ("validation_data", r".*validate=\(test_step, data\)\.")):
        with pytest.raises(ArgumentError, match=rf"hl\.fit has no argument {name}\. {fix} \[HL036\]"):
            hl.fit(lambda x: {}, ones(4, 1), **{name: 3})
    with pytest.raises(TypeError, match="unexpected keyword argument 'zzz'"):
        hl.fit(lambda x: {}, ones(4, 1), zzz=3)
