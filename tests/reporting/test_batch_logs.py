"""The logs of batches are the dict that Keras gives, although they are read late."""

import copy
import json
import pickle

import keras
import numpy as np
import pytest
from keras import ops

import handloom as hl
from handloom._reporting import batch_logs
from handloom._reporting.logs import Sums
from tests.models import compiled, fit, functional
from tests.numbers import close, normal

X = np.arange(10, dtype="float32")  # In batches of 4: 0-3, 4-7, 8-9.
MEANS = [1.5, 3.5, 4.5]


class Keep(keras.callbacks.Callback):
    """Keeps the logs of all batches, unread."""

    def __init__(self):
        super().__init__()
        self.train, self.test = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.train.append(logs)

    def on_test_batch_end(self, batch, logs=None):
        self.test.append(logs)


def kept(**options):
    """The logs of three batches, kept until after the run."""
    keep, total = Keep(), keras.metrics.Sum()

    def step(x):
        total.update_state(x)
        return {"mean": ops.mean(x), "total": total}

    hl.fit(step, hl.Feed(X, batch_size=4), callbacks=[keep], verbose=0, **options)
    return keep.train


def test_batch_logs_that_a_callback_keeps_hold_the_values_of_their_batches(eagerly):
    expected = [{"mean": mean, "total": total} for mean, total in zip(MEANS, [6.0, 28.0, 45.0], strict=True)]
    assert kept(epochs=2) == expected * 2


def test_batch_logs_kept_by_fit_and_evaluate_are_those_of_keras():
    x, y = normal(10, 3), normal(10, 1, seed=1)
    models = [compiled(functional(cls=cls), metrics=["mae"]) for cls in (keras.Model, hl.Model)]
    models[1].set_weights(models[0].get_weights())
    theirs, ours = Keep(), Keep()
    for model, keep in zip(models, (theirs, ours), strict=True):
        fit(model, x, y, batch_size=4, epochs=2, validation_data=(x, y), callbacks=[keep])
        model.evaluate(x, y, batch_size=3, callbacks=[keep], verbose=0)
    for own, other in zip([*ours.train, *ours.test], [*theirs.train, *theirs.test], strict=True):
        assert list(own) == list(other)
        close(list(own.values()), list(other.values()))


def _arguments(**values):
    return values


def _updated(logs):
    found = {}
    found.update(logs)
    return found


def test_batch_logs_are_a_dict():
    uses = {
        "json": lambda logs: json.loads(json.dumps(logs)),
        "indented": lambda logs: json.loads(json.dumps(logs, indent=1)),
        "dict": dict,
        "copy": lambda logs: logs.copy(),
        "copied": copy.copy,
        "deeply": copy.deepcopy,
        "pickled": lambda logs: pickle.loads(pickle.dumps(logs)),
        "or": lambda logs: logs | {},
        "from the right": lambda logs: {} | logs,
        "unpacked": lambda logs: {**logs},
        "arguments": lambda logs: _arguments(**logs),
        "items": lambda logs: dict(logs.items()),
        "updated": _updated,
    }
    for name, use in uses.items():
        logs = kept()
        assert isinstance(logs[1], dict)
        seen = use(logs[1])
        assert (name, type(seen), seen) == (name, dict, {"mean": 3.5, "total": 28.0})


@pytest.mark.parametrize(
    ("use", "expected"),
    [
        (lambda logs: logs.get("mean"), 3.5),
        (lambda logs: logs.get("nothing", 2.0), 2.0),
        (lambda logs: "mean" in logs and "nothing" not in logs, True),
        (list, ["mean", "total"]),
        (lambda logs: list(reversed(logs)), ["total", "mean"]),
        (len, 2),
        (bool, True),
        (repr, "{'mean': 3.5, 'total': 28.0}"),
        (lambda logs: logs == {"mean": 3.5, "total": 28.0}, True),
        (lambda logs: logs != {"mean": 3.5, "total": 28.0}, False),
        (lambda logs: logs.pop("mean"), 3.5),
        (lambda logs: logs.setdefault("mean", 1.0), 3.5),
    ],
)
def test_batch_logs_answer_as_a_dict_does(use, expected):
    assert use(kept()[1]) == expected


def test_batch_logs_take_what_a_callback_writes_before_it_reads():
    logs = kept()[1]
    logs["new"] = 1.0
    logs.update(mean=-1.0)
    logs |= {"other": 2.0}
    del logs["total"]
    assert logs == {"mean": -1.0, "new": 1.0, "other": 2.0}


def test_batch_logs_kept_beyond_many_steps_hold_the_exact_mean():
    steps, keep = 2100, Keep()
    feed = hl.Feed(np.arange(steps, dtype="float32"), batch_size=1)
    hl.fit(lambda x: {"mean": ops.mean(x)}, feed, callbacks=[keep], verbose=0)
    close([keep.train[step]["mean"] for step in (0, 1023, 1024, 2099)], [0, 511.5, 512, 1049.5])


def test_batch_logs_are_not_read_unless_a_callback_reads_them(monkeypatch):
    reads, seen, original = [], [], Sums.add
    monkeypatch.setattr(Sums, "add", lambda self, waiting: (reads.append(self), original(self, waiting)))
    look = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append((logs, len(reads))))
    hl.fit(lambda x: {"mean": ops.mean(x)}, hl.Feed(X, batch_size=4), callbacks=[look], verbose=0)
    assert [count for _, count in seen] == [0, 0, 0]
    assert [logs["mean"] for logs, _ in seen] == MEANS


def test_batch_logs_are_copied_only_if_a_callback_keeps_them(monkeypatch):
    copied = []
    monkeypatch.setattr(batch_logs.BatchLogs, "keep", copied.append)
    look = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: None)
    hl.fit(lambda x: {"mean": ops.mean(x)}, hl.Feed(X, batch_size=4), callbacks=[look], verbose=0)
    assert not copied
