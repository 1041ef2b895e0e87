"""Loaders whose workers read ahead stand where the last batch was given, not where the last one was read."""

import multiprocessing

import pytest
from keras import ops

import handloom as hl
from tests.data.sources.kinds import plain_loader, stateful_loader

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.once

# Forked from a process that has nothing but torch: a child of this one, with threads of a backend, may hang.
WORKERS = multiprocessing.get_context("forkserver")
WORKERS.set_forkserver_preload(["torch.utils.data"])


def feed(loader, *, own, persistent):
    options = {"generator": torch.Generator().manual_seed(4)} if own else {}
    data = torch.utils.data.TensorDataset(torch.arange(30))
    return hl.Feed(
        loader()(
            data,
            4,
            shuffle=True,
            num_workers=2,
            multiprocessing_context=WORKERS,
            persistent_workers=persistent,
            **options,
        )
    )


def read(iteration):
    return [ops.convert_to_numpy(batch[0]).tolist() for batch in iteration]


# Each feed starts two workers for each pass.
@pytest.mark.parametrize("loader", [plain_loader, stateful_loader])
@pytest.mark.parametrize("options", [{"own": False, "persistent": False}, {"own": True, "persistent": True}])
@pytest.mark.parametrize("taken", [1, 4, 8])
def test_a_new_loader_goes_on_where_another_stood(loader, options, taken):
    torch.manual_seed(1)
    first = feed(loader, **options)
    iteration = iter(first)
    given = read(next(iteration) for _ in range(taken))
    state = first.state()
    rest, second = read(iteration), read(first)
    torch.manual_seed(2)
    other = feed(loader, **options)
    other.restore(state)
    assert (read(other), read(other)) == (rest, second)
    assert sorted(number for batch in given + rest for number in batch) == list(range(30))
