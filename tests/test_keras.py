"""The Keras internals that Handloom uses, and the errors when Keras cannot be used."""

import ast
import random
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
from handloom._util.backend_names import BACKENDS
from tests.models import compiled, sequential
from tests.numbers import close, numpy, ones, same

PACKAGE = Path(hl.__file__).parent


@pytest.mark.once
def test_keras_internals_are_all_in_the_table():
    tree = ast.parse((PACKAGE / "_keras.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names = {alias.name for node in imports if (node.module or "").startswith("keras.src") for alias in node.names}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr)}
    for name in names:
        assert re.search(rf"^\|.*`(\w+\.)?{name}`.*\|$", _keras.__doc__, re.MULTILINE), name


@pytest.mark.backend("torch")  # On JAX, Keras's optimizers call jax.lax.cond.
def test_holders_of_core_are_where_ops_and_optimizers_of_keras_find_cond(monkeypatch):
    called = []
    for holder in _keras.holders_of_core:
        monkeypatch.setattr(holder, "cond", lambda pred, yes, no: called.append(pred) or no())
    assert ops.cond(ops.convert_to_tensor(True), lambda: 1, lambda: 2) == 2
    variable, optimizer = keras.Variable(ones(2)), keras.optimizers.SGD(1.0, gradient_accumulation_steps=2)
    optimizer.apply([ops.ones(2)], [variable])
    assert len(called) > 1
    same(variable, ones(2))


def test_get_stateless_scope_gives_the_innermost_scope():
    assert _keras.get_stateless_scope() is None
    with keras.StatelessScope() as outer:
        with keras.StatelessScope() as inner:
            assert _keras.get_stateless_scope() is inner
        assert _keras.get_stateless_scope() is outer
    assert _keras.get_stateless_scope() is None


def test_stored_value_is_the_tensor_of_a_variable():
    variable = keras.Variable(ones(3))
    same(_keras.stored_value(variable), ones(3))
    variable.assign(2 * ones(3))
    same(_keras.stored_value(variable), 2 * ones(3))


@pytest.mark.backend("jax")
def test_keras_variable_takes_a_tensor_put_into_it():
    variable = keras.Variable(ones(3))
    variable._value = ops.zeros(3)
    same(variable, np.zeros(3))


def test_current_value_and_value_in_read_in_a_scope_and_stored_value_beneath_it():
    variable = keras.Variable(1.0)
    with keras.StatelessScope([(variable, ops.convert_to_tensor(5.0))]) as scope:
        close([_keras.current_value(variable), _keras.stored_value(variable)], [5, 1])
    close([_keras.value_in(scope, variable), _keras.value_in(None, variable)], [5, 1])
    with keras.StatelessScope():
        close(_keras.current_value(variable), 1)


def test_has_value_is_false_for_a_variable_created_in_a_scope_until_the_scope_ends():
    with keras.StatelessScope():
        variable = keras.Variable("ones", shape=(2, 3), dtype="float16")
        assert not _keras.has_value(variable)
        placeholder = _keras.stored_value(variable)
        assert tuple(placeholder.shape) == (2, 3)
        assert keras.backend.standardize_dtype(placeholder.dtype) == "float16"
    assert _keras.has_value(variable)
    same(_keras.stored_value(variable), ones(2, 3))


def test_outside_of_scopes_variables_are_initialized_at_once():
    with keras.StatelessScope() as scope:
        with _keras.outside_of_scopes():
            variable = keras.Variable("ones", shape=(2,))
            assert _keras.has_value(variable)
        assert _keras.get_stateless_scope() is scope


def test_has_own_build_is_true_for_layers_that_build_themselves():
    class Own(layers.Layer):
        def build(self, shape):
            pass

    assert _keras.has_own_build(Own())
    assert _keras.has_own_build(layers.Dense(1))
    assert not _keras.has_own_build(layers.Layer())


def test_stored_value_has_the_dtype_of_the_variable_not_of_the_layer():
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

    Look(dtype="mixed_float16")(ones(1, 2))
    assert [keras.backend.standardize_dtype(tensor.dtype) for tensor in seen] == ["float16", *["float32"] * 3]


def test_layers_of_finds_nested_layers():
    inner = keras.Sequential([layers.Dense(1), layers.Dropout(0.5)])
    outer = keras.Sequential([layers.Input((3,)), inner, layers.Dense(2)])
    found = list(_keras.layers_of(outer))
    assert {id(layer) for layer in (outer, inner, *inner.layers, *outer.layers)} <= set(map(id, found))


def test_functional_is_the_class_of_a_model_from_inputs_and_outputs():
    inputs = keras.Input((3,))
    assert isinstance(keras.Model(inputs, layers.Dense(1)(inputs)), _keras.Functional)
    assert issubclass(_keras.Functional, keras.Model)


def regressor(**options):
    layer = layers.Dense(1, kernel_regularizer=keras.regularizers.L2(0.1))
    return compiled(sequential(layer, cls=keras.Sequential), **options)


def test_default_loss_is_the_compiled_loss_and_the_losses_of_layers():
    model, x, y = regressor(), ones(4, 3), np.zeros((4, 1), "float32")
    predicted, penalty = numpy(model(x)), 0.1 * np.sum(numpy(model.layers[0].kernel) ** 2)
    close(_keras.default_loss(model, x, y, model(x), None, training=True), np.mean(predicted**2) + penalty)
    close(_keras.default_loss(model, x, y, model(x), np.zeros(4, "float32"), training=True), penalty)


def test_default_loss_calls_a_compute_loss_without_training():
    class Custom(keras.Model):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
            return ops.sum(y_pred)

    close(_keras.default_loss(Custom(), None, None, ones(3), None, training=True), 3)


def test_set_loss_tracker_replaces_the_first_metric_of_a_compiled_model():
    model, tracker = regressor(), keras.metrics.Mean(name="loss")
    assert model.metrics[0].name == "loss"
    _keras.set_loss_tracker(model, tracker)
    assert model.metrics[0] is tracker
    assert [metric.name for metric in model.metrics].count("loss") == 1


def test_in_keras_order_lists_values_as_evaluate_does():
    model, data = regressor(metrics=["mae", "mape"]), (ones(4, 3), ones(4, 1))
    listed = model.evaluate(*data, verbose=0)
    named = model.evaluate(*data, verbose=0, return_dict=True)
    assert _keras.in_keras_order(model, {name: named[name] for name in ("mape", "mae", "loss")}) == listed
    alone = regressor()
    alone.evaluate(*data, verbose=0)
    assert _keras.in_keras_order(alone, {"loss": 0.5}) == 0.5


def test_take_initial_epoch_gives_the_epoch_of_a_keras_callback_once(tmp_path):
    model = regressor()
    model.optimizer.build(model.trainable_variables)
    assert _keras.take_initial_epoch(model) == _keras.take_initial_epoch(object.__new__(keras.Model)) == 0
    begun, resumed = (keras.callbacks.BackupAndRestore(tmp_path) for _ in range(2))
    begun.set_model(model)
    begun.on_train_begin()
    begun.on_epoch_end(2)
    resumed.set_model(model)
    resumed.on_train_begin()
    assert [_keras.take_initial_epoch(model) for _ in range(2)] == [3, 0]


def test_keras_optimizer_keeps_the_variables_that_it_was_built_for():
    variables, optimizer = [keras.Variable(1.0), keras.Variable(2.0)], keras.optimizers.SGD()
    optimizer.build(variables)
    assert list(map(id, optimizer._trainable_variables)) == list(map(id, variables))


def test_slots_of_lists_the_slots_of_an_optimizer_until_forget_slots_removes_them():
    optimizer = keras.optimizers.Adam()
    assert _keras.slots_of(optimizer) == []
    optimizer.build([keras.Variable(ones(2), name="w")])
    assert [slot.name for slot in _keras.slots_of(optimizer)] == ["w_momentum", "w_velocity"]
    _keras.forget_slots(optimizer)
    assert [kept.name for kept in optimizer.variables] == ["iteration", "learning_rate"]


def test_global_seed_generator_draws_unseeded_numbers():
    generator = _keras.global_seed_generator()
    before = generator.state.numpy()
    keras.random.normal((2,))
    assert _keras.global_seed_generator() is generator
    assert (generator.state.numpy() != before).any()
    keras.utils.set_random_seed(1)
    made = _keras.global_seed_generator()
    assert made is not generator
    keras.utils.set_random_seed(1)
    close(made.state, keras.random.SeedGenerator().state)  # The seed that Keras would have drawn, which is not used up.


def test_forget_uninitialized_lets_scopes_work_after_a_failed_initializer():
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


def test_set_keras_mask_and_get_keras_mask_use_the_tensor():
    embedded = layers.Embedding(5, 2, mask_zero=True)(np.array([[1, 0]]))
    same(_keras.get_keras_mask(embedded), [[True, False]])
    assert _keras.get_keras_mask(ops.ones(3)) is None
    tensor, mask = ops.convert_to_tensor([[[1.0], [5.0]]]), ops.convert_to_tensor([[True, False]])
    _keras.set_keras_mask(tensor, mask)
    assert _keras.get_keras_mask(tensor) is mask
    same(layers.GlobalAveragePooling1D()(tensor), [[1]])


def test_direction_of_tells_which_values_of_a_metric_are_better():
    metrics = keras.metrics.BinaryAccuracy(), keras.metrics.MeanSquaredError(), keras.metrics.Mean()
    assert list(map(_keras.direction_of, metrics)) == ["up", "down", None]


# ---------------------------------------------------------- a backend that is not installed

WITHOUT = """
import sys
from importlib.machinery import PathFinder
find_spec = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name in sys.argv else find_spec(name, *rest)
import handloom
from handloom.errors import BackendNotInstalledError
try:
    handloom.Model
except BackendNotInstalledError as error:
    print(error)
"""


def message_without(hidden, backend):
    """The error in a process of its own in which some packages are not installed."""
    environment = {"KERAS_BACKEND": backend, "PATH": "", "PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-c", WITHOUT, *hidden]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return run.stdout.strip()


NOT_INSTALLED = r"Keras is set to the backend '{0}', which is not installed\. .*pip install \"handloom\[{0}\]\""
OTHER = r"Handloom runs on jax, tensorflow, torch; Keras is set to '{0}'\. .*KERAS_BACKEND=jax"


@pytest.mark.once
@pytest.mark.parametrize(
    ("hidden", "backend", "message"),
    [
        *(([backend], backend, NOT_INSTALLED + ".*an installed one: KERAS_BACKEND=(?!{0})") for backend in BACKENDS),
        (BACKENDS, "torch", NOT_INSTALLED + r"\. \[HL901\]$"),
        *((["openvino"], backend, OTHER) for backend in ("numpy", "openvino", "abacus")),
    ],
)
def test_import_names_the_installed_or_supported_backends(hidden, backend, message):
    assert re.match(message.format(backend), message_without(hidden, backend))


def test_seed_generator_draws_default_seeds_from_its_name_of_random():
    assert _keras.seed_generator.python_random is random
    keras.utils.set_random_seed(3)
    seed = numpy(keras.random.SeedGenerator().state)[0]
    keras.utils.set_random_seed(3)
    assert seed == random.randint(1, int(1e9))


def test_penalties_in_and_learning_rate_in_give_where_they_are_kept():
    regularizer, constraint = keras.regularizers.L2(), keras.constraints.NonNeg()
    dense = layers.Dense(1, kernel_regularizer=regularizer, kernel_constraint=constraint)
    dense.build((2, 3))
    assert [inside[name] for inside, name in _keras.penalties_in(dense.kernel)] == [regularizer, constraint]
    assert _keras.penalties_in(dense.bias) == []
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 10)
    inside, name = _keras.learning_rate_in(keras.optimizers.SGD(schedule))
    assert inside[name] is schedule
