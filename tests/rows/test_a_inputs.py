"""Row A16: input pipelines of any library feed a step of any backend."""

import keras
import numpy as np
import pytest

import handloom as hl
from handloom._interop.tensors import seed_libraries
from tests.numbers import each_same
from tests.rows.real_data import digits

PIXELS, LABELS = digits()
BATCH = 128


def darker(pixels, label):
    return 0.5 * pixels, label


class Darker:
    """Examples by number, changed as they are read."""

    def __len__(self):
        return len(PIXELS)

    def __getitem__(self, index):
        return darker(PIXELS[index], LABELS[index])


def tf_data():
    tf = pytest.importorskip("tensorflow")
    data = tf.data.Dataset.from_tensor_slices((PIXELS, LABELS)).shuffle(500, seed=1)
    return data.map(darker, num_parallel_calls=2).batch(BATCH).prefetch(2)


def data_loader():
    torch = pytest.importorskip("torch")
    return torch.utils.data.DataLoader(Darker(), BATCH, shuffle=True, generator=torch.Generator().manual_seed(1))


def stateful_loader():
    loader = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    return loader(Darker(), BATCH, shuffle=True)


def grain():
    library = pytest.importorskip("grain")
    data = library.MapDataset.source(list(zip(PIXELS, LABELS, strict=True))).shuffle(seed=1)
    reads = library.ReadOptions(num_threads=2, prefetch_buffer_size=64)
    return data.map(lambda pair: darker(*pair)).to_iter_dataset(reads).batch(BATCH)


PIPELINES = {"tf.data": tf_data, "DataLoader": data_loader, "StatefulDataLoader": stateful_loader, "Grain": grain}


def made(pipeline):
    """A pipeline that gives the same batches each time."""
    keras.utils.set_random_seed(0)
    seed_libraries(0)
    return PIPELINES[pipeline]()


def by_library(pipeline, epochs):
    """The batches that the library itself gives, as NumPy arrays, by epoch."""
    data = made(pipeline)
    return [[tuple(np.asarray(part) for part in batch) for batch in data] for _ in range(epochs)]


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a16_feed_gives_the_batches_of_the_library(pipeline, shown):
    feed, expected = hl.Feed(made(pipeline)), by_library(pipeline, 2)
    step = hl.function(lambda x, y: (x, y))
    for epoch in expected:
        each_same(keras.tree.flatten([step(*batch) for batch in feed]), keras.tree.flatten(epoch))
    assert not np.array_equal(expected[0][0][1], LABELS[:BATCH])
    shown(f"the batches of {pipeline}, bitwise")
