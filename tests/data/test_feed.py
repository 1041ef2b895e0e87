"""Feeds: any source of batches, with a position."""

import gc
import multiprocessing
import tempfile
import threading
import time

import keras
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

import handloom as hl
from handloom._data.sources import processes
from handloom.errors import ArgumentError, DataError, HandloomWarning
from tests.data.sources.kinds import ALL, Batches, as_numbers, batches, read
from tests.numbered import Killed, Numbered, Processes, X, Y
from tests.numbers import close, numpy, same

SIZED = ["arrays", "tf.data", "DataLoader", "PyDataset", "PyDataset with threads"]
UNSIZED = ["function", "iterable", "tf.data of Python", "streamed DataLoader"]
every_source = pytest.mark.parametrize("kind", [*SIZED, *UNSIZED])

EXPECTED = [(X[cut].tolist(), Y[cut].tolist()) for cut in (slice(0, 4), slice(4, 8), slice(8, 10))]


class Sized(Numbered):
    """A `PyDataset` of a given length, which records the numbers of the batches that are read."""

    def __init__(self, length, item=lambda index: np.zeros(1), **options):
        super().__init__(**options)
        self.length, self.item, self.asked = length, item, []

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.asked.append(index)
        return self.item(index)


def position(state):
    return state["epoch"], state["batch"], state["seed"]


def numbers(feed):
    """One epoch of single arrays, joined."""
    return np.concatenate([numpy(batch) for batch in feed])


