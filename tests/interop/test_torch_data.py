"""PyTorch's `DataLoader`: its position is restored by the order of the examples, without reading."""

import pytest

from handloom._interop.torch_data import torch_data

torch = pytest.importorskip("torch")
data = torch.utils.data


class Numbers(data.Dataset):
    def __init__(self, count=70):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return index


class Drawing(Numbers):
    """Examples that change at random, as augmented images do."""

    def __getitem__(self, index):
        return index + torch.rand(())


def read(iteration):
    return [batch.tolist() for batch in iteration]


def generator(seed=4):
    return torch.Generator().manual_seed(seed)


ORDERS = {
    "in order": dict,
    "shuffled": lambda: {"shuffle": True},
    "by a generator of its own": lambda: {"shuffle": True, "generator": generator()},
    "with replacement, drawn bit by bit": lambda: {
        "sampler": data.RandomSampler(Numbers(), replacement=True, num_samples=70, generator=generator())
    },
    "more than there is, drawn bit by bit": lambda: {
        "sampler": data.RandomSampler(Numbers(20), num_samples=70, generator=generator()),
        "generator": generator(5),
    },
    "a part": lambda: {"sampler": data.SubsetRandomSampler(range(5, 70))},
    "weighted": lambda: {"sampler": data.WeightedRandomSampler([1.0] * 70, 70, generator=generator())},
    "a share": lambda: {"sampler": data.distributed.DistributedSampler(Numbers(), 2, 1)},
    "full batches": lambda: {"shuffle": True, "drop_last": True},
}


@pytest.mark.parametrize("drawing", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_torch_data_resumes_any_order_at_any_position(order, drawing):
    def reader():
        return torch_data(data.DataLoader(Drawing() if drawing else Numbers(), 8, **ORDERS[order]()))

    torch.manual_seed(1)
    first = reader()
    states, given = [], []
    for batch in first.begin():
        states.append(first.state())
        given.append(batch.tolist())
    second = read(first.begin())
    for number, state in enumerate(states, 1):
        torch.manual_seed(2)
        other = reader()
        assert read(other.resume(state, number)) == given[number:]
        if not drawing or number == len(states):  # Within a pass, the examples drew random numbers too.
            assert read(other.begin()) == second


def test_torch_data_gives_the_batches_of_the_loader():
    torch.manual_seed(1)
    own = read(data.DataLoader(Numbers(), 8, shuffle=True))
    torch.manual_seed(1)
    assert read(torch_data(data.DataLoader(Numbers(), 8, shuffle=True)).begin()) == own


class Own(data.Sampler):
    def __iter__(self):
        return iter(range(5))

    def __len__(self):
        return 5


class Stream(data.IterableDataset):
    def __iter__(self):
        return iter(range(5))


class Loader(data.DataLoader):
    pass


@pytest.mark.parametrize(
    "loader",
    [
        lambda: data.DataLoader(Numbers(), 2, sampler=Own()),
        lambda: data.DataLoader(Numbers(), batch_sampler=[[0, 1], [2]]),
        lambda: data.DataLoader(Numbers(), None),
        lambda: data.DataLoader(Stream(), 2),
        lambda: Loader(Numbers(), 2),
        Numbers,
    ],
    ids=["own sampler", "own batches", "no batches", "stream", "own loader", "no loader"],
)
def test_torch_data_is_none_for_other_data(loader):
    assert torch_data(loader()) is None
