"""Rows F1, F3 and F7: data of all types, of all shapes, and larger than memory."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.backends import backend
from handloom.errors import DataError, TraceError
from tests.models import compiled, fit
from tests.numbers import close, each_close, numpy, same
from tests.rows.real_data import counts_of_words, lines_of_code

# --------------------------------------------------------------------------- F1, dtypes

# The dtype in a step by the dtype of the data; the same on every backend.
GIVEN = {"float64": "float32"} | {
    dtype: dtype for dtype in ("float32", "float16", "int8", "uint8", "int16", "int32", "bool")
}


def dtype_of(tensor):
    return keras.backend.standardize_dtype(tensor.dtype)


WAYS = {
    "NumPy": lambda array: array,
    "tensor": ops.convert_to_tensor,
    "tensor of TensorFlow": lambda array: pytest.importorskip("tensorflow").constant(array),
    "tensor of PyTorch": lambda array: pytest.importorskip("torch").from_numpy(array),
    "array of JAX": lambda array: pytest.importorskip("jax").device_put(array),
    "pandas": lambda array: pytest.importorskip("pandas").Series(array),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", GIVEN)
def test_f1_feed_and_function_give_data_back_by_one_rule(way, dtype, eagerly, shown):
    array = np.array([0, 1, 1]).astype(dtype)
    for data in (WAYS[way](array), iter([WAYS[way](array)])):
        [batch] = hl.Feed(data)
        out = hl.function(lambda x: x)(batch)
        assert dtype_of(out) == GIVEN[dtype]
        same(out, array)
    shown("float64 becomes float32, all else stays")


def test_f1_feed_keeps_the_types_of_mixed_parts(eagerly):
    data = {
        "a": np.ones(4),
        "b": (np.arange(4, dtype="int16"), np.array([True, False] * 2)),
        "c": np.ones(4, "float16"),
    }
    [batch] = hl.Feed(data)
    out = hl.function(lambda batch: batch)(batch)
    assert keras.tree.map_structure(dtype_of, out) == {"a": "float32", "b": ("int16", "bool"), "c": "float16"}


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8", "int32"])
def test_f1_function_widens_nothing_for_numbers_of_python_and_of_64_bits(dtype, eagerly):
    x = np.array([1, 2, 3]).astype(dtype)
    out = hl.function(lambda x: (x + 1, 2 * x, x + x))(x)
    assert {dtype_of(part) for part in out} == {dtype}
    scale = hl.function(lambda x, scale: x * scale)
    assert dtype_of(scale(np.ones(2, "float32"), np.float64(0.5))) == "float32"


def test_f1_fit_trains_on_64_bits_as_on_32():
    x = np.random.default_rng(0).normal(size=(64, 3))
    y = x @ [1.0, -2.0, 0.5] + 1

    def losses(dtype):
        keras.utils.set_random_seed(0)
        model = compiled(hl.Sequential([layers.Dense(1)]), "adam")
        history = fit(model, x.astype(dtype), y.astype(dtype), epochs=2)
        assert dtype_of(model.layers[0].kernel) == "float32"
        return history["loss"]

    assert losses("float64") == losses("float32")


def test_f1_feed_keeps_large_whole_numbers_or_refuses_them():
    ids = np.array([1, 2**40 + 1])
    if backend.name == "jax":
        with pytest.raises(DataError, match="from 1 to 1099511627777, which do not fit into int32"):
            hl.Feed(ids)
    else:
        same(next(iter(hl.Feed(ids))), ids)


# ---------------------------------------------------- F3, sparse, ragged, text, and more

LINES = lines_of_code(24)
VOCABULARY = sorted({word for line in LINES for word in line})


def tf():
    return pytest.importorskip("tensorflow")


# The counts of the 40 most common words by line of code, and the length of each line, in tens of letters.
COUNTS, LENGTHS = counts_of_words(LINES, 40), np.array([[len("".join(line)) / 10] for line in LINES], "float32")


def sparse_batches():
    return tf().data.Dataset.from_tensor_slices((tf().sparse.from_dense(COUNTS), LENGTHS)).batch(10)


def regressor():
    keras.utils.set_random_seed(0)
    model = hl.Sequential([layers.Dense(3, "tanh"), layers.Dense(1)])
    model.build((None, 40))
    return compiled(model, keras.optimizers.SGD(0.05))


@pytest.mark.backend("jax", "tensorflow")
def test_f3_fit_trains_on_sparse_batches_as_on_dense_ones(eagerly, shown):
    model, dense = regressor(), regressor()
    of_sparse = model.fit(sparse_batches(), epochs=2, verbose=0).history["loss"]
    close(of_sparse, fit(dense, COUNTS, LENGTHS, batch_size=10, epochs=2)["loss"])
    each_close(model.get_weights(), dense.get_weights(), rtol=1e-4)
    predicted = model.predict(sparse_batches().map(lambda x, y: x), verbose=0)
    close(predicted, dense.predict(COUNTS, verbose=0), rtol=1e-4)
    shown("sparse batches train as dense ones")


@pytest.mark.backend("torch")
def test_f3_fit_refuses_sparse_batches_with_a_fix_that_works(refused):
    with pytest.raises(DataError, match=r"x is a sparse tensor.*dataset\.map\(tf\.sparse\.to_dense\)"):
        regressor().fit(sparse_batches(), verbose=0)
    feed = hl.Feed(sparse_batches().map(lambda x, y: tf().sparse.to_dense(x)))
    same(np.concatenate([numpy(batch) for batch in feed]), COUNTS)
    refused("sparse batches")


def ragged_batches():
    return tf().data.Dataset.from_tensor_slices(tf().ragged.constant([[1.0], [2, 3], [4, 5, 6], []])).ragged_batch(3)


@pytest.mark.backend("tensorflow")
def test_f3_function_takes_ragged_batches(eagerly, shown):
    step = hl.function(lambda x: {"sum": tf().reduce_sum(x, axis=1), "longest": x.bounding_shape()[1]})
    found = [step(batch) for batch in hl.Feed(ragged_batches())]
    assert [out["sum"].numpy().tolist() for out in found] == [[1, 5, 15], [0]]
    assert [int(out["longest"]) for out in found] == [3, 0]
    shown("ragged batches")


@pytest.mark.backend("jax", "torch")
def test_f3_fit_refuses_ragged_batches_with_a_fix_that_works(refused):
    with pytest.raises(DataError, match=r"the data is a ragged tensor.*to_tensor\(\), or padded_batch"):
        hl.fit(lambda x: {"sum": ops.sum(x)}, ragged_batches(), verbose=0)
    padded = hl.Feed(ragged_batches().map(lambda batch: batch.to_tensor()))
    assert [numpy(batch).tolist() for batch in padded] == [[[1, 0, 0], [2, 3, 0], [4, 5, 6]], [[]]]
    refused("ragged batches")


def text_batches():
    return tf().data.Dataset.from_tensor_slices([" ".join(line) for line in LINES]).batch(10)


def numbered(lines, first, length):
    """Each word by its position in the vocabulary, counted from `first`; then zeros."""
    numbers = [[VOCABULARY.index(word) + first for word in line] for line in lines]
    return [(line + [0] * length)[:length] for line in numbers]


@pytest.mark.backend("tensorflow")
def test_f3_function_takes_text(shown):
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
def test_f3_fit_refuses_text_with_a_fix_that_works(refused):
    with pytest.raises(DataError, match=r"the data is text.*StringLookup or TextVectorization in a pipeline of tf\."):
        hl.fit(lambda lines: {"count": len(lines)}, text_batches(), verbose=0)
    vectorize = layers.TextVectorization(vocabulary=VOCABULARY, standardize=None, output_sequence_length=5)
    batches = [numpy(batch).tolist() for batch in hl.Feed(text_batches().map(vectorize))]
    assert [line for batch in batches for line in batch] == numbered(LINES, 2, 5)  # 0 is padding, 1 any other word.
    refused("text")


@pytest.mark.backend("tensorflow")
def test_f3_function_takes_a_tensor_array(eagerly, shown):
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
def test_f3_function_takes_sets(eagerly, shown):
    @hl.function
    def common(one, two):
        shared = tf().sets.intersection(one, two)
        return tf().sets.size(shared), tf().sparse.to_dense(shared)

    count, shared = common(np.array([[1, 2, 3], [4, 5, 6]]), np.array([[3, 1, 9], [7, 8, 9]]))
    assert count.numpy().tolist() == [2, 0]
    assert shared.numpy().tolist() == [[1, 3], [0, 0]]
    shown("sets")


@pytest.mark.backend("tensorflow")
def test_f3_function_takes_a_queue(eagerly, shown):
    queue = tf().queue.FIFOQueue(8, ["float32"], shapes=[()])

    @hl.function
    def delayed(x):
        queue.enqueue(x)
        return queue.dequeue() if queue.size() > 2 else tf().constant(-1.0)

    assert [float(delayed(np.float32(number))) for number in range(5)] == [-1, -1, 0, 1, 2]
    shown("queues")


def through_a_queue(x):
    queue = tf().queue.FIFOQueue(8, ["float32"])
    queue.enqueue(x)
    return queue.dequeue()


THROUGH = {
    "TensorArray": lambda x: tf().TensorArray(tf().float32, size=1).write(0, x).stack(),
    "sets": lambda x: tf().sets.size(tf().sets.intersection(x, x)),
    "queue": through_a_queue,
}


@pytest.mark.backend("jax", "torch")
@pytest.mark.parametrize("through", THROUGH.values(), ids=THROUGH)
def test_f3_function_refuses_operations_of_tensorflow_with_a_fix(through, refused):
    with pytest.raises(TraceError, match=r"calls TensorFlow(?s:.)*keras\.ops .*scan.*pipeline") as raised:
        hl.function(through)(np.ones((1, 2), "float32"))
    assert "test_f_data.py, line" in str(raised.value)
    refused("TensorArray, sets and queues of TensorFlow")


# ------------------------------------------------------------ F7, larger than memory


# Slow: writes 256 MiB and streams them five times, in a new process, where no other memory comes and goes.
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs the memory statistics of Linux")
def test_f7_fit_streams_data_larger_than_memory(tmp_path, shown):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.rows.streaming", tmp_path],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == ["mapped", "mapped, shuffled", "generator", "PyDataset", "tf.data"]
    for name, made, grown, mean in rows:
        assert float(mean) == 2040, name
        assert int(grown) < 64, (name, grown)  # A quarter of the data.
        if "mapped" in name:
            assert int(made) < 32, (name, made)
    shown(f"{len(rows)} kinds of sources of 256 MiB: memory grows by less than 64 MiB")
