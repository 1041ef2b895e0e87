"""Row A16: input pipelines of any library feeding a step of any backend."""

import keras
import numpy as np
import pytest
from keras import ops

import handloom as hl
from handloom._interop.torch_data import seed_sources_of_data
from tests.rows.real_data import digits

PIXELS, LABELS = digits()
BATCH, RATE, CLASSES = 128, 2.0, 10


def darker(pixels, label):
    return 0.5 * pixels, label


class Darker:
    """Examples by number, changed where they are read."""

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
every_pipeline = pytest.mark.parametrize("pipeline", PIPELINES)


def made(pipeline):
    """One made alike each time."""
    keras.utils.set_random_seed(0)
    seed_sources_of_data(0)
    return PIPELINES[pipeline]()


def native(pipeline, epochs):
    """The batches that the library gives by itself, as NumPy arrays."""
    data = made(pipeline)
    return [[tuple(np.asarray(part) for part in batch) for batch in data] for _ in range(epochs)]


def by_numpy(epochs):
    """Softmax regression by gradient descent, written out."""
    weights, losses = np.zeros((PIXELS.shape[1], CLASSES)), []
    for batches in epochs:
        total = 0.0
        for x, y in batches:
            logits = x @ weights
            shares = np.exp(logits - logits.max(axis=1, keepdims=True))
            shares /= shares.sum(axis=1, keepdims=True)
            total -= np.log(shares[np.arange(len(y)), y]).sum()
            weights -= RATE / len(x) * x.T @ (shares - np.eye(CLASSES)[y])
        losses.append(total / len(PIXELS))
    return weights, losses


@every_pipeline
def test_a16_a_pipeline_gives_the_batches_that_its_library_gives(pipeline, shown):
    feed, expected = hl.Feed(made(pipeline)), native(pipeline, 2)
    step = hl.function(lambda x, y: (x, y))
    for epoch in expected:
        found = [step(*batch) for batch in feed]
        assert len(found) == len(epoch)
        for (x, y), (pixels, labels) in zip(found, epoch, strict=True):
            np.testing.assert_array_equal(ops.convert_to_numpy(x), pixels)
            np.testing.assert_array_equal(ops.convert_to_numpy(y), labels)
    assert not np.array_equal(expected[0][0][1], LABELS[:BATCH])
    shown(f"the batches of {pipeline}, to the bit")


@every_pipeline
def test_a16_a_step_over_a_pipeline_trains_as_numpy_does_over_the_same(pipeline, shown):
    weights = keras.Variable(np.zeros((PIXELS.shape[1], CLASSES), "float32"))
    optimizer = keras.optimizers.SGD(RATE)

    def train_step(x, y):
        def loss():
            logits = ops.matmul(x, weights)
            return ops.mean(keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True))

        return {"loss": hl.minimize(loss, weights, optimizer)}

    expected, losses = by_numpy(native(pipeline, 3))
    history = hl.fit(train_step, made(pipeline), epochs=3, verbose=0).history
    np.testing.assert_allclose(ops.convert_to_numpy(weights.value), expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(history["loss"], losses, rtol=1e-4)
    assert losses[-1] < 0.5 * losses[0]
    shown(f"{pipeline}: loss from {losses[0]:.2f} to {losses[-1]:.2f} as in NumPy")
