"""Single arrays in feeds: one rule for dtypes, tensors of any library on any backend, and data that backends lack.

`tests/rows/test_f_data.py` (F1) proves the rule for every common dtype and library.
"""

import keras
import ml_dtypes
import numpy as np
import pandas as pd
import pytest
from keras import ops

import handloom as hl
from handloom._interop.tensors import LIBRARIES
from handloom.backends import backend
from handloom.errors import DataError
from tests.numbers import same

jax, tf, torch = (pytest.importorskip(name) for name in LIBRARIES)

BFLOAT16 = {
    "jax": jax.numpy.asarray,
    "tensorflow": tf.constant,
    "torch": lambda array: torch.from_numpy(array.astype("float32")).to(torch.bfloat16),
}


def through_arrays(array):
    [batch] = hl.Feed(array)
    return batch


def through_a_generator(array):
    [batch] = hl.Feed(iter([array]))
    return batch


both_ways = pytest.mark.parametrize("through", [through_arrays, through_a_generator])


def dtype_of(batch):
    return keras.backend.standardize_dtype(batch.dtype)


# ---------------------------------------------------------------------- of NumPy


@both_ways
def test_feed_converts_float64_to_another_floatx(through):
    before = keras.config.floatx()
    keras.config.set_floatx("float16")
    try:
        batch = through(np.array([0.5, 1.5]))
    finally:
        keras.config.set_floatx(before)
    assert dtype_of(batch) == "float16"
    same(batch, [0.5, 1.5])


def test_feed_converts_batches_of_python_numbers_to_floatx():
    assert dtype_of(through_a_generator(0.5)) == "float32"


# ------------------------------------------------------------ tensors of any library


@both_ways
@pytest.mark.parametrize("library", BFLOAT16)
def test_feed_keeps_bfloat16_of_any_library(through, library):
    array = np.array([1.5, -3e38], ml_dtypes.bfloat16)
    batch = through(BFLOAT16[library](array))
    assert dtype_of(batch) == "bfloat16"
    same(ops.cast(batch, "float32"), array.astype("float32"))


@both_ways
@pytest.mark.parametrize(
    ("column", "dtype"),
    [
        (pd.Series([1, 2], dtype="Int32"), "int32"),
        (pd.Series([1.5, 2], dtype="Float32"), "float32"),
        (pd.DataFrame({"a": [1, 2], "b": [0.5, 1]}), "float32"),
        (pd.DataFrame({"a": np.int8([1, 2]), "b": np.int32([3, 4])}), "int32"),
    ],
)
def test_feed_keeps_the_dtypes_of_pandas(through, column, dtype):
    batch = through(column)
    assert dtype_of(batch) == dtype
    same(batch, column.to_numpy().astype(dtype))


def test_feed_keeps_complex_numbers():
    same(through_arrays(np.array([1 + 2j], "complex64")), [1 + 2j])


# ------------------------------------------------------------------ whole numbers


@both_ways
@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_feed_keeps_the_values_of_64_bit_integers_or_refuses_them(through, dtype):
    small, large = np.array([0, 2**31 - 1], dtype), np.array([0, 2**33], dtype)
    same(through(small), small)
    kept = dtype_of(hl.function(lambda x: x)(through(small)))
    if kept == dtype:
        same(through(large), large)
        return
    with pytest.raises(DataError, match=r"has whole numbers from 0 to 8589934592, .* do not fit into u?int32.*HL423"):
        through(large)


@pytest.mark.backend("jax")
def test_feed_names_the_array_with_an_integer_that_does_not_fit():
    with pytest.raises(DataError, match=r"x\['id'\] has whole numbers from -2147483649 to 0, .*int32"):
        hl.Feed(({"id": np.array([0, -(2**31) - 1])}, np.zeros(2)))


@pytest.mark.backend("jax")
def test_feed_checks_a_mapped_array_batch_by_batch(tmp_path):
    ids = np.memmap(tmp_path / "ids", "int64", "w+", shape=(4,))
    ids[:] = [0, 1, 2, 2**40]
    batches = iter(hl.Feed(ids, batch_size=2))
    same(next(batches), [0, 1])
    with pytest.raises(DataError, match="do not fit into int32"):
        next(batches)


# ---------------------------------------------------------- what a backend cannot hold


def data_set(columns):
    return pytest.importorskip("datasets").Dataset.from_dict(columns)


