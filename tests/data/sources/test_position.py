"""The law of every source: gone back to where another stood, it gives what that one would have given."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom._interop.torch_data import seed_sources_of_data
from handloom.checkpoint import snapshot
from handloom.errors import CheckpointError, DataError, HandloomWarning
from tests.checkpoint.common import take
from tests.data.sources.kinds import ALL, EXACT, REPLAYED, X, Y, as_numbers, read, stateful_loader

every_kind = pytest.mark.parametrize("kind", ALL)
every_exact_kind = pytest.mark.parametrize("kind", EXACT)


def saved(feed):
    """The feed's state as it comes out of a checkpoint."""
    arrays, contents = take({"feed": feed})
    taken = Taken()
    snapshot.put({"feed": taken}, arrays, contents)
    return taken.state_


class Taken:
    """Takes the state of something else."""

    def state(self):
        return {}

    def restore(self, state):
        self.state_ = state


def made_alike(kind):
    """A new feed; random numbers stand elsewhere from then on."""
    _seed(0)
    feed = ALL[kind]()
    _seed(1234)
    return feed


def _seed(seed):
    keras.utils.set_random_seed(seed)
    seed_sources_of_data(seed)


def unbroken(feed, epochs):
    """What a feed gives, and its state after each batch, and between epochs."""
    given, states = [[] for _ in range(epochs)], {}
    for epoch in range(epochs):
        if epoch:
            states[epoch, 0] = saved(feed)
        for batch in feed:
            given[epoch].append(as_numbers(batch))
            states[epoch, len(given[epoch])] = saved(feed)
    return given, states


# ----------------------------------------------------------------------- the law


@every_kind
def test_a_new_source_goes_on_from_anywhere(kind):
    given, states = unbroken(ALL[kind](), 3)
    assert len(given[0]) > 1
    for (epoch, taken), state in states.items():
        restored = made_alike(kind)
        restored.restore(state)
        assert read(restored) == given[epoch][taken:], (epoch, taken)
        assert [read(restored) for _ in given[epoch + 1 :]] == given[epoch + 1 :], (epoch, taken)


@pytest.mark.once
@every_kind
def test_it_does_so_again_and_again(kind):
    given, states = unbroken(ALL[kind](), 3)
    state, found = states[0, 1], []
    for _ in range(5):
        feed = made_alike(kind)
        feed.restore(state)
        feed.restore(saved(feed))  # At once, with nothing read.
        found += [as_numbers(next(iter(feed), None)) or "the end of an epoch"]
        state = saved(feed)
    flat = [*given[0][1:], "the end of an epoch", *given[1], "the end of an epoch", *given[2]]
    assert found == flat[: len(found)]


@pytest.mark.once
@every_kind
def test_a_feed_goes_back_to_where_it_stood_itself(kind):
    feed = ALL[kind]()
    given, states = unbroken(feed, 2)
    for place in [(1, 1), (0, 2), (1, 0)]:
        feed.restore(states[place])
        assert read(feed) == given[place[0]][place[1] :], place


@every_kind
def test_a_look_at_the_first_batch_changes_nothing(kind):
    looked, other = made_alike(kind), made_alike(kind)
    first = as_numbers(looked.peek())
    state = saved(looked)
    given = [read(looked) for _ in range(2)]
    assert first == given[0][0]
    if kind not in ("shuffled DataLoader", "weighted DataLoader"):  # They draw from what the other drew from.
        assert given == [read(other) for _ in range(2)]
    restored = made_alike(kind)
    restored.restore(state)
    assert [read(restored) for _ in range(2)] == given


@pytest.mark.once
@every_kind
def test_a_feed_says_whether_it_goes_back_by_itself(kind):
    given, states = unbroken(ALL[kind](), 2)
    feed = made_alike(kind)
    assert feed.seekable is (kind in EXACT)
    feed.restore(states[0, 1])
    assert read(feed) == given[0][1:]
    assert feed.differences(states[1, 1]) == []


@pytest.mark.once
@every_kind
def test_gone_back_to_where_nothing_was_read_it_stands_nowhere_else(kind):
    beginning = saved(made_alike(kind))
    feed = made_alike(kind)
    next(iter(feed))
    feed.restore(beginning)
    assert "source" not in feed.state()
    assert len(read(feed)) == len(read(made_alike(kind)))


def test_to_ask_whether_it_goes_back_draws_no_order():
    asked, other = made_alike("tf.data with all"), made_alike("tf.data with all")
    assert asked.seekable
    assert [read(asked) for _ in range(2)] == [read(other) for _ in range(2)]


@pytest.mark.once
@every_exact_kind
def test_an_epoch_given_up_after_going_back_is_begun_from_its_first_batch(kind):
    given, states = unbroken(ALL[kind](), 1)
    feed = made_alike(kind)
    feed.restore(states[0, 1])
    next(iter(feed))
    assert len(read(feed)) == len(given[0])


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_an_iterator_that_knows_its_position_goes_on_for_its_one_pass(taken):
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
    """Numbered examples, which know which of them were read."""

    def __init__(self):
        self.read = []

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        self.read.append(int(index))
        return X[index], Y[index]


@pytest.mark.parametrize("which", ["DataLoader", "StatefulDataLoader", "Grain"])
def test_what_was_given_is_not_read_again(which):
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


class Stopped(Exception):
    """The end of a run, as sudden as that of its process."""


