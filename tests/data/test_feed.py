"""Feeds: any source of batches, with a position."""

import gc
import multiprocessing
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
from handloom.errors import DataError
from tests.data.sources.kinds import Batches, as_numbers, batches, read
from tests.numbered import Numbered, Processes, X, Y


def tf_dataset():
    return pytest.importorskip("tensorflow").data.Dataset.from_tensor_slices((X, Y)).batch(4)


def data_loader():
    torch = pytest.importorskip("torch")
    data = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    return torch.utils.data.DataLoader(data, batch_size=4)


SOURCES = {
    "arrays": lambda: hl.Feed((X, Y), batch_size=4),
    "shuffled arrays": lambda: hl.Feed((X, Y), batch_size=4, shuffle=True, seed=3),
    "tf.data": lambda: hl.Feed(tf_dataset()),
    "DataLoader": lambda: hl.Feed(data_loader()),
    "PyDataset": lambda: hl.Feed(Numbered()),
    "PyDataset with threads": lambda: hl.Feed(Numbered(workers=2, max_queue_size=2)),
    "shuffled PyDataset": lambda: hl.Feed(Numbered(), shuffle=True, seed=5),
    "function": lambda: hl.Feed(batches),
    "iterable": lambda: hl.Feed(Batches()),
}
IN_ORDER = [name for name in SOURCES if "shuffled" not in name]

every_source = pytest.mark.parametrize("name", SOURCES)


def position(state):
    return state["epoch"], state["batch"], state["seed"]


def numbers(feed):
    """One epoch of single arrays, joined."""
    return np.concatenate([ops.convert_to_numpy(batch) for batch in feed])


