"""Single arrays of data: one rule for dtypes, tensors of any library on any backend, and what no backend holds."""

import keras
import ml_dtypes
import numpy as np
import pandas as pd
import pytest
from keras import ops

import handloom as hl
from handloom.backends import backend
from handloom.errors import DataError
from tests.data.sources.kinds import EXACT

jax, tf, torch = (pytest.importorskip(name) for name in ("jax", "tensorflow", "torch"))

LIBRARIES = {"jax": jax.numpy.asarray, "tensorflow": tf.constant, "torch": torch.from_numpy}
every_library = pytest.mark.parametrize("library", LIBRARIES)
# Those that the three libraries and JAX's 32 bits have in common.
DTYPES = ["bool", "int8", "uint8", "int16", "int32", "float16", "float32"]


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
@pytest.mark.parametrize("dtype", [*DTYPES, "int64"])
def test_every_dtype_but_float64_is_kept(through, dtype):
    assert dtype_of(through(np.array([0, 1, 3]).astype(dtype))) == dtype


@both_ways
@pytest.mark.parametrize("floatx", ["float32", "float16"])
def test_float64_becomes_the_usual_float(through, floatx):
    before = keras.config.floatx()
    keras.config.set_floatx(floatx)
    try:
        batch = through(np.array([0.5, 1.5]))
    finally:
        keras.config.set_floatx(before)
    assert dtype_of(batch) == floatx
    np.testing.assert_array_equal(ops.convert_to_numpy(batch), [0.5, 1.5])


def test_float64_frames_and_batches_of_python_numbers_become_the_usual_float():
    for batch in (through_arrays(pd.DataFrame({"a": [0.5], "b": [1]})), through_a_generator(0.5)):
        assert dtype_of(batch) == "float32"


# ------------------------------------------------------------ tensors of any library


@both_ways
@every_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_of_any_library_keeps_its_dtype_and_values(through, library, dtype):
    array = np.array([[0, 1], [1, 3]]).astype(dtype)
    batch = through(LIBRARIES[library](array))
    assert dtype_of(batch) == dtype
    np.testing.assert_array_equal(ops.convert_to_numpy(batch), array)


@both_ways
@every_library
def test_bfloat16_of_any_library_is_kept(through, library):
    batch = through(ops_of(library)(np.array([1.5, -3e38], ml_dtypes.bfloat16)))
    assert dtype_of(batch) == "bfloat16"
    values = ops.convert_to_numpy(ops.cast(batch, "float32"))
    np.testing.assert_array_equal(values, np.array([1.5, -3e38], ml_dtypes.bfloat16).astype("float32"))


def ops_of(library):
    if library == "torch":
        return lambda array: torch.from_numpy(array.astype("float32")).to(torch.bfloat16)
    return LIBRARIES[library]


@both_ways
@pytest.mark.parametrize("library", ["tensorflow", "torch"])  # JAX has no 64 bits to begin with.
def test_64_bit_floats_of_any_library_become_the_usual_float(through, library):
    batch = through(LIBRARIES[library](np.array([0.1, 1e9])))
    assert dtype_of(batch) == "float32"
    np.testing.assert_array_equal(ops.convert_to_numpy(batch), np.array([0.1, 1e9], "float32"))


@both_ways
def test_a_tensor_that_asks_for_gradients_is_data(through):
    np.testing.assert_array_equal(ops.convert_to_numpy(through(torch.ones(3, requires_grad=True) * 2)), [2, 2, 2])


@both_ways
@pytest.mark.parametrize(
    ("column", "dtype"),
    [
        (pd.Series([1.5, 2.5]), "float32"),
        (pd.Series([1, 2], dtype="int16"), "int16"),
        (pd.Series([True, False]), "bool"),
        (pd.Series([1, 2], dtype="Int32"), "int32"),
        (pd.Series([1.5, 2], dtype="Float32"), "float32"),
        (pd.DataFrame({"a": [1, 2], "b": [0.5, 1]}), "float32"),
        (pd.DataFrame({"a": np.int8([1, 2]), "b": np.int32([3, 4])}), "int32"),
    ],
)
def test_columns_of_pandas_have_their_dtype(through, column, dtype):
    batch = through(column)
    assert dtype_of(batch) == dtype
    np.testing.assert_array_equal(ops.convert_to_numpy(batch), column.to_numpy().astype(dtype))


def test_complex_numbers_are_kept():
    batch = through_arrays(np.array([1 + 2j], "complex64"))
    np.testing.assert_array_equal(ops.convert_to_numpy(batch), [1 + 2j])


# ------------------------------------------------------------------ whole numbers


@both_ways
@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_whole_numbers_of_64_bits_keep_their_value_or_are_refused(through, dtype):
    small, large = np.array([0, 2**31 - 1], dtype), np.array([0, 2**33], dtype)
    np.testing.assert_array_equal(ops.convert_to_numpy(through(small)), small)
    kept = dtype_of(hl.function(lambda x: x)(through(small)))
    if kept == dtype:
        np.testing.assert_array_equal(ops.convert_to_numpy(through(large)), large)
        return
    with pytest.raises(
        DataError, match=r"the data has whole numbers from 0 to 8589934592, which do not fit into u?int32"
    ):
        through(large)


@pytest.mark.backend("jax")
def test_where_a_number_does_not_fit_is_named():
    with pytest.raises(DataError, match=r"x\['id'\] has whole numbers from -2147483649 to 0, .*int32"):
        hl.Feed(({"id": np.array([0, -(2**31) - 1])}, np.zeros(2)))


