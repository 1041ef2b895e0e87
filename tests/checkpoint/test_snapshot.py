"""`take`, `check` and `put` copy a state, and restore it only where it fits."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom.checkpoint.snapshot import check, put
from handloom.errors import CheckpointError
from tests.checkpoint.common import take
from tests.models import built
from tests.numbers import close, each_same, numpy, same

KERNEL, BIAS = np.array([[1.0, 2.0], [3.0, 4.0]], "float32"), np.array([5.0, 6.0], "float32")


def dense(units=2, values=None, **options):
    layer = built(layers.Dense(units, **options), 2)
    if values is not None:
        layer.set_weights(values)
    return layer


class Remembers:
    def __init__(self, kept=None):
        self.kept = kept

    def state(self):
        return {"kept": self.kept}

    def restore(self, state):
        self.kept = state["kept"]


def saved(directory, state):
    with hl.Checkpointer(directory, state) as checkpointer:
        checkpointer.save(1)


def test_put_gives_values_to_another_layer_of_the_same_kind():
    one, other = dense(values=[KERNEL, BIAS]), dense()
    arrays, contents = take({"layer": one})
    assert [name for name in arrays if not name.startswith("@")] == ["layer.bias", "layer.kernel"]
    check({"layer": other}, arrays)
    put({"layer": other}, arrays, contents)
    each_same(other.get_weights(), [KERNEL, BIAS])


def test_take_copies_and_uses_the_memory_of_an_earlier_copy_again():
    layer, array = dense(), np.arange(3.0)
    before, _ = take({"layer": layer, "array": array})
    before["array"] = np.zeros(4)  # Of another shape.
    layer.set_weights([KERNEL, BIAS])
    after, _ = take({"layer": layer, "array": array}, before)
    assert after["layer.kernel"] is before["layer.kernel"]
    assert after["array"] is not before["array"]
    layer.kernel.assign_add(ops.ones((2, 2)))
    array += 1
    same(after["layer.kernel"], KERNEL)
    same(after["array"], [0, 1, 2])


def test_put_restores_other_objects_from_their_states():
    kept = {"nested": [1, (0.5, None)], "array": np.arange(3), "nan": float("nan")}
    arrays, contents = take({"it": Remembers(kept)})
    other = Remembers()
    put({"it": other}, arrays, contents)
    np.testing.assert_equal(other.kept, kept)


def test_put_converts_integers_and_floats_to_the_dtype_of_the_variable():
    count = keras.Variable(0, dtype="int32", trainable=False)
    half = keras.Variable([0.0], dtype="float16", trainable=False)
    arrays = {"[0]": np.array(7, "int64"), "[1]": np.array([0.5], "float32")}
    check([count, half], arrays)
    put([count, half], arrays, {})
    assert (int(count), float(half[0])) == (7, 0.5)
    assert (count.dtype, half.dtype) == ("int32", "float16")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: dense(use_bias=False), "only in the checkpoint: layer.bias"),
        (lambda: dense(3), r"layer.kernel is \(2, 2\) in the checkpoint and \(2, 3\) here"),
        (
            lambda: [dense() for _ in range(4)],
            r"not in the checkpoint: layer\[0\].bias, .*, layer\[2\].bias and 3 more;",
        ),
    ],
)
def test_check_names_variables_that_do_not_fit(other, words):
    arrays, _ = take({"layer": dense()})
    with pytest.raises(CheckpointError, match=f"{words}.*allow=.*HL536"):
        check({"layer": other()}, arrays)


def test_restore_names_the_calls_that_build_what_is_not_built(tmp_path):
    def made():
        return {"model": keras.Sequential([layers.Dense(2)]), "optimizer": keras.optimizers.Adam()}

    def build(state, name):
        state[name].build((None, 2) if name == "model" else state["model"].trainable_variables)

    state, other = made(), made()
    calls = {"model": r"model\.build\(input_shape\)", "optimizer": r"optimizer\.build\(model\.trainable_variables\)"}
    for name in state:
        build(state, name)
    saved(tmp_path, state)
    checkpointer = hl.Checkpointer(tmp_path, other)
    for name in state:
        with pytest.raises(CheckpointError, match=rf"call {' and '.join(calls.values())}\. \[HL536\]"):
            checkpointer.restore()
        build(other, name)
        del calls[name]
    assert checkpointer.restore() == 1
    each_same(other["model"].get_weights(), state["model"].get_weights())


def test_restore_with_allow_leaves_variables_unchanged(tmp_path):
    saved(tmp_path, {"body": dense(values=[KERNEL, BIAS]), "head": [dense()]})
    new = {"body": dense(), "head": [dense(3, values=[np.ones((2, 3)), np.ones(3)])]}
    fresh = hl.Checkpointer(tmp_path, new)
    with pytest.raises(CheckpointError, match=r"head\[0\].kernel"):
        fresh.restore(allow=["head[1].*", "head"])
    assert fresh.restore(allow=["head[0].*"]) == 1
    same(new["body"].kernel, KERNEL)
    same(new["head"][0].kernel, np.ones((2, 3)))


def test_restore_keeps_slots_with_their_variables_when_others_come_between(tmp_path):
    def made(names):
        state = {"net": {name: dense() for name in names}, "optimizer": keras.optimizers.SGD(0.1, momentum=0.9)}
        variables = [variable for layer in state["net"].values() for variable in layer.trainable_variables]
        state["optimizer"].build(variables)
        return state, variables

    state, variables = made("ac")
    state["optimizer"].apply([ops.full(variable.shape, float(k)) for k, variable in enumerate(variables)], variables)
    saved(tmp_path, state)
    other, _ = made("abc")
    with pytest.raises(CheckpointError, match=r"not in the checkpoint: .*optimizer\.momentums\[net\.b\.bias\]"):
        hl.Checkpointer(tmp_path, other).restore()
    again = hl.Checkpointer(tmp_path, other)
    assert again.restore(allow=["*net.b.*"]) == 1
    momentums = [numpy(momentum).ravel()[0] for momentum in other["optimizer"].momentums]
    close(momentums, [0, -0.1, 0, 0, -0.2, -0.3])
    slots = [f"optimizer.momentums[net.b.{weight}]" for weight in ("kernel", "bias")]
    assert again.restored.missing == ("net.b.bias", "net.b.kernel", *slots)
    assert again.restored.unused == ()


def test_restore_compares_objects_with_a_state_before_it_changes_anything(tmp_path):
    state = {"layer": dense(), "feed": Remembers(1)}
    saved(tmp_path, state)
    for other, words in (
        ({"layer": dense()}, "only in the checkpoint: feed"),
        (state | {"more": Remembers()}, "not in the checkpoint: more"),
    ):
        before = other["layer"].get_weights()
        with pytest.raises(CheckpointError, match=words):
            hl.Checkpointer(tmp_path, other).restore()
        each_same(other["layer"].get_weights(), before)
    assert hl.Checkpointer(tmp_path, {"layer": dense()}).restore(allow=["feed"]) == 1
