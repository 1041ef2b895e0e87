"""What is taken of a state can be put back, into what it fits, and into nothing else."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.checkpoint.snapshot import check, put
from handloom.errors import CheckpointError
from tests.checkpoint.common import take

KERNEL, BIAS = np.array([[1.0, 2.0], [3.0, 4.0]], "float32"), np.array([5.0, 6.0], "float32")


def dense(units=2, **options):
    layer = layers.Dense(units, **options)
    layer.build((None, 2))
    return layer


def shapes(arrays):
    return {name: (array.shape, array.dtype.name) for name, array in arrays.items()}


class Remembers:
    def __init__(self, kept=None):
        self.kept = kept

    def state(self):
        return {"kept": self.kept}

    def restore(self, state):
        self.kept = state["kept"]


def test_values_go_over_to_another_of_the_same_kind():
    one, other = dense(), dense()
    one.set_weights([KERNEL, BIAS])
    arrays, contents = take({"layer": one})
    assert [name for name in arrays if not name.startswith("@")] == ["layer.bias", "layer.kernel"]
    check({"layer": other}, shapes(arrays))
    put({"layer": other}, arrays, contents)
    for found, expected in zip(other.get_weights(), [KERNEL, BIAS], strict=True):
        np.testing.assert_array_equal(found, expected)


def test_what_was_taken_does_not_change_with_what_it_was_taken_from():
    layer = dense()
    layer.set_weights([KERNEL, BIAS])
    arrays, _ = take({"layer": layer})
    layer.kernel.assign_add(ops.ones((2, 2)))
    np.testing.assert_array_equal(arrays["layer.kernel"], KERNEL)


def test_the_memory_of_an_earlier_copy_is_used_again_where_it_fits():
    layer, array = dense(), np.arange(3.0)
    before, _ = take({"layer": layer, "array": array})
    before["array"] = np.zeros(4)  # As of another shape then.
    layer.set_weights([KERNEL, BIAS])
    after, _ = take({"layer": layer, "array": array}, before)
    assert after["layer.kernel"] is before["layer.kernel"]
    assert after["array"] is not before["array"]
    np.testing.assert_array_equal(after["layer.kernel"], KERNEL)
    np.testing.assert_array_equal(after["array"], array)
    layer.kernel.assign_add(ops.ones((2, 2)))
    np.testing.assert_array_equal(after["layer.kernel"], KERNEL)


@pytest.mark.parametrize(
    "kept",
    [
        1,
        0.1 + 0.2,
        float("inf"),
        -float("inf"),
        None,
        "text",
        True,
        [1, [2.5]],
        {"a": {"b": 3}},
        KERNEL,
        [BIAS, {"k": KERNEL}],
    ],
    ids=str,
)
def test_what_something_remembers_goes_through_json_and_arrays(kept):
    arrays, contents = take({"it": Remembers(kept)})
    other = Remembers()
    put({"it": other}, arrays, contents)
    assert keras.tree.map_structure(np.array_equal, other.kept, kept) == keras.tree.map_structure(lambda _: True, kept)


def test_not_a_number_is_remembered_too():
    arrays, contents = take({"it": Remembers(float("nan"))})
    other = Remembers()
    put({"it": other}, arrays, contents)
    assert np.isnan(other.kept)


def test_whole_numbers_of_another_size_and_floats_of_another_precision_fit():
    count = keras.Variable(0, dtype="int32", trainable=False)
    half = keras.Variable([0.0], dtype="float16", trainable=False)
    arrays = {"[0]": np.array(7, "int64"), "[1]": np.array([0.5], "float32")}
    check([count, half], shapes(arrays))
    put([count, half], arrays, {})
    assert (int(count), float(half[0])) == (7, 0.5)
    assert (count.dtype, half.dtype) == ("int32", "float16")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: dense(use_bias=False), "only in the checkpoint: layer.bias"),
        (lambda: dense(3), r"layer.kernel is \(2, 2\) in the checkpoint and \(2, 3\) here"),
        (lambda: [dense(), dense()], r"not in the checkpoint: layer\[0\].bias"),
    ],
)
def test_what_does_not_fit_is_an_error_that_names_it(other, words):
    arrays, _ = take({"layer": dense()})
    with pytest.raises(CheckpointError, match=f"{words}.*allow="):
        check({"layer": other()}, shapes(arrays))


def test_what_may_differ_is_named_and_stays_as_it_is(tmp_path):
    old, new = {"body": dense(), "head": [dense()]}, {"body": dense(), "head": [dense(3)]}
    old["body"].set_weights([KERNEL, BIAS])
    new["head"][0].set_weights([np.ones((2, 3)), np.ones(3)])
    with hl.Checkpointer(tmp_path, old) as checkpointer:
        checkpointer.save(4)
    fresh = hl.Checkpointer(tmp_path, new)
    with pytest.raises(CheckpointError, match=r"head\[0\].kernel"):
        fresh.restore(allow=["head[1].*", "head"])
    assert fresh.restore(allow=["head[0].*"]) == 4
    np.testing.assert_array_equal(new["body"].get_weights()[0], KERNEL)
    np.testing.assert_array_equal(new["head"][0].get_weights()[0], np.ones((2, 3)))


def test_slots_stay_with_their_variables_when_others_come_between(tmp_path):
    def made(names):
        state = {"net": {name: dense() for name in names}, "optimizer": keras.optimizers.SGD(0.1, momentum=0.9)}
        variables = [variable for layer in state["net"].values() for variable in layer.trainable_variables]
        state["optimizer"].build(variables)
        return state, variables

    state, variables = made("ac")
    state["optimizer"].apply([ops.full(variable.shape, float(k)) for k, variable in enumerate(variables)], variables)
    with hl.Checkpointer(tmp_path, state) as checkpointer:
        checkpointer.save(1)
    other, _ = made("abc")
    with pytest.raises(CheckpointError, match=r"not in the checkpoint: .*optimizer\.momentums\[net\.b\.bias\]"):
        hl.Checkpointer(tmp_path, other).restore()
    again = hl.Checkpointer(tmp_path, other)
    assert again.restore(allow=["*net.b.*"]) == 1
    momentums = [ops.convert_to_numpy(momentum).ravel()[0] for momentum in other["optimizer"].momentums]
    np.testing.assert_allclose(momentums, [0, -0.1, 0, 0, -0.2, -0.3], rtol=1e-6)
    assert again.restored.missing == (
        "net.b.bias",
        "net.b.kernel",
        "optimizer.momentums[net.b.kernel]",
        "optimizer.momentums[net.b.bias]",
    )
    assert again.restored.unused == ()


def test_what_has_a_state_must_be_in_the_checkpoint_too(tmp_path):
    one = {"layer": dense(), "feed": Remembers(1)}
    with hl.Checkpointer(tmp_path, one) as checkpointer:
        checkpointer.save(1)
    for other, words in (
        ({"layer": dense()}, "only in the checkpoint: feed"),
        (one | {"more": Remembers()}, "not in the checkpoint: more"),
    ):
        before = other["layer"].get_weights()[0]
        with pytest.raises(CheckpointError, match=words):
            hl.Checkpointer(tmp_path, other).restore()
        np.testing.assert_array_equal(other["layer"].get_weights()[0], before)
    assert hl.Checkpointer(tmp_path, {"layer": dense()}).restore(allow=["feed"]) == 1


def test_a_loop_of_ones_own_goes_on_to_the_bit(tmp_path):
    x = np.random.default_rng(0).normal(size=(20, 2)).astype("float32")

    def run(directory, *stops):
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((2,)), layers.Dropout(0.5), layers.Dense(1)])
        optimizer, feed = keras.optimizers.Adam(0.1), hl.Feed(x, batch_size=6, shuffle=True)
        optimizer.build(model.trainable_variables)
        step = hl.function(lambda x: hl.minimize(lambda: ops.mean(model(x, training=True) ** 2), model, optimizer))
        taken, stops = 0, list(stops)
        with hl.Checkpointer(directory, {"model": model, "optimizer": optimizer, "feed": feed}) as checkpointer:
            taken = checkpointer.restore() or 0
            while taken < 10:
                for batch in feed:
                    step(batch)
                    taken += 1
                    checkpointer.save(taken)
                    if taken in (10, *stops):
                        break
                if taken in stops:
                    break
        return [ops.convert_to_numpy(variable.value) for variable in [*model.variables, *optimizer.variables]]

    whole = run(tmp_path / "whole")
    run(tmp_path / "run", 3)
    run(tmp_path / "run", 6)
    for one, other in zip(run(tmp_path / "run"), whole, strict=True):
        np.testing.assert_array_equal(one, other)
