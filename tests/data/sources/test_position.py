"""Positions of every source: a restored feed yields the batches that the original feed would have yielded."""

import json

import keras
import numpy as np
import pytest
from keras import ops

import handloom as hl
from handloom._interop.tensors import seed_libraries
from handloom.checkpoint.encoding import decode, encode
from handloom.errors import CheckpointError, DataError, HandloomWarning
from tests.checkpoint.common import take
from tests.data.sources.kinds import ALL, EXACT, X, Y, as_numbers, read, stateful_loader
from tests.resume.stopped import StopAt, Stopped

every_kind = pytest.mark.parametrize("kind", ALL)
every_exact_kind = pytest.mark.parametrize("kind", EXACT)


def saved(feed):
    """The feed's state as a checkpoint returns it."""
    arrays = {}
    contents = json.loads(json.dumps(encode(feed.state(), "feed", arrays)))
    return decode(contents, arrays)


def made_alike(kind):
    """A new feed; the global random generators are in another state afterwards."""
    _seed(0)
    feed = ALL[kind]()
    _seed(1234)
    return feed


def _seed(seed):
    keras.utils.set_random_seed(seed)
    seed_libraries(seed)


def unbroken(feed, epochs):
    """The batches of a feed, and its state after each batch and between epochs."""
    given, states = [[] for _ in range(epochs)], {}
    for epoch in range(epochs):
        if epoch:
            states[epoch, 0] = saved(feed)
        for batch in feed:
            given[epoch].append(as_numbers(batch))
            states[epoch, len(given[epoch])] = saved(feed)
    return given, states


# ------------------------------------------------------------------ every source


@every_kind
def test_feed_restores_every_position_of_every_source(kind):
    given, states = unbroken(ALL[kind](), 3)
    assert len(given[0]) > 1
    for (epoch, taken), state in states.items():
        restored = made_alike(kind)
        restored.restore(state)
        assert restored.differences(state) == []
        assert read(restored) == given[epoch][taken:], (epoch, taken)
        assert [read(restored) for _ in given[epoch + 1 :]] == given[epoch + 1 :], (epoch, taken)


@pytest.mark.once
@every_kind
def test_feed_restores_again_and_again(kind):
    given, states = unbroken(ALL[kind](), 3)
    state, found = states[0, 1], []
    for _ in range(5):
        feed = made_alike(kind)
        feed.restore(state)
        feed.restore(saved(feed))  # Before any batch is read.
        found += [as_numbers(next(iter(feed), None)) or "the end of an epoch"]
        state = saved(feed)
    flat = [*given[0][1:], "the end of an epoch", *given[1], "the end of an epoch", *given[2]]
    assert found == flat[: len(found)]


@pytest.mark.once
@every_kind
def test_feed_restores_a_position_of_its_own(kind):
    feed = ALL[kind]()
    given, states = unbroken(feed, 2)
    for place in [(1, 1), (0, 2), (1, 0)]:
        feed.restore(states[place])
        assert read(feed) == given[place[0]][place[1] :], place


@every_kind
def test_feed_peek_changes_nothing(kind):
    looked, other = made_alike(kind), made_alike(kind)
    first = as_numbers(looked.peek())
    state = saved(looked)
    given = [read(looked) for _ in range(2)]
    assert first == given[0][0]
    if kind != "shuffled DataLoader":  # Both draw from PyTorch's global generator.
        assert given == [read(other) for _ in range(2)]
    restored = made_alike(kind)
    restored.restore(state)
    assert [read(restored) for _ in range(2)] == given


@pytest.mark.once
@every_kind
def test_feed_is_seekable_if_its_source_is_exact(kind):
    assert made_alike(kind).seekable is (kind in EXACT)


@pytest.mark.once
@every_kind
def test_feed_restores_the_beginning(kind):
    beginning = saved(made_alike(kind))
    feed = made_alike(kind)
    next(iter(feed))
    feed.restore(beginning)
    assert "source" not in feed.state()
    assert len(read(feed)) == len(read(made_alike(kind)))


