"""`hl.fit` with plain steps: epochs, validation, what a step is given, and what an interrupt leaves behind."""

import functools
import gc
import os
import signal
import threading

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.errors import DataError, HandloomWarning, StepError
from tests.run.run_log import epochs_in

X = np.arange(40, dtype="float32")  # In batches of 10: means 4.5, 14.5, 24.5, 34.5.


def mean(x):
    return {"mean": ops.mean(x)}


def fit(step=mean, data=None, **arguments):
    data = hl.Feed(X, batch_size=10) if data is None else data
    return hl.fit(step, data, **({"verbose": 0} | arguments))


def counter():
    """A step that counts itself in a variable, and the variable."""
    count = keras.Variable(0.0, trainable=False)

    def step(x):
        count.assign(count + 1)
        return {"count": count.value}

    return step, count


def hook(**hooks):
    return keras.callbacks.LambdaCallback(**hooks)


# ---------------------------------------------------------------------- epochs


def test_an_epoch_is_one_pass_over_the_data(eagerly):
    step, count = counter()
    history = fit(step, epochs=3)
    assert float(count) == 12
    assert history.epoch == [0, 1, 2]
    assert history.history == {"count": [2.5, 6.5, 10.5]}
    assert history.params["steps"] == 4


def test_arrays_come_in_batches_of_32():
    step, count = counter()
    fit(step, X)
    assert float(count) == 2


def test_no_epochs_are_no_steps():
    events = []
    history = fit(
        epochs=0,
        callbacks=[
            hook(on_train_begin=lambda logs: events.append("begin"), on_train_end=lambda logs: events.append("end"))
        ],
    )
    assert (history.history, history.epoch, events) == ({}, [], ["begin", "end"])


def test_with_steps_per_epoch_passes_follow_on_each_other(eagerly):
    history = fit(epochs=4, steps_per_epoch=3)
    np.testing.assert_allclose(history.history["mean"], [14.5, 53.5 / 3, 63.5 / 3, 24.5], rtol=1e-6)


def test_a_generator_is_read_over_several_epochs():
    history = fit(data=(X[start : start + 10] for start in range(0, 40, 10)), epochs=2, steps_per_epoch=2)
    assert history.history["mean"] == [9.5, 29.5]


def test_data_that_runs_out_within_an_epoch_gives_a_warning():
    batches = (X[start : start + 10] for start in range(0, 40, 10))
    with pytest.warns(HandloomWarning, match=r"ran out after 4 of 6 steps .* Pass a function that returns a new"):
        history = fit(data=batches, steps_per_epoch=6)
    assert history.history["mean"] == [19.5]


def test_a_generator_without_steps_per_epoch_lasts_for_one_epoch():
    assert fit(data=(X[:10] for _ in range(2))).history["mean"] == [4.5]
    with pytest.raises(DataError, match=r"generator is exhausted.* Pass a function .* or set steps_per_epoch"):
        fit(data=(X[:10] for _ in range(2)), epochs=2)


def test_a_function_of_data_gives_an_iterator_for_each_epoch():
    assert fit(data=lambda: iter([X[:10], X[10:20]]), epochs=2).history["mean"] == [9.5, 9.5]


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "value"), [("epochs", -1), ("epochs", 1.5), ("epochs", True), ("steps_per_epoch", 0), ("epochs", None)]
)
def test_numbers_that_count_nothing_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"fit\({name}=...\) takes a whole number, at least [01]; received {value}"):
        fit(**{name: value})


@pytest.mark.once
def test_numpy_integers_count():
    assert len(fit(epochs=np.int64(2), steps_per_epoch=np.int32(3)).epoch) == 2


def test_the_history_is_that_of_keras():
    history = fit(epochs=2)
    assert isinstance(history, keras.callbacks.History)
    assert history.history == {"mean": [19.5, 19.5]}
    assert all(type(value) is float for value in history.history["mean"])


# ------------------------------------------------------- what a step is called with


def sums(*batch):
    return {f"part{index}": ops.sum(part) for index, part in enumerate(batch)}


ONES = np.ones(10, dtype="float32")