def eventually(condition, seconds=30):
    """Whether a condition becomes true; workers take a moment to end."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


# --------------------------------------------------------------------------- sources


@every_source
def test_feed_yields_the_batches_of_every_source_in_order_in_each_epoch(kind):
    feed = ALL[kind]()
    assert read(feed) == read(feed) == EXPECTED


@pytest.mark.backend("tensorflow", "torch")
@every_source
def test_feed_yields_tensors(kind):
    assert all(map(ops.is_tensor, next(iter(ALL[kind]()))))


@pytest.mark.parametrize("kind", SIZED)
def test_feed_has_the_length_of_its_source(kind):
    feed = ALL[kind]()
    assert len(feed) == feed.length == 3


@pytest.mark.parametrize("kind", UNSIZED)
def test_feed_without_a_length_says_so(kind):
    feed = ALL[kind]()
    assert feed.length is None
    with pytest.raises(TypeError, match=r"length of a feed over the \w+.* is unknown.*HL017"):
        len(feed)


def test_feed_over_an_iterable_with_a_length_has_it_unless_it_is_endless():
    class Counted(Batches):
        def __len__(self):
            return 3

    assert len(hl.Feed(Counted())) == 3
    assert hl.Feed(pytest.importorskip("tensorflow").data.Dataset.range(3).repeat()).length is None


def test_feed_over_a_generator_yields_one_epoch_and_is_then_exhausted():
    feed = hl.Feed(batches())
    next(iter(feed))
    assert read(feed) == EXPECTED[1:]  # From the batch where the last iteration stopped.
    with pytest.raises(DataError, match=r"the generator is exhausted.*Pass a function that returns a new generator"):
        next(iter(feed))


def test_feed_over_a_pydataset_without_a_length_is_endless():
    class Endless(Sized):
        num_batches = None

    feed = iter(hl.Feed(Endless(0, lambda index: np.full(2, index))))
    assert [as_numbers(next(feed)) for _ in range(4)] == [[0, 0], [1, 1], [2, 2], [3, 3]]


def test_feed_calls_the_epoch_hooks_of_a_pydataset():
    data = Numbered()
    feed = hl.Feed(data)
    read(feed)
    next(iter(feed))
    assert (data.epochs_begun, data.epochs_ended) == (2, 1)


def test_feed_shuffles_a_pydataset_by_batch_in_each_epoch():
    def feed():
        return hl.Feed(Sized(20, lambda index: np.array([index, index])), shuffle=True, seed=1)

    one = feed()
    first, second = ([batch[0] for batch in read(one)] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    assert [batch[0] for batch in read(feed())] == first


@pytest.mark.once
def test_feed_keeps_the_worker_processes_of_a_pydataset_which_read_it_as_it_is_and_end_with_it(monkeypatch, tmp_path):
    # Over 10 seconds: the worker is a new Python process, which imports Keras and a backend.
    monkeypatch.setattr(processes, "_PATIENCE", 0.1)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    data = Processes(workers=1, use_multiprocessing=True)
    with pytest.warns(HandloomWarning, match=r"1 worker process\(es\) of the PyDataset have not given a batch.*HL442"):
        passes = [read(hl.Feed(data)) for _ in range(3)]
    assert len({number for given in passes for number in given}) == 1
    for _ in hl.Feed(data):
        break  # An abandoned pass.
    data.offset = 10**7  # As if the data shuffled itself at the end of an epoch.
    assert read(hl.Feed(data)) == [number + 10**7 for number in passes[0]]
    assert len(list(tmp_path.iterdir())) == 1
    del data
    gc.collect()
    assert eventually(lambda: not multiprocessing.active_children())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.once
@pytest.mark.filterwarnings("ignore:.*have not given a batch")
def test_feed_says_how_a_worker_process_of_a_pydataset_ended_and_starts_another():
    # Over 10 seconds: two processes import Keras and a backend.
    data = Killed(workers=1, use_multiprocessing=True)
    with pytest.raises(DataError, match=r"ended \(process \d+, killed by the signal SIGKILL\).*fewer workers.*HL443"):
        read(hl.Feed(data))
    data.kills = False
    assert read(hl.Feed(data)) == [0, 1]


@pytest.mark.once
def test_feed_says_why_a_pydataset_cannot_be_sent_to_worker_processes():
    data = Processes(workers=1, use_multiprocessing=True)
    data.file = lambda: None
    with pytest.raises(DataError, match=r"cannot be sent to worker processes: .*lambda.*use_multiprocessing=F.*HL444"):
        read(hl.Feed(data))


def test_feed_raises_an_error_of_a_worker_thread_and_ends_the_workers():
    def broken(index):
        if index == 2:
            raise OSError("disk full of sand")
        return X[:4]

    before = set(threading.enumerate())
    with pytest.raises(OSError, match="disk full of sand"):
        read(hl.Feed(Sized(3, broken, workers=2, max_queue_size=1)))
    assert eventually(lambda: set(threading.enumerate()) <= before)


def test_feed_limits_how_far_worker_threads_read_ahead():
    data = Sized(100, workers=2, max_queue_size=4)
    feed = iter(hl.Feed(data))
    next(feed)
    time.sleep(0.05)
    assert max(data.asked) <= 5
    feed.close()


def test_feed_ends_worker_threads_when_an_iteration_is_abandoned():
    data = Sized(100, lambda index: time.sleep(0.005) or np.zeros(1), workers=2, max_queue_size=100)
    before = set(threading.enumerate())
    for _ in hl.Feed(data):
        assert not set(threading.enumerate()) <= before
        break
    assert eventually(lambda: set(threading.enumerate()) <= before)
    assert len(data.asked) < 50


# --------------------------------------------------------------------------- structures


@pytest.mark.parametrize(
    "convert",
    [
        np.asarray,
        ops.convert_to_tensor,
        lambda array: pytest.importorskip("tensorflow").constant(array),
        lambda array: pytest.importorskip("torch").from_numpy(array),
        pd.Series,
        lambda array: pd.DataFrame({"a": array}),
    ],
    ids=["NumPy", "tensor", "TensorFlow", "PyTorch", "Series", "DataFrame"],
)
def test_feed_cuts_arrays_of_any_kind_into_batches(convert):
    feed = hl.Feed(convert(np.arange(5, dtype="float32")), batch_size=2)
    assert [np.ravel(batch).tolist() for batch in read(feed)] == [[0, 1], [2, 3], [4]]


def test_feed_keeps_the_columns_of_a_data_frame_and_the_one_axis_of_a_series():
    frame = pd.DataFrame({"a": [1.0, 2.0, 3.0], "b": [4, 5, 6]}, index=[7, 8, 9])
    assert read(hl.Feed((frame, frame["b"]))) == [([[1, 4], [2, 5], [3, 6]], [4, 5, 6])]


def test_feed_yields_batches_in_the_structure_of_the_data():
    data = {"a": X, "b": (X + 1, [X + 2, {"c": X + 3}])}
    assert read(hl.Feed(data, batch_size=2))[0] == {"a": [0, 1], "b": ([1, 2], [[2, 3], {"c": [3, 4]}])}
    [batch] = hl.Feed(iter([({"a": X, "b": [X, X]}, Y)]))
    assert as_numbers(batch) == ({"a": X.tolist(), "b": [X.tolist()] * 2}, Y.tolist())


def test_feed_keeps_a_part_that_is_none():
    first, *_ = hl.Feed((X, None, Y), batch_size=2)
    assert first[1] is None
    assert as_numbers((first[0], first[2])) == ([0, 1], [0, 1])


@every_source
def test_feed_leaves_the_batches_before_unchanged(kind):
    assert [as_numbers(batch) for batch in list(ALL[kind]())] == EXPECTED


def test_feed_copies_batches_that_a_source_overwrites():
    buffer = np.zeros((2, 4), "float32")

    def overwriting():
        for index in range(3):
            buffer[:] = index
            yield buffer, buffer[0]

    kept = list(hl.Feed(overwriting))
    assert [as_numbers(y) for _, y in kept] == [[0] * 4, [1] * 4, [2] * 4]


def test_feed_leaves_the_arrays_of_the_user_unchanged():
    x = X.copy()
    read(hl.Feed((x, Y), batch_size=3, shuffle=True))
    same(x, X)


# --------------------------------------------------------------------------- options for arrays


@pytest.mark.parametrize(
    ("count", "options", "sizes"),
    [
        (10, {"batch_size": 4}, [4, 4, 2]),
        (10, {"batch_size": 4, "drop_remainder": True}, [4, 4]),
        (10, {"batch_size": 5, "drop_remainder": True}, [5, 5]),
        (10, {"batch_size": 100}, [10]),
        (70, {}, [32, 32, 6]),
    ],
)
def test_feed_cuts_batches_of_the_size_asked_for(count, options, sizes):
    feed = hl.Feed(np.arange(count), **options)
    assert [len(batch) for batch in read(feed)] == sizes
    assert len(feed) == len(sizes)


def test_feed_drops_other_examples_in_each_shuffled_epoch():
    feed = hl.Feed(np.arange(10), batch_size=9, shuffle=True, drop_remainder=True)
    assert len({tuple(sorted(numbers(feed))) for _ in range(8)}) > 1


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 40),
    batch_size=st.integers(1, 45),
    other_size=st.integers(1, 45),
    seed=st.integers(0, 2**32),
    epochs=st.integers(1, 3),
)
def test_feed_shuffles_each_epoch_by_seed_and_epoch_alone(count, batch_size, other_size, seed, epochs):
    data = np.arange(count)
    feed = hl.Feed(data, batch_size=batch_size, shuffle=True, seed=seed)
    orders = [numbers(feed) for _ in range(epochs)]
    for order in orders:
        same(np.sort(order), data)
    other = hl.Feed(data, batch_size=other_size, shuffle=True, seed=seed)
    other.restore({"epoch": epochs - 1, "batch": 0, "seed": seed})
    same(numbers(other), orders[-1])


def test_feed_has_another_order_in_each_epoch_and_for_each_seed():
    feed, other = (hl.Feed(np.arange(50), shuffle=True, seed=seed) for seed in (0, 1))
    orders = {tuple(numbers(feed)), tuple(numbers(feed)), tuple(numbers(other)), tuple(range(50))}
    assert len(orders) == 4


def test_feed_shuffles_parts_together_without_numpys_random_state():
    np.random.seed(0)
    before = np.random.get_state()[1].tolist()
    for x, y in hl.Feed((X, Y), batch_size=3, shuffle=True):
        same(numpy(x) ** 2, y)
    assert np.random.get_state()[1].tolist() == before


# --------------------------------------------------------------------------- position


def test_feed_state_is_the_position_after_each_batch():
    feed = hl.Feed(X, batch_size=4, seed=7)
    positions = [feed.state()]
    for _ in range(2):
        positions += [feed.state() for _ in feed]
    where = [(state["epoch"], state["batch"]) for state in positions]
    assert where == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3)]
    assert position(feed.state()) == (2, 0, 7)


def test_feed_begins_an_abandoned_epoch_again():
    feed = hl.Feed(X, batch_size=4, shuffle=True, seed=2)
    first = as_numbers(next(iter(feed)))
    epoch = read(feed)
    assert epoch[0] == first
    assert len(epoch) == 3


def test_fit_continues_from_the_position_of_a_restored_feed():
    seen = []
    feed = hl.Feed(X, batch_size=2)
    feed.restore({"epoch": 0, "batch": 3, "seed": 0})
    note = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(logs["mean"]))
    hl.fit(lambda x: {"mean": ops.mean(x)}, feed, epochs=2, callbacks=[note], verbose=0)
    close(seen, [6.5, 7.5, 0.5, 1.5, 2.5, 3.5, 4.5])
    assert position(feed.state()) == (2, 0, 0)


@pytest.mark.parametrize(
    ("state", "match"),
    [
        (None, "whole numbers epoch, batch and seed; received None.*HL404"),
        ({"epoch": 0, "batch": 0}, "epoch, batch and seed; received"),
        ({"epoch": 0, "batch": 0, "seed": 0, "more": 1}, "epoch, batch and seed; received"),
        ({"epoch": 0, "batch": 0, "seed": 0, "data": 1}, "epoch, batch and seed; received"),
        ({"epoch": 0, "batch": 1.5, "seed": 0}, "whole numbers"),
        ({"epoch": "0", "batch": 0, "seed": 0}, "whole numbers"),
        ({"epoch": 0, "batch": -1, "seed": 0}, "whole numbers"),
        ({"epoch": -1, "batch": 0, "seed": 0}, "whole numbers"),
        ({"epoch": 0, "batch": 4, "seed": 0}, "at batch 4; this feed has 3 batches an epoch.*HL406"),
        ({"epoch": 0, "batch": 0, "seed": 9}, r"seed=9; this feed has seed=0.*Create the feed with seed=9.*HL405"),
    ],
)
def test_feed_restore_refuses_a_bad_state_and_keeps_its_position(state, match):
    feed = hl.Feed(X, batch_size=4)
    next(iter(feed))
    with pytest.raises(DataError, match=match):
        feed.restore(state)
    assert position(feed.state()) == (0, 1, 0)


# --------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("data", "sizes"),
    [
        ((X, Y[:9]), "x has 10, y has 9"),
        ((X, Y, X[:1]), "x has 10, y has 10, sample_weight has 1"),
        (({"a": X, "b": X[:4]}, Y), r"x\['a'\] has 10, x\['b'\] has 4, y has 10"),
        ({"image": X, "label": Y[:3]}, "'image' has 10, 'label' has 3"),
        (([X, X[:2]], Y), r"x\[0\] has 10, x\[1\] has 2, y has 10"),
    ],
)
def test_feed_refuses_arrays_of_unequal_lengths_by_name(data, sizes):
    with pytest.raises(DataError, match=f"same number of examples.*{sizes}.*HL412"):
        hl.Feed(data)


@pytest.mark.parametrize("data", [np.zeros((0, 3)), (X[:0], Y[:0]), pd.DataFrame({"a": []})])
def test_feed_refuses_empty_arrays(data):
    with pytest.raises(DataError, match=r"The data is empty: it has 0 examples.*HL413"):
        hl.Feed(data)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: lambda: iter(()), "the function of data"),
        (lambda: (part for part in ()), "the generator"),
        (lambda: iter([]), "the list_iterator"),
    ],
    ids=["function", "generator", "iterator"],
)
@pytest.mark.parametrize("use", [read, hl.Feed.peek])
def test_feed_refuses_a_source_without_a_batch(make, name, use):
    with pytest.raises(DataError, match=f"The data is empty: {name} gave no batch.*HL409"):
        use(hl.Feed(make()))


def test_feed_refuses_a_pydataset_of_length_zero():
    with pytest.raises(DataError, match=r"The data is empty: the PyDataset has length 0.*HL425"):
        hl.Feed(Sized(0))


def test_feed_refuses_to_drop_all_examples():
    with pytest.raises(DataError, match=r"10 example\(s\), fewer than one full batch of 16.*or drop_remainder.*HL415"):
        hl.Feed(X, batch_size=16, drop_remainder=True)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (pd.DataFrame({"a": [1, 2], "b": ["x", "y"]}), r"the data holds Python objects.*HL421"),
        ((np.float32(3.0), X), "x is a single number; data must have an axis of examples first.*HL420"),
        ({"a": np.array(1.0)}, "'a' is a single number"),
    ],
)
def test_feed_refuses_arrays_that_are_not_numbers_or_have_no_axis(data, match):
    with pytest.raises(DataError, match=match):
        hl.Feed(data)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        ([1, 2, 3], "list"),
        (3.0, "float"),
        ("abc", "str"),
        (None, "NoneType"),
        ((X, [1, 2]), "tuple"),
        (keras.Sequential(), "Sequential"),
    ],
)
def test_feed_refuses_data_that_is_neither_arrays_nor_a_source(data, kind):
    with pytest.raises(DataError, match=rf"No batches can be made of data of type {kind}: .*np.array\(\.\.\.\).*HL418"):
        hl.Feed(data)


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, "8", True])
def test_feed_refuses_a_bad_batch_size(batch_size):
    with pytest.raises(ValueError, match=r"hl\.Feed\(batch_size=\.\.\.\) takes a whole number, at least 1; received"):
        hl.Feed(X, batch_size=batch_size)


@pytest.mark.parametrize(
    ("make", "name", "options"),
    [
        (lambda: batches, "the function of data", ["batch_size", "drop_remainder", "shuffle"]),
        (Batches, "the Batches", ["batch_size", "drop_remainder", "shuffle"]),
        (lambda: iter([X]), "the list_iterator", ["batch_size", "drop_remainder", "shuffle"]),
        (Numbered, "the PyDataset", ["batch_size", "drop_remainder"]),
    ],
    ids=["function", "iterable", "iterator", "PyDataset"],
)
def test_feed_refuses_options_for_arrays_with_a_source_of_batches(make, name, options):
    for option in options:
        with pytest.raises(DataError, match=f"{option} is for arrays; {name} gives batches already.*HL417"):
            hl.Feed(make(), **{option: 4 if option == "batch_size" else True})


def test_feed_refuses_arrays_one_by_one_and_says_what_to_type():
    with pytest.raises(ArgumentError, match=r"hl\.Feed takes its data as one .* hl\.Feed\(\(x, y\)\)\. \[HL035\]"):
        hl.Feed(np.ones(4), np.ones(4), batch_size=2)