def test_feed_seekable_draws_no_order():
    asked, other = made_alike("tf.data with all"), made_alike("tf.data with all")
    assert asked.seekable
    assert [read(asked) for _ in range(2)] == [read(other) for _ in range(2)]


@pytest.mark.once
@every_exact_kind
def test_feed_begins_an_epoch_that_was_abandoned_after_a_restore_at_its_first_batch(kind):
    given, states = unbroken(ALL[kind](), 1)
    feed = made_alike(kind)
    feed.restore(states[0, 1])
    next(iter(feed))
    assert len(read(feed)) == len(given[0])


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_feed_over_an_iterator_with_a_position_restores_it_for_its_one_pass(taken):
    grain = pytest.importorskip("grain")

    def feed():
        return hl.Feed(iter(grain.MapDataset.source(X).shuffle(seed=1).batch(4)))

    first = feed()
    iteration = iter(first)
    given = [as_numbers(next(iteration)) for _ in range(taken)]
    state = saved(first)
    rest, other = [as_numbers(batch) for batch in iteration], feed()
    assert sorted(number for batch in given + rest for number in batch) == X.tolist()
    assert other.seekable
    other.restore(state)
    assert read(other) == rest
    with pytest.raises(DataError, match="is exhausted"):
        next(iter(other))


# ---------------------------------------------------------------- without reading


class Counted:
    """Numbered examples that record which of them were read."""

    def __init__(self):
        self.read = []

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        self.read.append(int(index))
        return X[index], Y[index]


@pytest.mark.parametrize("which", ["DataLoader", "StatefulDataLoader", "Grain"])
def test_feed_does_not_read_the_batches_before_a_restored_position(which):
    torch, grain = pytest.importorskip("torch"), pytest.importorskip("grain")
    make = {
        "DataLoader": lambda data: torch.utils.data.DataLoader(data, 2),
        "StatefulDataLoader": lambda data: stateful_loader()(data, 2),
        "Grain": lambda data: grain.MapDataset.source(data).batch(2).to_iter_dataset(grain.ReadOptions(num_threads=0)),
    }[which]
    feed = hl.Feed(make(Counted()))
    iteration = iter(feed)
    for _ in range(3):
        next(iteration)
    data = Counted()
    restored = hl.Feed(make(data))
    restored.restore(saved(feed))
    assert [as_numbers(x) for x, _ in restored] == [[6, 7], [8, 9]]
    assert data.read == [6, 7, 8, 9]


# ---------------------------------------------------------------------- in a run


def trained(kind, run_dir, stop=0):
    """The history of a run whose result depends on the values and the order of all batches; `None` if it is stopped."""
    feed, total = made_alike(kind), keras.Variable(0.0)

    def step(*batch):
        x, y = keras.tree.flatten(batch)
        total.assign(0.9 * total + ops.sum(x * ops.cast(y, "float32")))
        return {"total": total.value}

    options = {"save": hl.every(steps=1), "resume": "exact", "state": {"total": total}, "callbacks": [StopAt(stop)]}
    try:
        return hl.fit(step, feed, epochs=3, seed=3, run_dir=run_dir, verbose=0, **options).history
    except Stopped:
        return None


@pytest.mark.parametrize(
    "kind",
    ["Grain window", "tf.data with all", "shuffled DataLoader", "shuffled StatefulDataLoader", "shuffled Dataset"],
)
def test_fit_resumes_over_any_source_with_the_same_bits(kind, tmp_path):
    whole = trained(kind, tmp_path / "whole")
    assert trained(kind, tmp_path / "run", stop=5) is None
    assert trained(kind, tmp_path / "run") == whole


# ------------------------------------------------------------------ broken states


@pytest.mark.parametrize("kind", [kind for kind in EXACT if "source" in kind or "loader" in kind.lower()])
@pytest.mark.parametrize("name", ["position", "at"])  # The current format, and format 1.
@pytest.mark.parametrize("position", [{"dict": {"a": 1}}, {"pickle": "gASVJAAAAAAAAACMBXBvc2l4"}, {"tuple": 3}, 7])
def test_feed_restore_refuses_a_state_that_is_not_of_its_source(kind, name, position):
    feed = ALL[kind]()
    next(iter(feed))
    state = saved(feed) | {"source": {"under_way": True, name: position}}
    with pytest.raises(DataError, match=r"cannot go back to the position in the state.*HL427"):
        made_alike(kind).restore(state)