def eventually(condition, seconds=30):
    """Whether a condition comes true; workers take a moment to end."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


EXPECTED = [(X[cut].tolist(), Y[cut].tolist()) for cut in (slice(0, 4), slice(4, 8), slice(8, 10))]


# --------------------------------------------------------------------------- sources


@pytest.mark.parametrize("name", IN_ORDER)
def test_every_source_gives_its_batches_in_order_and_again_in_the_next_epoch(name):
    feed = SOURCES[name]()
    assert read(feed) == EXPECTED
    assert read(feed) == EXPECTED


@every_source
def test_batches_are_tuples_that_a_compiled_function_takes(name):
    batch = next(iter(SOURCES[name]()))
    assert type(batch) is tuple
    assert as_numbers(hl.function(lambda x, y: (x, y))(*batch)) == as_numbers(batch)


@pytest.mark.backend("tensorflow", "torch")
@every_source
def test_batches_are_tensors(name):
    x, y = next(iter(SOURCES[name]()))
    assert ops.is_tensor(x)
    assert ops.is_tensor(y)


@pytest.mark.parametrize("name", [name for name in SOURCES if name not in ("function", "iterable")])
def test_a_source_that_knows_its_length_says_so(name):
    feed = SOURCES[name]()
    assert (len(feed), feed.length) == (3, 3)


@pytest.mark.parametrize("name", ["function", "iterable"])
def test_a_source_that_does_not_know_its_length_says_so(name):
    feed = SOURCES[name]()
    assert feed.length is None
    with pytest.raises(TypeError, match="does not know its length"):
        len(feed)


def test_an_iterable_with_a_length_tells_it():
    class Counted(Batches):
        def __len__(self):
            return 3

    assert len(hl.Feed(Counted())) == 3


def test_a_tf_dataset_of_unknown_length_and_a_loader_of_a_stream_do_not_tell_one():
    torch = pytest.importorskip("torch")

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(torch.arange(8))

    assert hl.Feed(tf_dataset().repeat()).length is None
    feed = hl.Feed(torch.utils.data.DataLoader(Stream(), batch_size=4))
    assert feed.length is None
    assert read(feed) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_generator_gives_one_epoch_and_is_then_exhausted():
    feed = hl.Feed(batches())
    assert read(feed) == EXPECTED
    with pytest.raises(DataError, match=r"the generator is exhausted.*Pass a function that returns a new generator"):
        next(iter(feed))


def test_a_generator_goes_on_where_the_last_iteration_stopped():
    feed = hl.Feed(batches())
    next(iter(feed))
    assert read(feed) == EXPECTED[1:]


def test_a_pydataset_without_a_length_goes_on_without_end():
    class Endless(keras.utils.PyDataset):
        num_batches = None

        def __getitem__(self, index):
            return np.full(2, index)

    feed = iter(hl.Feed(Endless()))
    assert [as_numbers(next(feed)) for _ in range(4)] == [[0, 0], [1, 1], [2, 2], [3, 3]]


def test_a_pydataset_hears_of_the_beginning_and_end_of_epochs():
    data = Numbered()
    feed = hl.Feed(data)
    read(feed)
    next(iter(feed))
    assert (data.epochs_begun, data.epochs_ended) == (2, 1)


def test_a_shuffled_pydataset_gives_whole_batches_in_a_new_order_each_epoch():
    class Twenty(Numbered):
        def __len__(self):
            return 20

        def __getitem__(self, index):
            return np.array([index, index])

    feed = hl.Feed(Twenty(), shuffle=True, seed=1)
    first, second = ([batch[0] for batch in read(feed)] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    assert [batch[0] for batch in read(hl.Feed(Twenty(), shuffle=True, seed=1))] == first


def test_a_pydataset_is_read_by_worker_processes():
    # Seconds: each worker is a new Python, which imports Keras and a backend.
    assert read(hl.Feed(Numbered(workers=2, use_multiprocessing=True))) == EXPECTED


@pytest.mark.once
def test_worker_processes_are_kept_from_pass_to_pass_until_the_data_changes():
    # Some seconds for each of the two processes, which import Keras and a backend.
    data = Processes(workers=1, use_multiprocessing=True)
    feed = hl.Feed(data)
    passes = [read(feed) for _ in range(3)]
    assert len({number for given in passes for number in given}) == 1
    data.offset = 10**7  # As when the data shuffles itself at the end of an epoch.
    changed = [read(feed) for _ in range(2)]
    assert changed[0] == changed[1]
    assert min(changed[0]) > 10**7 > max(passes[0])
    assert {number - 10**7 for number in changed[0]}.isdisjoint(passes[0])
    del feed
    gc.collect()
    assert eventually(lambda: not multiprocessing.active_children())


@pytest.mark.once
def test_worker_processes_end_when_iteration_is_given_up():
    for _ in hl.Feed(Numbered(workers=1, use_multiprocessing=True)):
        assert len(multiprocessing.active_children()) == 1
        break
    assert eventually(lambda: not multiprocessing.active_children())


def test_worker_threads_end_when_iteration_is_given_up():
    before = set(threading.enumerate())
    for _ in hl.Feed(Numbered(workers=2)):
        assert not set(threading.enumerate()) <= before
        break
    assert eventually(lambda: set(threading.enumerate()) <= before)


def test_an_error_in_a_worker_thread_arrives_and_ends_the_workers():
    class Broken(Numbered):
        def __getitem__(self, index):
            if index == 2:
                raise OSError("disk full of sand")
            return super().__getitem__(index)

    before = set(threading.enumerate())
    with pytest.raises(OSError, match="disk full of sand"):
        read(hl.Feed(Broken(workers=2, max_queue_size=1)))
    assert eventually(lambda: set(threading.enumerate()) <= before)


def test_worker_threads_read_no_further_ahead_than_they_may():
    asked = []

    class Asked(Numbered):
        def __len__(self):
            return 100

        def __getitem__(self, index):
            asked.append(index)
            return np.zeros(1)

    feed = iter(hl.Feed(Asked(workers=2, max_queue_size=4)))
    next(feed)
    time.sleep(0.05)
    assert max(asked) <= 5
    feed.close()


def test_worker_threads_read_no_further_once_iteration_is_given_up():
    asked = []

    class Slow(Numbered):
        def __len__(self):
            return 100

        def __getitem__(self, index):
            asked.append(index)
            time.sleep(0.005)
            return np.zeros(1)

    before = set(threading.enumerate())
    for _ in hl.Feed(Slow(workers=2, max_queue_size=100)):
        break
    assert eventually(lambda: set(threading.enumerate()) <= before)
    assert len(asked) < 50


# --------------------------------------------------------------------------- structures and dtypes


@pytest.mark.parametrize(
    "convert",
    [np.asarray, ops.convert_to_tensor, pd.Series, lambda array: pd.DataFrame({"a": array})],
    ids=["NumPy", "tensor", "Series", "DataFrame"],
)
def test_arrays_of_any_kind_are_cut_into_batches(convert):
    feed = hl.Feed(convert(np.arange(5, dtype="float32")), batch_size=2)
    assert [np.ravel(batch).tolist() for batch in read(feed)] == [[0, 1], [2, 3], [4]]


def test_arrays_of_other_libraries_are_cut_into_batches():
    tf, torch = pytest.importorskip("tensorflow"), pytest.importorskip("torch")
    feed = hl.Feed((tf.range(5), torch.arange(5)), batch_size=3)
    assert read(feed) == [([0, 1, 2], [0, 1, 2]), ([3, 4], [3, 4])]


def test_a_data_frame_keeps_its_columns_and_a_series_its_one_axis():
    frame = pd.DataFrame({"a": [1.0, 2.0, 3.0], "b": [4, 5, 6]}, index=[7, 8, 9])
    [(x, y)] = hl.Feed((frame, frame["b"]))
    np.testing.assert_array_equal(ops.convert_to_numpy(x), [[1, 4], [2, 5], [3, 6]])
    np.testing.assert_array_equal(ops.convert_to_numpy(y), [4, 5, 6])


def test_batches_have_the_structure_of_the_data():
    data = {"a": X, "b": (X + 1, [X + 2, {"c": X + 3}])}
    first, *_ = hl.Feed(data, batch_size=2)
    assert as_numbers(first) == {"a": [0, 1], "b": ([1, 2], [[2, 3], {"c": [3, 4]}])}


def test_a_part_that_is_none_stays_none():
    first, *_ = hl.Feed((X, None, Y), batch_size=2)
    assert first[1] is None
    assert as_numbers((first[0], first[2])) == ([0, 1], [0, 1])


def test_batches_of_a_source_may_be_nested():
    [batch] = hl.Feed(iter([({"a": X, "b": [X, X]}, Y)]))
    assert as_numbers(batch) == ({"a": X.tolist(), "b": [X.tolist()] * 2}, Y.tolist())


@every_source
def test_a_batch_that_is_kept_is_not_changed_by_the_next(name):
    kept = list(SOURCES[name]())
    assert [as_numbers(batch) for batch in kept] == read(SOURCES[name]())


def test_a_source_may_write_each_batch_over_the_last():
    buffer = np.zeros((2, 4), "float32")

    def overwriting():
        for index in range(3):
            buffer[:] = index
            yield buffer, buffer[0]

    kept = list(hl.Feed(overwriting))
    assert [as_numbers(y) for _, y in kept] == [[0] * 4, [1] * 4, [2] * 4]


def test_a_step_still_under_way_is_not_disturbed_by_a_source_that_overwrites_its_batch():
    buffer = np.zeros((4, 2**16), "float32")

    def overwriting():
        for index in range(40):
            buffer[:] = index
            yield buffer

    def slow(x):
        for _ in range(4):
            x = x + ops.sin(x) - ops.cos(x - np.pi / 2)
        return {"mean": ops.mean(x)}

    history = hl.fit(slow, overwriting, verbose=0).history["mean"]
    np.testing.assert_allclose(history, [np.mean(np.arange(40))], rtol=1e-4)


def test_the_arrays_of_the_user_are_left_as_they_are():
    x = X.copy()
    read(hl.Feed((x, Y), batch_size=3, shuffle=True))
    np.testing.assert_array_equal(x, X)


# --------------------------------------------------------------------------- options for arrays


def test_the_last_batch_is_smaller_unless_it_is_dropped():
    kept, dropped = hl.Feed(X, batch_size=4), hl.Feed(X, batch_size=4, drop_remainder=True)
    assert ([len(batch) for batch in read(kept)], len(kept)) == ([4, 4, 2], 3)
    assert ([len(batch) for batch in read(dropped)], len(dropped)) == ([4, 4], 2)


def test_nothing_is_dropped_where_batches_come_out_even():
    assert [len(batch) for batch in read(hl.Feed(X, batch_size=5, drop_remainder=True))] == [5, 5]


def test_a_batch_has_32_examples_unless_told_otherwise():
    assert [len(batch) for batch in read(hl.Feed(np.arange(70)))] == [32, 32, 6]


def test_a_batch_may_be_larger_than_the_data():
    assert read(hl.Feed(X, batch_size=100)) == [X.tolist()]


def test_what_is_dropped_differs_from_epoch_to_epoch_when_shuffled():
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
def test_each_epoch_is_a_permutation_that_follows_from_seed_and_epoch_alone(
    count, batch_size, other_size, seed, epochs
):
    data = np.arange(count)
    feed = hl.Feed(data, batch_size=batch_size, shuffle=True, seed=seed)
    orders = [numbers(feed) for _ in range(epochs)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), data)
    other = hl.Feed(data, batch_size=other_size, shuffle=True, seed=seed)
    other.restore({"epoch": epochs - 1, "batch": 0, "seed": seed})
    np.testing.assert_array_equal(numbers(other), orders[-1])


def test_epochs_and_seeds_differ_in_their_order():
    feed, other = (hl.Feed(np.arange(50), shuffle=True, seed=seed) for seed in (0, 1))
    orders = {tuple(numbers(feed)), tuple(numbers(feed)), tuple(numbers(other)), tuple(range(50))}
    assert len(orders) == 4


def test_parts_are_shuffled_together():
    for x, y in hl.Feed((X, Y), batch_size=3, shuffle=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(x) ** 2, ops.convert_to_numpy(y))


def test_the_order_does_not_draw_from_numpy_s_random_state():
    np.random.seed(0)
    before = np.random.get_state()[1].tolist()
    read(hl.Feed(X, shuffle=True))
    assert np.random.get_state()[1].tolist() == before


# --------------------------------------------------------------------------- position


@every_source
@pytest.mark.parametrize("taken", [0, 1, 2, 3])
def test_a_restored_feed_gives_the_batches_that_an_unbroken_run_would(name, taken):
    unbroken = SOURCES[name]()
    read(unbroken)
    expected = read(unbroken), read(unbroken)

    broken = SOURCES[name]()
    read(broken)
    iteration = iter(broken)
    for _ in range(taken):
        next(iteration)
    state = broken.state()
    assert position(state) == (1, taken, state["seed"])

    restored = SOURCES[name]()
    restored.restore(state)
    assert (read(restored), read(restored)) == (expected[0][taken:], expected[1])


@every_source
def test_a_feed_is_restored_twice_in_a_row(name):
    feed = SOURCES[name]()
    iteration = iter(feed)
    expected = [as_numbers(next(iteration)) for _ in range(2)]
    state = {"epoch": 0, "batch": 1, "seed": feed.state()["seed"]}
    for _ in range(2):
        feed.restore(state)
        assert as_numbers(next(iter(feed))) == expected[1]
    feed.restore(state)
    feed.restore(state | {"batch": 0})
    assert as_numbers(next(iter(feed))) == expected[0]


def test_a_feed_restored_in_the_midst_of_a_restored_epoch_goes_on_from_there():
    unbroken, feed = SOURCES["shuffled arrays"](), SOURCES["shuffled arrays"]()
    expected = read(unbroken)
    for batch in range(3):
        again = SOURCES["shuffled arrays"]()
        again.restore(feed.state())
        assert as_numbers(next(iter(again))) == expected[batch]
        feed = again


def test_the_state_is_the_position_right_after_each_batch():
    feed = hl.Feed(X, batch_size=4, seed=7)
    positions = [feed.state()]
    for _ in range(2):
        positions += [feed.state() for _ in feed]
    where = [(state["epoch"], state["batch"]) for state in positions]
    assert where == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3)]
    assert position(feed.state()) == (2, 0, 7)


def test_an_epoch_given_up_is_begun_anew():
    feed = hl.Feed(X, batch_size=4, shuffle=True, seed=2)
    expected = read(hl.Feed(X, batch_size=4, shuffle=True, seed=2))
    for batch in feed:
        assert as_numbers(batch) == expected[0]
        break
    assert read(feed) == expected


def test_a_feed_that_was_fitted_stands_at_the_end_of_its_epochs():
    feed = hl.Feed(X, batch_size=4, shuffle=True)
    hl.fit(lambda x: {"mean": ops.mean(x)}, feed, epochs=2, verbose=0)
    assert position(feed.state()) == (2, 0, 0)


def test_fitting_goes_on_from_where_a_feed_was_restored():
    seen = []
    feed = hl.Feed(X, batch_size=2)
    feed.restore({"epoch": 0, "batch": 3, "seed": 0})
    note = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(logs["mean"]))
    hl.fit(lambda x: {"mean": ops.mean(x)}, feed, epochs=2, callbacks=[note], verbose=0)
    np.testing.assert_allclose(seen, [6.5, 7.5, 0.5, 1.5, 2.5, 3.5, 4.5], rtol=1e-6)


def test_passes_of_chosen_length_follow_on_each_other():
    history = hl.fit(
        lambda x: {"mean": ops.mean(x)}, hl.Feed(X, batch_size=5), epochs=3, steps_per_epoch=1, verbose=0
    ).history
    assert history["mean"] == [2.0, 7.0, 2.0]


@pytest.mark.parametrize(
    ("state", "match"),
    [
        (None, "whole numbers epoch, batch and seed; received None"),
        ({"epoch": 0, "batch": 0}, "epoch, batch and seed; received"),
        ({"epoch": 0, "batch": 0, "seed": 0, "more": 1}, "epoch, batch and seed; received"),
        ({"epoch": 0, "batch": 1.5, "seed": 0}, "whole numbers"),
        ({"epoch": "0", "batch": 0, "seed": 0}, "whole numbers"),
        ({"epoch": 0, "batch": -1, "seed": 0}, "whole numbers"),
        ({"epoch": -1, "batch": 0, "seed": 0}, "whole numbers"),
        ({"epoch": 0, "batch": 4, "seed": 0}, "at batch 4; this feed has 3 batches an epoch"),
        ({"epoch": 0, "batch": 0, "seed": 9}, r"a feed with seed=9, this one has seed=0.*Make it with seed=9"),
    ],
)
def test_a_bad_state_is_refused_and_the_feed_stays_where_it_was(state, match):
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
def test_unequal_lengths_are_named(data, sizes):
    with pytest.raises(DataError, match=f"same number of examples.*{sizes}"):
        hl.Feed(data)


@pytest.mark.parametrize("data", [np.zeros((0, 3)), (X[:0], Y[:0]), pd.DataFrame({"a": []})])
def test_empty_arrays_are_refused(data):
    with pytest.raises(DataError, match="The data is empty: its arrays have no examples"):
        hl.Feed(data)


@pytest.mark.parametrize(
    ("source", "name"),
    [(lambda: iter(()), "the function of data"), ((part for part in ()), "the generator"), (iter([]), "list_iterator")],
    ids=["function", "generator", "iterator"],
)
def test_a_source_without_a_batch_is_an_error(source, name):
    with pytest.raises(DataError, match=f"The data is empty: .*{name} gave no batch"):
        read(hl.Feed(source))


def test_a_pydataset_of_length_zero_is_refused():
    class Nothing(Numbered):
        def __len__(self):
            return 0

    with pytest.raises(DataError, match="The data is empty: the PyDataset has length 0"):
        hl.Feed(Nothing())


def test_fewer_examples_than_a_batch_cannot_all_be_dropped():
    with pytest.raises(DataError, match=r"10 example\(s\), which makes no full batch of 16.*or drop_remainder"):
        hl.Feed(X, batch_size=16, drop_remainder=True)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (
            (X, np.array(["cat", None] * 5, dtype=object)),
            r"y (holds Python objects .*|is text, )for example 'cat'.*(astype|np\.unique)",
        ),
        (pd.DataFrame({"a": [1, 2], "b": ["x", "y"]}), r"the data holds Python objects"),
        ((np.float32(3.0), X), "x is a single number; data has an axis of examples first"),
        ({"a": np.array(1.0)}, "'a' is a single number"),
    ],
)
def test_arrays_that_are_no_data_are_named(data, match):
    with pytest.raises(DataError, match=match):
        hl.Feed(data)


@pytest.mark.parametrize(
    ("data", "kind"), [([1, 2, 3], "list"), (3.0, "float"), ("abc", "str"), (None, "NoneType"), ((X, [1, 2]), "tuple")]
)
def test_what_is_neither_arrays_nor_a_source_is_told_what_is(data, kind):
    with pytest.raises(DataError, match=rf"No batches can be made of data of type {kind}: .*by np.array\(\.\.\.\)"):
        hl.Feed(data)


def test_a_model_is_no_data():
    with pytest.raises(DataError, match="No batches can be made of data of type Sequential"):
        hl.Feed(keras.Sequential())


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, "8", True])
def test_a_bad_batch_size_is_refused(batch_size):
    with pytest.raises(DataError, match="batch_size takes a positive whole number; received"):
        hl.Feed(X, batch_size=batch_size)


@pytest.mark.parametrize("option", [{"batch_size": 4}, {"drop_remainder": True}, {"shuffle": True}])
@pytest.mark.parametrize(
    ("source", "name"),
    [(batches, "the function of data"), (Batches(), "the Batches"), (iter([X]), "the list_iterator")],
    ids=["function", "iterable", "iterator"],
)
def test_options_for_arrays_are_refused_where_batches_come_ready(source, name, option):
    with pytest.raises(DataError, match=f"{next(iter(option))} is for arrays; {name} gives batches already"):
        hl.Feed(source, **option)


@pytest.mark.parametrize("option", [{"batch_size": 4}, {"drop_remainder": True}])
def test_a_pydataset_takes_only_the_order_of_its_batches(option):
    with pytest.raises(DataError, match=f"{next(iter(option))} is for arrays; the PyDataset"):
        hl.Feed(Numbered(), **option)