@pytest.mark.parametrize(
    ("step", "data"),
    [
        (lambda x: sums(x), ONES),  # noqa: PLW0108
        (lambda data: sums(*data), (ONES, 2 * ONES)),
        (lambda x, y: sums(x, y), (ONES, 2 * ONES)),  # noqa: PLW0108
        (sums, (ONES, 2 * ONES, 3 * ONES)),
        (lambda x, *rest: sums(x, *rest), (ONES, 2 * ONES, 3 * ONES)),  # noqa: PLW0108
        (lambda x, y, z=None: sums(x, y), (ONES, 2 * ONES)),
        (lambda x, y, *, scale=1: sums(x, y), (ONES, 2 * ONES)),  # noqa: PLW0108
        (lambda x: sums(x["a"], x["b"]), {"a": ONES, "b": 2 * ONES}),
        (lambda x, y: sums(x["a"], y), ({"a": ONES}, 2 * ONES)),
        (lambda x: sums(*x), [ONES, 2 * ONES]),
    ],
    ids=["x", "a tuple", "x, y", "*parts", "x, *rest", "a default", "by keyword", "a dict", "dict, y", "a list"],
)
def test_a_step_with_several_arguments_is_given_the_parts_of_a_batch_and_one_with_one_the_whole(step, data):
    with hl.run_eagerly(True):
        history = fit(step, hl.Feed(data, batch_size=10)).history
    assert history == {f"part{index}": [10.0 * (index + 1)] for index in range(len(history))}
    assert len(history) == (1 if data is ONES else len(data))


@pytest.mark.parametrize("kind", ["method", "partial", "object", "compiled"])
def test_a_step_is_anything_that_can_be_called(kind):
    class Holder:
        def method(self, x, y):
            return sums(x, y)

        __call__ = method

    holder = Holder()
    step = {
        "method": holder.method,
        "partial": functools.partial(lambda scale, x, y: sums(scale * x, y), 1.0),
        "object": holder,
        "compiled": hl.function(holder.method),
    }[kind]
    assert fit(step, hl.Feed((ONES, 2 * ONES), batch_size=10)).history == {"part0": [10.0], "part1": [20.0]}


def test_an_argument_called_sample_weight_weighs_the_averages(eagerly):
    weights = np.repeat([1.0, 3.0, 0.5, 0.5], 10).astype("float32")

    def step(x, sample_weight):
        return {"mean": ops.sum(x * sample_weight) / ops.sum(sample_weight)}

    history = fit(step, hl.Feed((X, weights), batch_size=10), epochs=2).history
    np.testing.assert_allclose(history["mean"], [(4.5 + 3 * 14.5 + 0.5 * 24.5 + 0.5 * 34.5) / 5] * 2, rtol=1e-6)


def test_without_weights_in_the_data_examples_count():
    def step(x, y, sample_weight=None):
        return {"mean": ops.mean(x)}

    np.testing.assert_allclose(fit(step, hl.Feed((X, X), batch_size=25)).history["mean"], [X.mean()], rtol=1e-6)


@pytest.mark.parametrize(
    ("step", "data", "words"),
    [
        (lambda x, y: {}, ONES, r"<lambda>\(x, y\) cannot be called with a batch of 1 part\(s\): missing .*'y'"),
        (lambda x, y: {}, (ONES, ONES, ONES), r"batch of 3 part\(s\): too many .* unless the step takes a single one"),
    ],
)
def test_a_step_that_cannot_be_called_with_a_batch_is_told_what_a_batch_is(step, data, words, eagerly):
    with pytest.raises(StepError, match=words):
        fit(step, data)


@pytest.mark.once
@pytest.mark.parametrize("step", [None, 3, "step", {"loss": 1.0}])
def test_a_step_that_is_no_function_is_refused(step):
    with pytest.raises(StepError, match=r"A step is a function of a batch; received"):
        fit(step)