def test_checkpoint_refuses_the_state_of_a_loader_that_it_cannot_save():
    class Loader(Counted):
        def __iter__(self):
            return iter([X[:5], X[5:]])

        def state_dict(self):
            return {"order": {1, 2}}

        def load_state_dict(self, state):
            raise AssertionError

    feed = hl.Feed(Loader())
    next(iter(feed))
    with pytest.raises(CheckpointError, match=r"feed\.source\.position\.order is a set, which cannot be saved"):
        take({"feed": feed})


# ------------------------------------------------------------------ other data


def test_feed_restore_warns_of_other_data_and_restores():
    feed = hl.Feed((X, Y), batch_size=4)
    next(iter(feed))
    other = hl.Feed((X + 1, Y.astype("float32")), batch_size=5)
    expected = [
        "batches was 3 and is 2",
        "batch_size was 4 and is 5",
        "y was int32[10] and is float32[10]",
        "the values of x have changed",
        "the values of y have changed",
    ]
    assert other.differences(saved(feed)) == expected
    with pytest.warns(
        HandloomWarning, match=r"data has changed.*batch_size was 4 and is 5; .* after 1 batches of epoch 1.*HL407"
    ):
        other.restore(saved(feed))
    assert as_numbers(next(iter(other))[0]) == [6, 7, 8, 9, 10]


@pytest.mark.parametrize(
    ("one", "two", "match"),
    [
        ("arrays", "shuffled arrays", "shuffle was False and is True"),
        ("arrays", "Dataset", "source was arrays and is the Dataset"),
        ("shuffled Dataset", "Dataset", "shuffle was True and is False"),
        ("PyDataset", "shuffled PyDataset", "shuffle was False and is True"),
        ("Grain map", "Grain iter", "source was the BatchMapDataset and is the BatchIterDataset"),
        ("function", "iterable", "source was the function of data and is the Batches"),
        ("DataLoader", "StatefulDataLoader", "source was the DataLoader and is the StatefulDataLoader"),
    ],
)
def test_feed_restore_warns_of_another_kind_of_source(one, two, match):
    feed = ALL[one]()
    next(iter(feed))
    state, other = saved(feed), ALL[two]()
    with pytest.warns(HandloomWarning, match=match):
        other.restore(state | {"seed": other.state()["seed"]})
    assert len(read(other)) > 0


def test_feed_differences_include_the_dtypes_of_a_stream_once_they_are_known():
    feed = hl.Feed(lambda: iter([X[:5], X[5:]]))
    next(iter(feed))
    other = hl.Feed(lambda: iter([Y[:5], Y[5:]]))
    assert other.differences(feed.state()) == []
    other.peek()
    assert other.differences(feed.state()) == ["the data was float32 with 1 axes and is int32 with 1 axes"]


def test_feed_differences_are_none_for_the_same_values_of_another_library():
    state = hl.Feed((X, Y), batch_size=4).state()
    tf, torch = pytest.importorskip("tensorflow"), pytest.importorskip("torch")
    for x, y in [(torch.from_numpy(X), tf.constant(Y)), (np.asfortranarray(X), Y[::-1][::-1])]:
        assert hl.Feed((x, y), batch_size=4).differences(state) == []


def test_feed_differences_find_another_order_and_another_seed_by_a_sample_of_the_values():
    numbers = np.random.default_rng(0).normal(size=(5000, 7))
    state = hl.Feed(numbers).state()
    for other in (numbers[::-1], np.random.default_rng(1).normal(size=(5000, 7)), numbers + 1e-9):
        assert hl.Feed(np.ascontiguousarray(other)).differences(state) == ["the values of the data have changed"]


def test_feed_restore_accepts_a_state_without_a_fingerprint():
    feed = hl.Feed((X, Y), batch_size=4)
    feed.restore({"epoch": 0, "batch": 2, "seed": 0})
    assert as_numbers(next(iter(feed))[0]) == [8, 9]
