"""The rule by which checkpoints are kept, against a plain model of it."""

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from handloom.checkpoint import filesystem
from handloom.checkpoint.retention import Best, Slot, kept
from handloom.checkpoint.store import Store, read_newest, slots
from tests.checkpoint.common import Shim, draft, is_of, save

pytestmark = pytest.mark.once

METRICS = st.sampled_from([None, 0.0, 1.0, 2.0, -1.0, math.nan, math.inf, -math.inf])


@pytest.fixture
def fast(monkeypatch):
    """A system that flushes nothing: no test here survives a power cut."""

    class Hasty(Shim):
        def fsync(self, file):
            pass

    monkeypatch.setattr(filesystem, "os", Hasty(lambda name, arguments: None))


def expected(saved, keep, best):
    """The steps that remain after these saves, by the words of the documentation."""
    there = {}  # The number of the save to step and metric.
    for number, entry in enumerate(saved):
        there[number] = entry
        latest = {step: number for number, (step, _) in there.items()}  # A step saved again is replaced ...
        stay = {latest[step] for step in (sorted(latest)[-keep:] if keep else latest)}
        finite = {number: value for number, (_, value) in there.items() if value is not None and math.isfinite(value)}
        if best and finite:  # ... unless it is the best.
            value = (min if best.startswith("min") else max)(finite.values())
            step = min(there[number][0] for number in finite if finite[number] == value)
            stay.add(max(number for number in finite if there[number][0] == step and finite[number] == value))
        there = {number: entry for number, entry in there.items() if number in stay}
    return sorted(step for step, _ in there.values())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(st.tuples(st.integers(0, 2), METRICS), min_size=1, max_size=8),
    keep=st.sampled_from([1, 2, 3, None]),
    best=st.sampled_from([None, "min:loss", "max:loss"]),
    restarts=st.booleans(),
)
def test_store_keeps_the_last_and_the_best(tmp_path_factory, fast, steps, keep, best, restarts):
    directory = tmp_path_factory.mktemp("run")
    step, saved = 0, []
    store = Store(directory, keep, Best.of(best) if best else None)
    for more, metric in steps:
        step += more
        if restarts:  # A new process reads the metrics from the directory.
            store.close()
            store = Store(directory, keep, Best.of(best) if best else None)
        store.save(draft(step, {} if metric is None else {"loss": metric}))
        saved.append((step, metric))
        assert [slot.step for slot in slots(directory)] == expected(saved, keep, best)
        assert is_of(read_newest(directory)[0], step)
    store.close()


def test_store_saves_metrics_and_makes_infinity_nan(tmp_path):
    save(tmp_path, 1, metrics={"loss": 0.1, "accuracy": math.inf, "other": math.nan})
    assert repr(read_newest(tmp_path)[0].metrics) == "{'loss': 0.1, 'accuracy': nan, 'other': nan}"


@pytest.mark.parametrize("words", ["val_loss", "least:val_loss", "min:", "", 3])
def test_best_takes_a_direction_and_a_name(words):
    with pytest.raises(ValueError, match=r"best= takes 'min:METRIC' or 'max:METRIC'; received"):
        Best.of(words)
    assert Best.of("max:head:accuracy") == Best("head:accuracy", -1)


@settings(deadline=None)
@given(st.integers(0, 10**20), st.integers(0, 100))
def test_slot_is_known_by_its_name(step, again):
    assert Slot.of(Slot(step, again).name) == Slot(step, again)


@pytest.mark.parametrize(
    "name",
    [
        *("step_1", "step_0000000010", "step_000000001_0", "step_000000001_01", "step_-00000001", "step_"),
        *("step_000000001 ", "step_000000001\n", "step_000000001.tmp", "Step_000000001", ".writing"),
        "step_00000000\N{ARABIC-INDIC DIGIT ONE}",
    ],
)
def test_slot_ignores_other_names(name):
    assert Slot.of(name) is None


def test_kept_orders_slots_by_number_and_not_by_letters():
    slots = [Slot(2), Slot(10**9), Slot(999_999_999), Slot(2, 2), Slot(2, 10)]
    assert sorted(slots) == [Slot(2), Slot(2, 2), Slot(2, 10), Slot(999_999_999), Slot(10**9)]
    assert kept(slots, 2, None) == {Slot(10**9), Slot(999_999_999)}
    assert kept(slots, None, None) == {Slot(2, 10), Slot(10**9), Slot(999_999_999)}
    assert kept(slots, 1, Slot(2)) == {Slot(10**9), Slot(2)}
