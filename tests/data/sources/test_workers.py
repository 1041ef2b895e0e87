"""Loaders with workers that read ahead: their position is that of the batches given, not of the batches read."""

import pytest

import handloom as hl
from tests.data.sources.kinds import plain_loader, stateful_loader
from tests.forkserver import forkserver
from tests.numbers import numpy

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.once


def feed(loader, own, persistent):
    # A child of this process, with threads of a backend, may hang.
    options = {"num_workers": 2, "multiprocessing_context": forkserver, "persistent_workers": persistent}
    options |= {"generator": torch.Generator().manual_seed(4)} if own else {}
    return hl.Feed(loader()(torch.utils.data.TensorDataset(torch.arange(30)), 4, shuffle=True, **options))


def read(iteration):
    return [numpy(batch[0]).tolist() for batch in iteration]


# Each feed starts two workers for each pass.
@pytest.mark.parametrize("loader", [plain_loader, stateful_loader])
@pytest.mark.parametrize("own_and_persistent", [False, True])
@pytest.mark.parametrize("taken", [1, 4, 8])
def test_feed_restores_the_position_of_a_loader_with_workers(loader, own_and_persistent, taken):
    torch.manual_seed(1)
    first = feed(loader, own_and_persistent, own_and_persistent)
    iteration = iter(first)
    given = read(next(iteration) for _ in range(taken))
    state = first.state()
    rest, second = read(iteration), read(first)
    torch.manual_seed(2)
    other = feed(loader, own_and_persistent, own_and_persistent)
    other.restore(state)
    assert (read(other), read(other)) == (rest, second)
    assert sorted(number for batch in given + rest for number in batch) == list(range(30))
