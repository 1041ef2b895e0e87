"""Rows F1, F3 and F7: data of all types, of all shapes, and larger than memory."""

import os
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.backends import backend
from handloom.errors import DataError, TraceError
from tests.rows.real_data import counts_of_words, lines_of_code

# --------------------------------------------------------------------------- F1, dtypes

# Which dtype a step is given for which that comes in: on every backend the same.
GIVEN = {
    "float64": "float32",
    "float32": "float32",
    "float16": "float16",
    "int8": "int8",
    "uint8": "uint8",
    "int16": "int16",
    "int32": "int32",
    "bool": "bool",
}


def dtype_of(tensor):
    return keras.backend.standardize_dtype(tensor.dtype)


def as_numpy(array):
    return array


WAYS = {
    "NumPy": as_numpy,
    "tensor": ops.convert_to_tensor,
    "tensor of TensorFlow": lambda array: pytest.importorskip("tensorflow").constant(array),
    "tensor of PyTorch": lambda array: pytest.importorskip("torch").from_numpy(array),
    "array of JAX": lambda array: pytest.importorskip("jax").device_put(array),
    "pandas": lambda array: pytest.importorskip("pandas").Series(array),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", GIVEN)
def test_f1_what_goes_in_comes_out_by_one_rule(way, dtype, eagerly, shown):
    array = np.array([0, 1, 1]).astype(dtype)
    for data in (lambda: WAYS[way](array), lambda: iter([WAYS[way](array)])):
        [batch] = hl.Feed(data())
        out = hl.function(lambda x: x)(batch)
        assert dtype_of(out) == GIVEN[dtype]
        np.testing.assert_array_equal(ops.convert_to_numpy(out), array)
    shown("float64 becomes float32, all else stays")


def test_f1_parts_of_mixed_types_keep_each_its_own(eagerly):
    data = {
        "a": np.ones(4),
        "b": (np.arange(4, dtype="int16"), np.array([True, False] * 2)),
        "c": np.ones(4, "float16"),
    }
    [batch] = hl.Feed(data)
    out = hl.function(lambda batch: batch)(batch)
    assert keras.tree.map_structure(dtype_of, out) == {"a": "float32", "b": ("int16", "bool"), "c": "float16"}


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8", "int32"])
def test_f1_numbers_of_python_and_of_64_bits_widen_nothing(dtype, eagerly):
    x = np.array([1, 2, 3]).astype(dtype)
    out = hl.function(lambda x: (x + 1, 2 * x, x + x))(x)
    assert {dtype_of(part) for part in out} == {dtype}
    scale = hl.function(lambda x, scale: x * scale)
    assert dtype_of(scale(np.ones(2, "float32"), np.float64(0.5))) == "float32"


def test_f1_targets_of_64_bits_train_as_those_of_32_do():
    x = np.random.default_rng(0).normal(size=(64, 3))
    y = x @ [1.0, -2.0, 0.5] + 1

    def trained(dtype):
        keras.utils.set_random_seed(0)
        model = hl.Sequential([layers.Dense(1)])
        model.compile("adam", "mse")
        model.fit(x.astype(dtype), y.astype(dtype), epochs=2, shuffle=False, verbose=0)
        assert dtype_of(model.layers[0].kernel) == "float32"
        return model.history.history["loss"]

    assert trained("float64") == trained("float32")


def test_f1_a_whole_number_too_large_for_the_backend_is_an_error_and_no_other_number():
    ids = np.array([1, 2**40 + 1])
    if backend.name != "jax":
        assert ops.convert_to_numpy(next(iter(hl.Feed(ids)))).tolist() == ids.tolist()
        return
    with pytest.raises(DataError, match="from 1 to 1099511627777, which do not fit into int32"):
        hl.Feed(ids)


# ---------------------------------------------------- F3, sparse, ragged, text, and more

LINES = lines_of_code(24)
VOCABULARY = sorted({word for line in LINES for word in line})


def tf():
    return pytest.importorskip("tensorflow")


def sparse_and_dense():
    """24 lines of code as counts of the 40 commonest words, and how long each line is, in tens of letters."""
    lengths = np.array([[len("".join(line)) / 10] for line in LINES], "float32")
    return counts_of_words(LINES, 40), lengths


def regressor():
    keras.utils.set_random_seed(0)
    model = hl.Sequential([layers.Dense(3, "tanh"), layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.05), "mse")
    return model


def sparse_batches():
    x, y = sparse_and_dense()
    return tf().data.Dataset.from_tensor_slices((tf().sparse.from_dense(x), y)).batch(10)


@pytest.mark.backend("jax", "tensorflow")
def test_f3_sparse_batches_train_as_dense_ones_do(eagerly, shown):
    x, y = sparse_and_dense()
    model, dense = regressor(), regressor()
    model.build((None, x.shape[1]))
    dense.build((None, x.shape[1]))
    dense.set_weights(model.get_weights())
    model.fit(sparse_batches(), epochs=2, verbose=0)
    dense.fit(x, y, batch_size=10, shuffle=False, epochs=2, verbose=0)
    np.testing.assert_allclose(model.history.history["loss"], dense.history.history["loss"], rtol=1e-5)
    for one, other in zip(model.get_weights(), dense.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        model.predict(sparse_batches().map(lambda x, y: x), verbose=0),
        dense.predict(x, verbose=0),
        rtol=1e-4,
        atol=1e-6,
    )
    shown("sparse batches train as dense ones")


@pytest.mark.backend("torch")
def test_f3_sparse_batches_are_refused_with_the_way_out(refused):
    with pytest.raises(DataError, match=r"x is a sparse tensor, which .*dataset\.map\(tf\.sparse\.to_dense\)"):
        regressor().fit(sparse_batches(), verbose=0)
    x, _ = sparse_and_dense()
    feed = hl.Feed(sparse_batches().map(lambda x, y: tf().sparse.to_dense(x)))
    np.testing.assert_array_equal(np.concatenate([ops.convert_to_numpy(batch) for batch in feed]), x)
    refused("sparse batches")


def ragged_batches():
    return tf().data.Dataset.from_tensor_slices(tf().ragged.constant([[1.0], [2, 3], [4, 5, 6], []])).ragged_batch(3)


@pytest.mark.backend("tensorflow")
def test_f3_ragged_batches_in_a_step(eagerly, shown):
    step = hl.function(lambda x: {"sum": tf().reduce_sum(x, axis=1), "longest": x.bounding_shape()[1]})
    found = [step(batch) for batch in hl.Feed(ragged_batches())]
    assert [out["sum"].numpy().tolist() for out in found] == [[1, 5, 15], [0]]
    assert [int(out["longest"]) for out in found] == [3, 0]
    shown("ragged batches")


@pytest.mark.backend("jax", "torch")
def test_f3_ragged_batches_are_refused_with_the_way_out(refused):
    with pytest.raises(DataError, match=r"the data is a ragged tensor, .*to_tensor\(\), or padded_batch"):
        hl.fit(lambda x: {"sum": ops.sum(x)}, ragged_batches(), verbose=0)
    padded = hl.Feed(ragged_batches().map(lambda batch: batch.to_tensor()))
    assert [ops.convert_to_numpy(batch).tolist() for batch in padded] == [[[1, 0, 0], [2, 3, 0], [4, 5, 6]], [[]]]
    refused("ragged batches")


def text_batches():
    return tf().data.Dataset.from_tensor_slices([" ".join(line) for line in LINES]).batch(10)


def numbered(lines, first, length):
    """Each word by its place in the vocabulary, counted from `first`; then zeros."""
    numbers = [[VOCABULARY.index(word) + first for word in line] for line in lines]
    return [(line + [0] * length)[:length] for line in numbers]


@pytest.mark.backend("tensorflow")
def test_f3_text_in_a_step(shown):
    lookup = layers.StringLookup(vocabulary=VOCABULARY, num_oov_indices=0)
    step = hl.function(lambda lines: lookup(tf().strings.split(lines).to_tensor(VOCABULARY[0])))
    found = [step(batch).numpy().tolist() for batch in hl.Feed(text_batches())]
    assert list(map(len, found)) == [10, 10, 4]
    for first, batch in zip((0, 10, 20), found, strict=True):
        lines = LINES[first : first + 10]
        assert batch == numbered(lines, 0, max(map(len, lines)))
    assert all(trace.compiled for trace in step.traces)
    shown("text")


@pytest.mark.backend("jax", "torch")
def test_f3_text_is_refused_with_the_way_out(refused):
    with pytest.raises(
        DataError, match=r"the data is text, .*StringLookup or TextVectorization in a pipeline of tf\.data"
    ):
        hl.fit(lambda lines: {"count": len(lines)}, text_batches(), verbose=0)
    vectorize = layers.TextVectorization(vocabulary=VOCABULARY, standardize=None, output_sequence_length=5)
    batches = [ops.convert_to_numpy(batch).tolist() for batch in hl.Feed(text_batches().map(vectorize))]
    assert [line for batch in batches for line in batch] == numbered(LINES, 2, 5)  # 0 is for nothing, 1 for the rest.
    refused("text")


@pytest.mark.backend("tensorflow")
def test_f3_a_tensor_array_in_a_step(eagerly, shown):
    total = keras.Variable(0.0)

    @hl.function
    def squares(count):
        array = tf().TensorArray(tf().float32, size=count)
        for index in tf().range(count):
            array = array.write(index, tf().cast(index, "float32") ** 2)
        values = array.stack()
        total.assign_add(ops.sum(values))
        return values

    assert squares(np.int32(4)).numpy().tolist() == [0, 1, 4, 9]
    assert squares(np.int32(2)).numpy().tolist() == [0, 1]
    assert float(total.value) == 15
    assert len(squares.traces) == (0 if eagerly else 1)
    shown("TensorArray")


@pytest.mark.backend("tensorflow")
def test_f3_sets_in_a_step(eagerly, shown):
    @hl.function
    def common(one, two):
        shared = tf().sets.intersection(one, two)
        return tf().sets.size(shared), tf().sparse.to_dense(shared)

    count, shared = common(np.array([[1, 2, 3], [4, 5, 6]]), np.array([[3, 1, 9], [7, 8, 9]]))
    assert count.numpy().tolist() == [2, 0]
    assert shared.numpy().tolist() == [[1, 3], [0, 0]]
    shown("sets")


@pytest.mark.backend("tensorflow")
def test_f3_a_queue_in_a_step(eagerly, shown):
    queue = tf().queue.FIFOQueue(8, ["float32"], shapes=[()])

    @hl.function
    def delayed(x):
        queue.enqueue(x)
        return queue.dequeue() if queue.size() > 2 else tf().constant(-1.0)

    assert [float(delayed(np.float32(number))) for number in range(5)] == [-1, -1, 0, 1, 2]
    shown("queues")


def through_a_tensor_array(x):
    return tf().TensorArray(tf().float32, size=1).write(0, x).stack()


def through_sets(x):
    return tf().sets.size(tf().sets.intersection(x, x))


def through_a_queue(x):
    queue = tf().queue.FIFOQueue(8, ["float32"])
    queue.enqueue(x)
    return queue.dequeue()


@pytest.mark.backend("jax", "torch")
@pytest.mark.parametrize("through", [through_a_tensor_array, through_sets, through_a_queue])
def test_f3_operations_of_tensorflow_are_refused_with_the_way_out(through, refused):
    with pytest.raises(TraceError, match=r"calls TensorFlow, .*(?s:.)*Use keras\.ops .*scan.*pipeline") as raised:
        hl.function(through)(np.ones((1, 2), "float32"))
    assert "test_f_data.py, line" in str(raised.value)
    refused("TensorArray, sets and queues of TensorFlow")


# ------------------------------------------------------------ F7, larger than memory

# A child of its own: what this process has in memory would hide what comes and goes.
STREAMED = """
import pathlib, sys
import keras, numpy as np
from keras import ops
import handloom as hl

ROWS, COLUMNS, BATCH = 4096, 16384, 16  # 256 MiB, in batches of one, of which some dozen may be under way.
directory = pathlib.Path(sys.argv[1])
mapped = np.memmap(directory / "x", "float32", "w+", shape=(ROWS, COLUMNS))
for first in range(0, ROWS, BATCH):
    mapped[first : first + BATCH] = first
mapped.flush()

def batch(index):
    return np.full((BATCH, COLUMNS), index * BATCH, "float32")

class Batches(keras.utils.PyDataset):
    def __len__(self):
        return ROWS // BATCH

    def __getitem__(self, index):
        return batch(index)

def pipeline():
    import tensorflow as tf
    data = tf.data.Dataset.range(0, ROWS, BATCH)
    return data.map(lambda first: tf.fill((BATCH, COLUMNS), tf.cast(first, "float32"))).prefetch(2)

SOURCES = {
    "mapped": lambda: hl.Feed(mapped, batch_size=BATCH),
    "mapped, shuffled": lambda: hl.Feed(np.memmap(directory / "x", "float32", "r", shape=(ROWS, COLUMNS)),
                                        batch_size=BATCH, shuffle=True),
    "generator": lambda: hl.Feed(lambda: map(batch, range(ROWS // BATCH))),
    "PyDataset": lambda: hl.Feed(Batches(workers=2, max_queue_size=4)),
    "tf.data": lambda: hl.Feed(pipeline()),
}

def own():
    '''Memory of this process in MiB, without the pages of files, which the system takes back as it likes.'''
    [line] = [line for line in open("/proc/self/status") if line.startswith("RssAnon")]
    return int(line.split()[1]) / 1024

class Watch(keras.callbacks.Callback):
    def on_train_begin(self, logs=None):
        self.used = []

    def on_train_batch_end(self, batch, logs=None):
        self.used.append(own())

for name, source in SOURCES.items():
    before, watch = own(), Watch()
    feed = source()
    feed.state()
    made = own() - before
    history = hl.fit(lambda x: {"mean": ops.mean(x)}, feed, verbose=0, callbacks=[watch]).history
    grown = max(watch.used) - watch.used[7]
    print(name, round(made), round(grown), round(history["mean"][0], 3), sep="|")
"""


# Writes 256 MiB and streams them five times, in a new process.
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux tells what memory is whose")
def test_f7_what_is_larger_than_memory_streams_and_memory_stays_flat(tmp_path, shown):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(STREAMED), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"KERAS_BACKEND": keras.backend.backend()},
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == ["mapped", "mapped, shuffled", "generator", "PyDataset", "tf.data"]
    for name, made, grown, mean in rows:
        # At first libraries are loaded; from the eighth batch on, less comes on top than a quarter of the data.
        assert float(mean) == 2040, name
        assert int(grown) < 64, (name, grown)
        if "mapped" in name:
            assert int(made) < 32, (name, made)
    shown(f"{len(rows)} kinds of sources of 256 MiB: memory grows by less than 64 MiB")
