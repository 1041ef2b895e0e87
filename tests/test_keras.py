"""What Handloom uses of Keras beyond what Keras exports, and what it says when Keras cannot be used."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers, ops

import handloom as hl
from handloom import _keras

PACKAGE = Path(hl.__file__).parent


def numpy(value):
    return ops.convert_to_numpy(value)


# ------------------------------------------------------------- nothing beyond the table


@pytest.mark.once
def test_each_internal_is_in_the_table():
    tree = ast.parse((PACKAGE / "_keras.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names = {alias.name for node in imports if (node.module or "").startswith("keras.src") for alias in node.names}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr)}
    for name in names:
        assert re.search(rf"^\|.*`(\w+\.)?{name}`.*\|$", _keras.__doc__, re.MULTILINE), name


# ------------------------------------------------------------------------ the internals


def test_a_scope_is_found_by_what_runs_in_it():
    assert _keras.get_stateless_scope() is None
    with keras.StatelessScope() as outer:
        assert _keras.get_stateless_scope() is outer
        with keras.StatelessScope() as inner:
            assert _keras.get_stateless_scope() is inner
        assert _keras.get_stateless_scope() is outer
    assert _keras.get_stateless_scope() is None


def test_a_variable_holds_its_tensor():
    variable = keras.Variable(np.ones(3, "float32"))
    tensor = _keras.stored_value(variable)
    np.testing.assert_array_equal(numpy(tensor), np.ones(3))
    variable.assign(2 * np.ones(3))
    np.testing.assert_array_equal(numpy(_keras.stored_value(variable)), 2 * np.ones(3))


@pytest.mark.backend("jax")
def test_a_tensor_put_into_a_variable_is_its_value():
    variable = keras.Variable(np.ones(3, "float32"))
    variable._value = ops.zeros(3)
    np.testing.assert_array_equal(numpy(variable), np.zeros(3))


def test_a_value_is_read_in_a_scope_and_beneath_it():
    variable = keras.Variable(1.0)
    with keras.StatelessScope([(variable, ops.convert_to_tensor(5.0))]) as scope:
        assert float(numpy(_keras.current_value(variable))) == 5
        assert float(numpy(_keras.stored_value(variable))) == 1
    assert float(numpy(_keras.value_in(scope, variable))) == 5
    assert float(numpy(_keras.value_in(None, variable))) == 1
    with keras.StatelessScope():
        assert float(numpy(_keras.current_value(variable))) == 1


def test_a_variable_made_in_a_scope_has_a_value_after_it():
    with keras.StatelessScope():
        variable = keras.Variable("ones", shape=(2, 3), dtype="float16")
        assert not _keras.has_value(variable)
        stand_in = _keras.stored_value(variable)
        assert tuple(stand_in.shape) == (2, 3)
        assert keras.backend.standardize_dtype(stand_in.dtype) == "float16"
    assert _keras.has_value(variable)
    np.testing.assert_array_equal(numpy(_keras.stored_value(variable)), np.ones((2, 3)))


def test_a_stored_value_has_the_dtype_of_the_variable_not_of_the_layer():
    seen = []

    class Look(layers.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=(2,))

        def call(self, x):
            seen.extend([self.w.value, _keras.stored_value(self.w), _keras.current_value(self.w)])
            with keras.StatelessScope():
                fresh = keras.Variable("zeros", shape=(2,), dtype="float32")
                seen.append(_keras.stored_value(fresh))
            return x

    Look(dtype="mixed_float16")(np.ones((1, 2), "float32"))
    assert [keras.backend.standardize_dtype(tensor.dtype) for tensor in seen] == ["float16", *["float32"] * 3]


def test_all_layers_in_a_layer_are_found():
    inner = keras.Sequential([layers.Dense(1), layers.Dropout(0.5)])
    outer = keras.Sequential([layers.Input((3,)), inner, layers.Dense(2)])
    found = list(_keras.layers_of(outer))
    assert {id(layer) for layer in (outer, inner, *inner.layers, *outer.layers)} <= set(map(id, found))


def test_a_model_from_inputs_and_outputs_is_functional():
    inputs = keras.Input((3,))
    assert isinstance(keras.Model(inputs, layers.Dense(1)(inputs)), _keras.Functional)
    assert issubclass(_keras.Functional, keras.Model)


def regressor(**compiled):
    model = keras.Sequential([layers.Input((3,)), layers.Dense(1, kernel_regularizer=keras.regularizers.L2(0.1))])
    model.compile(loss="mse", **compiled)
    return model


def test_the_default_loss_is_the_compiled_one_with_what_layers_add():
    model = regressor()
    x, y = np.ones((4, 3), "float32"), np.zeros((4, 1), "float32")
    predicted = numpy(model(x))
    loss = _keras.default_loss(model, x, y, model(x), None, training=True)
    np.testing.assert_allclose(
        numpy(loss), np.mean(predicted**2) + 0.1 * np.sum(numpy(model.layers[0].kernel) ** 2), rtol=1e-5
    )
    weighted = _keras.default_loss(model, x, y, model(x), np.zeros(4, "float32"), training=True)
    np.testing.assert_allclose(numpy(weighted), 0.1 * np.sum(numpy(model.layers[0].kernel) ** 2), rtol=1e-5)


def test_a_compute_loss_that_knows_nothing_of_training_is_called_too():
    class Own(keras.Model):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
            return ops.sum(y_pred)

    loss = _keras.default_loss(Own(), None, None, np.ones(3, "float32"), None, training=True)
    assert float(numpy(loss)) == 3


def test_a_compiled_model_keeps_its_loss_in_the_first_of_its_metrics():
    model = regressor()
    assert model.metrics[0].name == "loss"
    tracker = keras.metrics.Mean(name="loss")
    _keras.set_loss_tracker(model, tracker)
    assert model.metrics[0] is tracker
    assert [metric.name for metric in model.metrics].count("loss") == 1


def test_reported_values_come_in_the_order_of_the_metrics():
    model = regressor(metrics=["mae", "mape"])
    x, y = np.ones((4, 3), "float32"), np.ones((4, 1), "float32")
    listed = model.evaluate(x, y, verbose=0)
    named = model.evaluate(x, y, verbose=0, return_dict=True)
    shuffled = {name: named[name] for name in ("mape", "mae", "loss")}
    assert _keras.in_keras_order(model, shuffled) == listed
    alone = regressor()
    alone.evaluate(x, y, verbose=0)
    assert _keras.in_keras_order(alone, {"loss": 0.5}) == 0.5


def test_a_callback_of_kerass_says_where_to_go_on(tmp_path):
    model = regressor(optimizer="sgd")
    model.optimizer.build(model.trainable_variables)
    begun, resumed = (keras.callbacks.BackupAndRestore(tmp_path) for _ in range(2))
    begun.set_model(model)
    begun.on_train_begin()
    begun.on_epoch_end(2)
    resumed.set_model(model)
    resumed.on_train_begin()
    assert _keras.take_initial_epoch(model) == 3
    assert _keras.take_initial_epoch(model) == 0


def test_without_such_a_callback_training_begins_at_the_start():
    assert _keras.take_initial_epoch(regressor()) == 0
    assert _keras.take_initial_epoch(object.__new__(keras.Model)) == 0


def test_an_optimizer_keeps_what_it_was_built_for():
    variables, optimizer = [keras.Variable(1.0), keras.Variable(2.0)], keras.optimizers.SGD()
    optimizer.build(variables)
    assert list(map(id, optimizer._trainable_variables)) == list(map(id, variables))


def test_unseeded_numbers_come_from_the_global_generator():
    generator = _keras.global_seed_generator()
    before = generator.state.numpy()
    keras.random.normal((2,))
    assert _keras.global_seed_generator() is generator
    assert (generator.state.numpy() != before).any()
    keras.utils.set_random_seed(1)
    assert _keras.global_seed_generator() is not generator


def test_what_could_not_be_initialized_can_be_forgotten():
    """In Keras alone, every later scope fails too."""

    def broken(shape, dtype=None):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"), keras.StatelessScope():
        keras.Variable(broken, shape=())
    with pytest.raises(RuntimeError, match="broken"), keras.StatelessScope():
        pass
    _keras.forget_uninitialized()
    with keras.StatelessScope():
        pass


def test_a_mask_travels_on_its_tensor():
    embedded = layers.Embedding(5, 2, mask_zero=True)(np.array([[1, 0]]))
    np.testing.assert_array_equal(numpy(_keras.get_keras_mask(embedded)), [[True, False]])
    assert _keras.get_keras_mask(ops.ones(3)) is None
    tensor, mask = ops.convert_to_tensor([[[1.0], [5.0]]]), ops.convert_to_tensor([[True, False]])
    _keras.set_keras_mask(tensor, mask)
    assert _keras.get_keras_mask(tensor) is mask
    np.testing.assert_array_equal(numpy(layers.GlobalAveragePooling1D()(tensor)), [[1]])


# ---------------------------------------------------------- a backend that is not there

WITHOUT = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name in {hidden!r} else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Without, sys.meta_path)
import handloom
from handloom.errors import BackendNotInstalledError
try:
    handloom.Model
except BackendNotInstalledError as error:
    print(error)
"""