def test_a_step_trains_what_it_likes_without_being_told():
    """The closed form of least squares by gradient descent, step by step."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 2)).astype("float32")
    y = x @ np.float32([1.0, -2.0])
    w = keras.Variable(np.zeros(2, dtype="float32"))
    optimizer = keras.optimizers.SGD(0.1)

    def step(x, y):
        return {"loss": hl.minimize(lambda: ops.mean((ops.matmul(x, w) - y) ** 2), w, optimizer)}

    expected, losses = np.zeros(2), []
    for _ in range(5):
        error = x @ expected - y
        losses.append(np.mean(error**2))
        expected -= 0.1 * 2 * x.T @ error / 20
    history = fit(step, hl.Feed((x, y), batch_size=20), epochs=5).history
    np.testing.assert_allclose(history["loss"], losses, rtol=1e-4)
    np.testing.assert_allclose(ops.convert_to_numpy(w), expected, rtol=1e-4)


# ------------------------------------------------------------------- validation


def test_a_pair_of_step_and_data_is_validated_at_the_end_of_each_epoch(eagerly):
    history = fit(epochs=2, validate=(mean, X[:8])).history
    assert history == {"mean": [19.5, 19.5], "val_mean": [3.5, 3.5]}


def test_validation_sees_what_was_trained():
    step, count = counter()
    history = fit(step, epochs=2, validate=[lambda x: {"count": count.value}, hl.Feed(X[:5], batch_size=5)]).history
    assert history["val_count"] == [4, 8]


def test_validation_data_is_read_from_its_beginning_each_time():
    history = fit(epochs=2, validate=(mean, hl.Feed(X, batch_size=30)), validate_every=hl.every(steps=2)).history
    assert history["val_mean"] == [19.5, 19.5]


def test_a_function_is_asked_for_results():
    asked = []

    def validate():
        asked.append(True)
        return {"score": ops.ones(()) * len(asked), "number": 3}

    history = fit(epochs=2, validate=validate).history
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
def test_validation_runs_when_it_is_due_and_an_epoch_reports_its_last(when, steps, reported):
    step, count = counter()
    ran = []

    def validate():
        ran.append(int(count))
        return {"step": ran[-1]}

    history = fit(step, epochs=3, validate=validate, validate_every=when).history
    assert ran == steps
    assert history.get("val_step") == reported


def test_validation_within_an_epoch_leaves_the_metrics_of_training_alone(eagerly):
    metric = keras.metrics.Mean()

    def step(x):
        metric.update_state(x)
        return {"metric": metric}

    history = fit(step, epochs=2, validate=(step, X + 100), validate_every=hl.every(steps=3)).history
    assert history == {"metric": [19.5, 19.5], "val_metric": [119.5, 119.5]}


def test_callbacks_hear_of_validation():
    events = []
    fit(validate=(mean, hl.Feed(X, batch_size=20)), callbacks=[Hearing(events)])
    assert events == ["begin", "batch", "batch", {"mean": 19.5}]


class Hearing(keras.callbacks.Callback):
    def __init__(self, events):
        super().__init__()
        self.events = events

    def on_test_begin(self, logs=None):
        self.events.append("begin")

    def on_test_batch_end(self, batch, logs=None):
        self.events.append("batch")

    def on_test_end(self, logs=None):
        self.events.append(logs)


@pytest.mark.once
@pytest.mark.parametrize(
    "wrong", [3, "mean", (mean,), (mean, X, X), (3, X)], ids=["number", "text", "one", "three", "no step"]
)
def test_what_is_no_validation_is_refused(wrong):
    with pytest.raises(StepError, match=r"validate takes a pair \(step, data\), or a function without arguments"):
        fit(validate=wrong)


@pytest.mark.once
def test_a_function_of_validation_that_returns_no_dict_is_told_so():
    with pytest.raises(StepError, match=r"given as validate must return a dict of numbers.*it returned 0\.5"):
        fit(validate=lambda: 0.5)


@pytest.mark.once
def test_a_number_is_no_time_to_validate():
    with pytest.raises(TypeError, match=r"validate_every takes hl\.every\(epochs=1\); received 2"):
        fit(validate=(mean, X), validate_every=2)


# -------------------------------------------------------------------- callbacks


def test_callbacks_know_the_first_model_in_the_state():
    model = keras.Sequential([keras.Input((1,)), layers.Dense(1)])
    seen = []

    class Look(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            seen.append(self.model)

    fit(state={"optimizer": keras.optimizers.SGD(), "nested": [model]}, callbacks=[Look()])
    fit(callbacks=[Look()])
    assert seen[0] is model
    assert not isinstance(seen[1], keras.Model)


def test_a_model_in_the_state_gets_its_best_weights_back():
    model = keras.Sequential([keras.Input((1,)), layers.Dense(1, use_bias=False, kernel_initializer="zeros")])
    kernel = model.layers[0].kernel

    def step(x):
        kernel.assign(kernel + 1)
        return {"loss": ops.sum((kernel - 2) ** 2)}

    stopping = keras.callbacks.EarlyStopping("loss", patience=2, restore_best_weights=True)
    history = fit(step, X[:10], epochs=10, state={"model": model}, callbacks=[stopping])
    assert history.history["loss"] == [1, 0, 1, 4]
    assert model.get_weights()[0] == [[2]]


def test_an_optimizer_in_the_state_follows_a_schedule():
    optimizer = keras.optimizers.SGD(0.5)
    schedule = keras.callbacks.LearningRateScheduler(lambda epoch: [0.25, 0.125][epoch])
    rates = fit(epochs=2, state={"optimizer": optimizer}, callbacks=[schedule]).history["learning_rate"]
    assert rates == [0.25, 0.125]
    assert float(optimizer.learning_rate) == 0.125


@pytest.mark.parametrize("with_model", [True, False], ids=["a model", "no model"])
def test_training_stops_when_a_callback_says_so(with_model):
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = batch == 1

    state = {"model": keras.Sequential([layers.Dense(1)])} if with_model else None
    step, count = counter()
    assert fit(step, epochs=3, state=state, callbacks=[Stop()]).epoch == [0]
    assert float(count) == 2
    assert fit(step, epochs=3, state=state).epoch == [0, 1, 2]


# ----------------------------------------------------------- what is seen and kept


def test_a_run_directory_holds_the_log_as_json_lines(tmp_path):
    directory = tmp_path / "runs" / "first"
    fit(epochs=2, run_dir=directory, validate=(mean, X[:3]))
    lines = epochs_in(directory)
    assert [(line["epoch"], line["step"], line["mean"], line["val_mean"]) for line in lines] == [
        (1, 4, 19.5, 1.0),
        (2, 8, 19.5, 1.0),
    ]
    fit(epochs=3, run_dir=str(directory))  # Goes on: one epoch more.
    assert len(epochs_in(directory)) == 3


def test_without_a_run_directory_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(epochs=2, validate=(mean, X))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.once
def test_silence_a_line_an_epoch_and_the_usual_elsewhere_than_in_a_terminal(capsys):
    for verbose, lines in [(0, 0), (2, 2), ("auto", 2)]:
        fit(epochs=2, verbose=verbose)
        assert len(capsys.readouterr().out.splitlines()) == lines


@pytest.mark.once
def test_a_bar_shows_the_values(capsys):
    fit(verbose=1)
    assert "mean 19.5" in capsys.readouterr().out


@pytest.mark.once
@pytest.mark.parametrize("verbose", [3, -1, "loud", None])
def test_another_verbose_is_refused(verbose):
    with pytest.raises(ValueError, match=r"verbose takes 0 \(silent\), 1 \(bar\), 2"):
        fit(verbose=verbose)


# ---------------------------------------------------- interrupts and exceptions


class Trainer:
    """Adam on a small problem, with all that a step changes: weights, slots, a seed, a count."""

    def __init__(self):
        self.weights = keras.Variable(np.ones(3, dtype="float32"))
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
        return [ops.convert_to_numpy(variable) for variable in [*self.optimizer.variables, self.weights, self.count]]

    @property
    def steps(self):
        return int(self.optimizer.iterations)

    def fit(self, *callbacks, **arguments):
        return fit(self.step, hl.Feed(X[:12] / 12, batch_size=1), callbacks=callbacks, **arguments)


@functools.cache
def unbroken_run(epochs, eagerly):
    """What the state is after every number of steps."""
    trainer, states = Trainer(), []
    states.append(trainer.state)
    trainer.fit(hook(on_train_batch_end=lambda batch, logs: states.append(trainer.state)), epochs=epochs)
    return states


@pytest.fixture
def states(eagerly):
    return unbroken_run(2, eagerly)


def assert_consistent(trainer, states):
    for one, other in zip(trainer.state, states[trainer.steps], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


def assert_trains_on(trainer, states):
    """To the same end as an unbroken run, from the start of an epoch on."""
    steps = trainer.steps
    assert_consistent(trainer, states)
    trainer.fit()
    assert trainer.steps == steps + 12


@pytest.mark.parametrize("moment", ["on_train_batch_begin", "on_train_batch_end", "on_epoch_end"])
def test_ctrl_c_between_steps_leaves_what_the_steps_made(moment, states):
    trainer = Trainer()

    def interrupt(*_):
        if trainer.steps >= 5:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        trainer.fit(hook(**{moment: interrupt}), epochs=2)
    assert trainer.steps == (12 if moment == "on_epoch_end" else 5)
    assert_trains_on(trainer, states)


def once(function, *args):
    """A function that does something the first time only: a step is traced more than once."""
    left = [True]
    return lambda: left and left.pop() and function(*args)


def test_ctrl_c_within_a_step_waits_for_its_end(states):
    trainer = Trainer()
    trainer.before_update = once(signal.raise_signal, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert trainer.steps == 1
    assert_trains_on(trainer, states)


def test_ctrl_c_twice_within_the_first_step_ends_it_at_once(states):
    trainer = Trainer()

    def interrupt_twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    trainer.before_update = interrupt_twice
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert trainer.steps == 0
    trainer.before_update = lambda: None
    assert_trains_on(trainer, states)


@pytest.fixture
def _no_collection():
    """JAX runs Python while garbage is collected, where Python loses every exception, that of Ctrl-C too."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collection")
