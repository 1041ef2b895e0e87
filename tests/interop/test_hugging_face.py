"""Hugging Face streams whose state omits a buffer are found, wherever the buffer is in the chain."""

import numpy as np
import pytest

from handloom._interop.hugging_face import forgets_a_buffer

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.once


def stream(count=40):
    return datasets.Dataset.from_dict({"x": np.arange(count)}).to_iterable_dataset(num_shards=4)


def shuffled():
    return stream().shuffle(seed=1, buffer_size=8)


@pytest.mark.parametrize(
    "make",
    [
        shuffled,
        lambda: shuffled().batch(4),
        lambda: shuffled().map(lambda row: row).filter(lambda row: True).with_format("numpy"),
        lambda: datasets.interleave_datasets([stream(), shuffled()]),
        lambda: datasets.concatenate_datasets([shuffled(), stream()]).take(10),
    ],
)
def test_forgets_a_buffer_finds_a_shuffle_through_a_buffer(make):
    assert forgets_a_buffer(make())


@pytest.mark.parametrize("make", [stream, lambda: stream().batch(4), lambda: stream().map(lambda row: row), list])
def test_forgets_a_buffer_finds_nothing_elsewhere(make):
    assert not forgets_a_buffer(make())


def test_state_of_a_buffered_stream_loses_examples():
    # If this fails, the library saves its buffers, and `forgets_a_buffer` can go.
    data = shuffled().batch(4)
    iteration = iter(data)
    for _ in range(5):
        next(iteration)
    other = shuffled().batch(4)
    other.load_state_dict(data.state_dict())
    assert [batch["x"] for batch in iteration] != [batch["x"] for batch in other]