WORDS, RAGGED = np.array(["a", "bc"]), [[1.0], [2.0, 3.0]]
# Data for TensorFlow alone: the data, the batch on TensorFlow, and the kind of message on the other backends.
SOME = {
    "text in arrays": (lambda: {"x": WORDS}, ["a", "bc"], "text"),
    "text as Python's strings": (lambda: {"x": WORDS.astype(object)}, ["a", "bc"], "text"),
    "text as bytes": (lambda: {"x": np.array([b"a", b"bc"], object)}, ["a", "bc"], "text"),
    "text in pandas": (lambda: {"x": pd.Series(["a", "bc"])}, ["a", "bc"], "text"),
    "text in a tensor": (lambda: {"x": tf.constant(["a", "bc"])}, ["a", "bc"], "text"),
    "Python's strings in a generator": (lambda: iter([{"x": WORDS.astype(object)}]), ["a", "bc"], "text"),
    "text in a generator": (lambda: iter([{"x": WORDS}]), ["a", "bc"], "text"),
    "text in a Dataset": (lambda: data_set({"x": WORDS}), ["a", "bc"], "text"),
    "ragged in a generator": (lambda: iter([{"x": tf.ragged.constant(RAGGED)}]), RAGGED, "ragged"),
}
SAID = {
    "text": r"'x' is text, for example .*a.*np\.unique.*StringLookup or TextVectorization.*HL424",
    "ragged": r"'x' is a ragged tensor, .*to_tensor\(\), or padded_batch.*HL414",
}


@pytest.mark.parametrize("what", SOME)
def test_feed_holds_text_and_ragged_tensors_on_tensorflow_and_elsewhere_refuses_them_with_a_fix(what):
    make, expected, kind = SOME[what]
    if backend.name != "tensorflow":
        with pytest.raises(DataError, match=SAID[kind]):
            list(hl.Feed(make()))
        return
    [batch] = hl.Feed(make())
    found = batch["x"].to_list() if kind == "ragged" else [word.decode() for word in batch["x"].numpy()]
    assert found == expected


def test_feed_names_the_object_that_is_no_text():
    with pytest.raises(DataError, match=r"Python objects .*, for example None.*in text, fill in what is missing"):
        hl.Feed(np.array(["a", None], object))


@pytest.mark.parametrize(
    ("columns", "convert", "match"),
    [
        ({"x": [[1, 2], [3]]}, lambda data: data, "'x' holds Python objects .*pad rows of different lengths.*HL421"),
        (
            {"x": [[1, 2], [3]]},
            lambda data: data.to_iterable_dataset().batch(2),
            r"Rows of column 'x' differ in length\. Pad with dataset\.map.*HL430",
        ),
        (
            {"x": [1, 2]},
            lambda data: data.to_iterable_dataset(),
            r"gives single examples: 'x' is one value, .*dataset\.batch\(32\).*HL429",
        ),
    ],
    ids=["rows of unequal length", "rows of unequal length in a stream", "single examples"],
)
def test_feed_refuses_hugging_face_data_without_columns_of_one_shape(columns, convert, match):
    with pytest.raises(DataError, match=match):
        list(hl.Feed(convert(data_set(columns))))


SPARSE = {
    "tensorflow": lambda: tf.sparse.from_dense([[0, 2.0], [0, 0]]),
    "jax": lambda: pytest.importorskip("jax.experimental.sparse").BCOO.fromdense(np.array([[0, 2.0], [0, 0]])),
    "torch": lambda: torch.tensor([[0, 2.0], [0, 0]]).to_sparse(),
}


@pytest.mark.parametrize("library", SPARSE)
def test_feed_holds_sparse_tensors_of_any_library_where_the_backend_does(library):
    feed = hl.Feed(iter([(SPARSE[library](), np.ones(2))]))
    if library == backend.name == "torch":  # PyTorch has sparse tensors, which Keras does not know.
        [(x, _)] = feed
        same(x.to_dense(), [[0, 2], [0, 0]])
        return
    if backend.name == "torch":
        [(x, _)] = feed
        with pytest.raises(DataError, match=r"x is a sparse tensor, .*dataset\.map\(tf\.sparse\.to_dense\)"):
            ops.add(x, 1)
        return
    [(x, _)] = feed
    same(ops.convert_to_tensor(x, sparse=False), [[0, 2], [0, 0]])


@pytest.mark.parametrize("kind", ["sparse", "ragged"])
def test_feed_refuses_to_cut_a_sparse_or_ragged_tensor(kind):
    data = {"sparse": SPARSE["torch"], "ragged": lambda: tf.ragged.constant([[1], [2, 3]])}[kind]()
    if (kind, backend.name) == ("ragged", "tensorflow"):
        assert [batch.to_list() for batch in hl.Feed(data, batch_size=1)] == [[[1]], [[2, 3]]]
        return
    with pytest.raises(DataError, match=rf"a {kind} tensor.*from_tensor_slices\(\.\.\.\)\.batch.*HL419"):
        hl.Feed(data)


@both_ways
@pytest.mark.parametrize("dtype", ["datetime64[D]", "longdouble", [("a", "f4")]])
def test_feed_refuses_dtypes_that_no_backend_has(through, dtype):
    with pytest.raises(DataError, match=r"the data has the dtype .*, which no backend has\. Convert it.*HL422"):
        through(np.zeros(2, dtype))