@pytest.mark.backend("jax")
def test_a_mapped_array_is_looked_at_batch_by_batch(tmp_path):
    ids = np.memmap(tmp_path / "ids", "int64", "w+", shape=(4,))
    ids[:] = [0, 1, 2, 2**40]
    batches = iter(hl.Feed(ids, batch_size=2))
    np.testing.assert_array_equal(next(batches), [0, 1])
    with pytest.raises(DataError, match="do not fit into int32"):
        next(batches)


# ---------------------------------------------------------- what a backend cannot hold


WORDS, RAGGED = np.array(["a", "bc"]), [[1.0], [2.0, 3.0]]
# What TensorFlow alone holds: the data, the batch that it gives, and what the others say.
SOME = {
    "text in arrays": (lambda: {"x": WORDS}, ["a", "bc"], "text"),
    "text in tf.data": (lambda: tf.data.Dataset.from_tensors({"x": WORDS}), ["a", "bc"], "text"),
    "text in a generator": (lambda: iter([{"x": WORDS}]), ["a", "bc"], "text"),
    "text in a Dataset": (lambda: pytest.importorskip("datasets").Dataset.from_dict({"x": WORDS}), ["a", "bc"], "text"),
    "ragged in tf.data": (lambda: tf.data.Dataset.from_tensors({"x": tf.ragged.constant(RAGGED)}), RAGGED, "ragged"),
    "ragged in a generator": (lambda: iter([{"x": tf.ragged.constant(RAGGED)}]), RAGGED, "ragged"),
}
SAID = {
    "text": r"'x' is text, for example .*a.*np\.unique.*StringLookup or TextVectorization",
    "ragged": r"'x' is a ragged tensor, .*to_tensor\(\), or padded_batch",
}


@pytest.mark.parametrize("what", SOME)
def test_text_and_ragged_tensors_are_given_by_tensorflow_and_else_refused_with_the_way_out(what):
    make, expected, kind = SOME[what]
    if backend.name != "tensorflow":
        with pytest.raises(DataError, match=SAID[kind]):
            list(hl.Feed(make()))
        return
    [batch] = hl.Feed(make())
    found = batch["x"].to_list() if kind == "ragged" else [word.decode() for word in batch["x"].numpy()]
    assert found == expected


def test_rows_of_unequal_length_are_told_to_be_padded():
    data = pytest.importorskip("datasets").Dataset.from_dict({"x": [[1, 2], [3]]})
    with pytest.raises(DataError, match=r"'x' holds Python objects .*pad rows of different lengths"):
        list(hl.Feed(data))
    with pytest.raises(DataError, match=r"rows of the column 'x' differ in length; pad them, with dataset\.map"):
        list(hl.Feed(data.to_iterable_dataset().batch(2)))


SPARSE = {
    "tensorflow": lambda: tf.sparse.from_dense([[0, 2.0], [0, 0]]),
    "jax": lambda: pytest.importorskip("jax.experimental.sparse").BCOO.fromdense(np.array([[0, 2.0], [0, 0]])),
    "torch": lambda: torch.tensor([[0, 2.0], [0, 0]]).to_sparse(),
}


@pytest.mark.parametrize("library", SPARSE)
def test_sparse_tensors_of_any_library_are_given_where_they_can_be_and_else_refused(library):
    feed = hl.Feed(iter([(SPARSE[library](), np.ones(2))]))
    if library == backend.name == "torch":  # Which has them, though Keras does not know them.
        [(x, _)] = feed
        np.testing.assert_array_equal(x.to_dense(), [[0, 2], [0, 0]])
        return
    if backend.name == "torch":
        with pytest.raises(DataError, match=r"x is a sparse tensor, .*dataset\.map\(tf\.sparse\.to_dense\)"):
            list(feed)
        return
    [(x, _)] = feed
    np.testing.assert_array_equal(ops.convert_to_numpy(ops.convert_to_tensor(x, sparse=False)), [[0, 2], [0, 0]])


@pytest.mark.parametrize("kind", ["sparse", "ragged"])
def test_a_whole_data_set_that_is_not_dense_is_left_to_tf_data(kind):
    data = {"sparse": SPARSE["torch"], "ragged": lambda: tf.ragged.constant([[1], [2, 3]])}[kind]()
    with pytest.raises(DataError, match=rf"a {kind} tensor.*from_tensor_slices\(\.\.\.\)\.batch"):
        hl.Feed(data)


@both_ways
@pytest.mark.parametrize("dtype", ["datetime64[D]", "longdouble", [("a", "f4")]])
def test_dtypes_that_no_backend_has_are_named(through, dtype):
    with pytest.raises(DataError, match=r"the data has the dtype .*, which no backend has\. Convert it first"):
        through(np.zeros(2, dtype))


def test_single_examples_of_a_stream_are_told_to_be_batched():
    data = pytest.importorskip("datasets").Dataset.from_dict({"x": [1, 2]}).to_iterable_dataset()
    with pytest.raises(DataError, match=r"gives single examples \('x' is .* one value\).*dataset\.batch\(32\)"):
        list(hl.Feed(data))


# ------------------------------------------------------------------ any, with any


@pytest.mark.parametrize("kind", EXACT)
def test_any_source_feeds_a_compiled_step_of_any_backend(kind):
    feed = EXACT[kind]()
    step = hl.function(lambda batch: [ops.sum(ops.cast(leaf, "float32")) for leaf in keras.tree.flatten(batch)])
    totals = []
    for batch in feed:
        step(batch)
        totals.append([float(total) for total in step(batch)])
        expected = [ops.convert_to_numpy(leaf).astype("float64").sum() for leaf in keras.tree.flatten(batch)]
        np.testing.assert_allclose(totals[-1], expected, rtol=1e-5)
    assert all(trace.compiled for trace in step.traces)
    assert sum(total[0] for total in totals) > 0