def test_ctrl_c_at_any_moment_leaves_a_whole_number_of_steps(states, eagerly):
    for delay in (0.0001, 0.001, 0.003, 0.01):
        trainer = Trainer()
        timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
        begin = once(timer.start)
        with pytest.raises(KeyboardInterrupt):
            trainer.fit(hook(on_train_batch_end=lambda batch, logs, begin=begin: begin()), epochs=10_000)
        timer.join()
        unbroken = states if trainer.steps < len(states) else unbroken_run(trainer.steps // 12 + 1, eagerly)
        assert_trains_on(trainer, unbroken)


def test_the_users_own_handler_of_ctrl_c_is_called_and_put_back(eagerly):
    trainer, heard = Trainer(), []

    def handler(*_):
        heard.append(trainer.steps)

    before = signal.signal(signal.SIGINT, handler)
    try:
        trainer.before_update = once(signal.raise_signal, signal.SIGINT)
        trainer.fit()
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert (heard, trainer.steps) == ([1], 12)


def test_training_in_another_thread_works(eagerly):
    trainer = Trainer()
    thread = threading.Thread(target=trainer.fit)
    thread.start()
    thread.join()
    assert trainer.steps == 12


class Broken(Exception):
    """Something in a user's code."""


@pytest.mark.parametrize("moment", ["on_train_begin", "on_train_batch_begin", "on_train_batch_end"])
def test_an_exception_in_a_callback_comes_out_and_training_goes_on_afterwards(moment, states):
    trainer = Trainer()

    def fail(*_):
        if trainer.steps >= 5 or "batch" not in moment:
            raise Broken

    with pytest.raises(Broken):
        trainer.fit(hook(**{moment: fail}))
    assert trainer.steps == (5 if "batch" in moment else 0)
    assert_trains_on(trainer, states)


def test_an_exception_in_a_step_comes_out_and_training_goes_on_afterwards(states):
    trainer = Trainer()

    def fail():
        raise Broken

    trainer.before_update = fail
    with pytest.raises(Broken):
        trainer.fit()
    assert trainer.steps == 0
    trainer.before_update = lambda: None
    assert_trains_on(trainer, states)


def test_an_exception_in_the_data_comes_out_and_training_goes_on_afterwards(states):
    trainer = Trainer()

    def batches():
        yield from (X[start : start + 1] / 12 for start in range(5))
        raise Broken

    with pytest.raises(Broken):
        fit(trainer.step, batches)
    assert trainer.steps == 5
    assert_trains_on(trainer, states)