class Net(hl.Model):
    """Takes both kinds of batches that there are here: pairs, and columns by name."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(1)

    def call(self, x):
        return self.dense(x)

    def train_step(self, data):
        x, y = (data["x"], data["y"]) if isinstance(data, dict) else data
        y = ops.cast(y, "float32")
        return {"loss": self.minimize(lambda: ops.mean((self(x[:, None])[:, 0] - y) ** 2)), "first": x[0]}


class StopAt(keras.callbacks.Callback):
    def __init__(self, steps):
        super().__init__()
        self.steps = steps

    def on_train_batch_end(self, batch, logs=None):
        self.steps -= 1
        if self.steps == 0:
            raise Stopped


def trained(kind, run_dir, stop=0, resume="exact"):
    feed, model = made_alike(kind), Net()
    model.compile("adam")
    options = {"run_dir": run_dir, "save": hl.every(steps=1), "resume": resume}
    try:
        model.fit(feed, epochs=3, seed=3, verbose=0, callbacks=[StopAt(stop)], **options)
    except Stopped:
        return None
    return model.history.history, ops.convert_to_numpy(model.dense.kernel).tolist()


# Three runs each, of which each compiles its step.
@pytest.mark.parametrize(
    "kind",
    ["Grain window", "tf.data with all", "shuffled DataLoader", "shuffled StatefulDataLoader", "shuffled Dataset"],
)
def test_a_run_over_it_that_was_stopped_ends_with_the_same_bits(kind, tmp_path):
    whole = trained(kind, tmp_path / "whole")
    assert trained(kind, tmp_path / "run", stop=5) is None
    assert trained(kind, tmp_path / "run") == whole


@pytest.mark.parametrize("kind", REPLAYED)
def test_a_run_over_what_is_read_again_is_refused_where_it_must_be_exact(kind, tmp_path):
    assert trained(kind, tmp_path, stop=2) is None
    with pytest.raises(CheckpointError, match="resume='exact' needs data with a position"):
        trained(kind, tmp_path)


# ------------------------------------------------------------------ broken states


@pytest.mark.parametrize("kind", [kind for kind in EXACT if "source" in kind or "loader" in kind.lower()])
@pytest.mark.parametrize("name", ["position", "at"])  # As it is saved, and as format 1 had it.
@pytest.mark.parametrize("position", [{"dict": {"a": 1}}, {"pickle": "gASVJAAAAAAAAACMBXBvc2l4"}, {"tuple": 3}, 7])
def test_a_feed_refuses_a_state_that_is_not_of_its_source(kind, name, position):
    feed = ALL[kind]()
    next(iter(feed))
    state = saved(feed) | {"source": {"under_way": True, name: position}}
    with pytest.raises(DataError, match="cannot go back to the position in the state"):
        made_alike(kind).restore(state)


def test_a_loader_whose_state_is_no_plain_value_is_told_what_is():
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


def test_other_data_is_told_of_and_gone_on_with():
    feed = hl.Feed((X, Y), batch_size=4)
    next(iter(feed))
    other = hl.Feed((X + 1, Y.astype("float32")), batch_size=5)
    expected = [
        "batches was 3 and is 2",
        "batch_size was 4 and is 5",
        "y was int32[10] and is float32[10]",
        "the values of x are others",
        "the values of y are others",
    ]
    assert other.differences(saved(feed)) == expected
    with pytest.warns(
        HandloomWarning, match=r"not what it was.*batch_size was 4 and is 5; .* after 1 batches of epoch 0"
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
def test_another_kind_of_source_is_told_of(one, two, match):
    feed = ALL[one]()
    next(iter(feed))
    state = saved(feed)
    other = ALL[two]()
    assert any(match in difference for difference in other.differences(state))
    with pytest.warns(HandloomWarning, match=match):
        other.restore(state | {"seed": other.state()["seed"]})
    assert len(read(other)) > 0


def test_dtypes_of_a_stream_are_told_of_as_soon_as_they_are_known():
    feed = hl.Feed(lambda: iter([X[:5], X[5:]]))
    next(iter(feed))
    other = hl.Feed(lambda: iter([Y[:5], Y[5:]]))
    assert other.differences(feed.state()) == []
    other.peek()
    assert other.differences(feed.state()) == ["the data was float32 with 1 axes and is int32 with 1 axes"]


def test_the_same_data_is_known_again_whatever_holds_it():
    state = hl.Feed((X, Y), batch_size=4).state()
    tf, torch = pytest.importorskip("tensorflow"), pytest.importorskip("torch")
    for x, y in [(torch.from_numpy(X), tf.constant(Y)), (np.asfortranarray(X), Y[::-1][::-1])]:
        assert hl.Feed((x, y), batch_size=4).differences(state) == []


def test_a_sample_of_the_values_finds_another_order_and_another_seed():
    numbers = np.random.default_rng(0).normal(size=(5000, 7))
    state = hl.Feed(numbers).state()
    for other in (numbers[::-1], np.random.default_rng(1).normal(size=(5000, 7)), numbers + 1e-9):
        assert hl.Feed(np.ascontiguousarray(other)).differences(state) == ["the values of the data are others"]


def test_a_state_without_what_the_data_was_is_taken_at_its_word():
    feed = hl.Feed((X, Y), batch_size=4)
    feed.restore({"epoch": 0, "batch": 2, "seed": 0})
    assert as_numbers(next(iter(feed))[0]) == [8, 9]
