"""Feeds over every kind of data; each function makes the same feed again each time."""

import keras
import pytest

import handloom as hl
from tests.numbered import Numbered, X, Y
from tests.numbers import numpy

COUNT = len(X)


def arrays(**options):
    return lambda: hl.Feed((X, Y), batch_size=4, **options)


def py_dataset(workers=1, **options):
    return lambda: hl.Feed(Numbered(workers=workers, max_queue_size=2), **options)


def grain(make):
    """A feed over Grain data, made from the library and a data set of pairs."""

    def feed():
        library = pytest.importorskip("grain")
        return hl.Feed(make(library, library.MapDataset.source(list(zip(X, Y, strict=True)))))

    return feed


def tf_data(make):
    """A feed over `tf.data`, made from TensorFlow and a data set of pairs."""

    def feed():
        tf = pytest.importorskip("tensorflow")
        return hl.Feed(make(tf, tf.data.Dataset.from_tensor_slices((X, Y))))

    return feed


def loader(seed=None, stateful=False, **options):
    """A feed over a `DataLoader` of pairs; with a seed, the loader has a generator of its own."""

    def feed():
        torch = pytest.importorskip("torch")
        data = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
        own = {} if seed is None else {"generator": torch.Generator().manual_seed(seed)}
        return hl.Feed((stateful_loader() if stateful else plain_loader())(data, 4, **own, **options))

    return feed


def plain_loader():
    return pytest.importorskip("torch").utils.data.DataLoader


def stateful_loader():
    return pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader


def table(make=lambda table: table, **options):
    """A feed over a Hugging Face data set, made from one with the columns x and y."""

    def feed():
        datasets = pytest.importorskip("datasets")
        return hl.Feed(make(datasets.Dataset.from_dict({"x": X, "y": Y})), **options)

    return feed


def grain_loader(grain, _):
    sampler = grain.samplers.IndexSampler(
        COUNT, shuffle=True, seed=1, num_epochs=1, shard_options=grain.sharding.NoSharding()
    )
    return grain.DataLoader(
        # Grain identifies a source by its `repr`.
        data_source=list(zip(X.tolist(), Y.tolist(), strict=True)),
        sampler=sampler,
        operations=[grain.transforms.Batch(4)],
        worker_count=0,
    )


def tripled(x, y):
    return 3 * x, y


# Sources that restore any position by themselves.
EXACT = {
    "arrays": arrays(),
    "shuffled arrays": arrays(shuffle=True, seed=3),
    "PyDataset": py_dataset(),
    "PyDataset with threads": py_dataset(workers=2),
    "shuffled PyDataset": py_dataset(shuffle=True, seed=5),
    "Grain map": grain(lambda _, data: data.shuffle(seed=3).map(lambda pair: tripled(*pair)).batch(4)),
    "Grain random map": grain(
        lambda _, data: data.seed(4).random_map(lambda pair, rng: rng.random() * pair[0]).batch(4)
    ),
    "Grain iter": grain(lambda _, data: data.filter(lambda pair: pair[0] != 5).to_iter_dataset().batch(4)),
    "Grain window": grain(
        lambda grain, data: grain.experimental.WindowShuffleIterDataset(
            data.to_iter_dataset(), window_size=4, seed=2
        ).batch(4)
    ),
    "Grain loader": grain(grain_loader),
    "tf.data": tf_data(lambda tf, data: data.batch(4)),
    "tf.data with all": tf_data(
        lambda tf, data: (
            data.cache().shuffle(6, seed=3).map(tripled, num_parallel_calls=tf.data.AUTOTUNE).batch(4).prefetch(2)
        )
    ),
    "tf.data, one order": tf_data(
        lambda tf, data: data.shuffle(COUNT, seed=3, reshuffle_each_iteration=False).batch(4)
    ),
    "DataLoader": loader(),
    "shuffled DataLoader": loader(shuffle=True),
    "DataLoader with a generator": loader(seed=7, shuffle=True),
    "StatefulDataLoader": loader(stateful=True),
    "shuffled StatefulDataLoader": loader(stateful=True, shuffle=True),
    "Dataset": table(batch_size=4),
    "shuffled Dataset": table(batch_size=4, shuffle=True, seed=3),
    "IterableDataset": table(lambda data: data.to_iterable_dataset(num_shards=3).batch(4)),
    "mapped IterableDataset": table(
        lambda data: (
            data.to_iterable_dataset(num_shards=3).map(lambda row: {"z": row["y"] + 1}).with_format("numpy").batch(4)
        )
    ),
}


def from_generator(tf, data):
    del data
    return tf.data.Dataset.from_generator(
        lambda: zip(X, Y, strict=True), output_signature=(tf.TensorSpec((), "float32"), tf.TensorSpec((), "int32"))
    ).batch(4)


def batches():
    yield from (Numbered()[index] for index in range(3))


class Batches:
    def __iter__(self):
        return batches()


def streamed_loader():
    class Pairs(pytest.importorskip("torch").utils.data.IterableDataset):
        def __iter__(self):
            return iter([(x, y) for x, y in zip(X, Y, strict=True)])

    return hl.Feed(plain_loader()(Pairs(), 4))


# Sources that are read again up to a position. They yield the same batches each time.
REPLAYED = {
    "function": lambda: hl.Feed(batches),
    "iterable": lambda: hl.Feed(Batches()),
    "tf.data of Python": tf_data(from_generator),
    "streamed DataLoader": streamed_loader,
    "buffered IterableDataset": table(
        lambda data: data.to_iterable_dataset(num_shards=3).shuffle(seed=3, buffer_size=4).batch(4)
    ),
}


ALL = EXACT | REPLAYED


def as_numbers(batch):
    return keras.tree.map_structure(lambda part: numpy(part).tolist(), batch)


def read(feed):
    """One epoch, as nested lists."""
    return [as_numbers(batch) for batch in feed]