def said(backend, hidden=()):
    """What the error says in a process of its own, where some packages are not installed."""
    environment = {"KERAS_BACKEND": backend, "PATH": "", "PYTHONPATH": str(PACKAGE.parent)}
    code = WITHOUT.format(hidden=tuple(hidden))
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return run.stdout.strip()


@pytest.mark.once
@pytest.mark.parametrize("backend", _keras.BACKENDS)
def test_a_backend_that_is_not_installed_is_named_with_the_command_that_installs_it(backend):
    message = said(backend, hidden=[backend])
    assert message.startswith(f"Keras is set to the backend '{backend}', which is not installed.")
    assert f'pip install "handloom[{backend}]"' in message
    assert re.search(r"or choose an installed one: KERAS_BACKEND=(\w+)", message)[1] != backend


@pytest.mark.once
def test_where_no_backend_is_installed_none_is_offered():
    message = said("torch", hidden=_keras.BACKENDS)
    assert message.endswith('Install it with: pip install "handloom[torch]". [HL901]')


@pytest.mark.once
@pytest.mark.parametrize("backend", ["numpy", "openvino", "abacus"])
def test_a_backend_that_is_none_of_ours_is_named_with_those_that_are(backend):
    message = said(backend, hidden=["openvino"])
    assert message.startswith(f"Handloom runs on jax, tensorflow, torch; Keras is set to '{backend}'.")
    assert "KERAS_BACKEND=jax" in message


def test_a_metric_says_which_way_is_better():
    assert _keras.direction_of(keras.metrics.BinaryAccuracy()) == "up"
    assert _keras.direction_of(keras.metrics.MeanSquaredError()) == "down"
    assert _keras.direction_of(keras.metrics.Mean()) is None
