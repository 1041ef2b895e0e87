"""Own parts are saved and loaded by Keras's conventions, also in another process; and no file can run code."""

import json
import os
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers

import handloom as hl
from handloom._run.callback_model import callback_model
from handloom.errors import SavedModelError
from handloom.optimizers import ClipByGlobalNorm, GradientAccumulation, GradientTransforms, WeightAveraging
from tests.model import users_module as users

X = np.random.default_rng(0).normal(size=(20, 3)).astype("float32")
Y = X[:, :1] - X[:, 1:2]


def functional(cls=hl.Model, scaled=users.Scaled, penalty=users.Fourth):
    inputs = keras.Input((3,))
    hidden = layers.Dense(4, "tanh", kernel_regularizer=penalty(0.25), name="body")(inputs)
    return cls(inputs, layers.Dense(1, name="head")(scaled(0.5)(hidden)))


def sequential():
    body = layers.Dense(4, "tanh", kernel_regularizer=users.Fourth(0.25), name="body")
    return hl.Model([keras.Input((3,)), body, users.Scaled(0.5), layers.Dense(1, name="head")])


def subclassed():
    model = users.Net(4, penalty=0.25)
    model(X)
    return model


KINDS = {
    "functional": lambda: functional(users.Twice),
    "sequential": sequential,
    "subclassed": subclassed,
}


def optimizers():
    turned = GradientTransforms(users.SignDescent(0.01, dead_zone=0.125), [users.Shrink(0.5), users.turn_around])
    return {"head": turned, "*": GradientAccumulation(WeightAveraging(keras.optimizers.Adam(0.01), decay=0.5), 2)}


def compiled(model, optimizer=None, loss=None, metrics=None):
    optimizer, loss = optimizer or users.SignDescent(0.01), loss or users.Pinball(0.75)
    model.compile(optimizer, loss, metrics=metrics or [users.ShareWithin(0.5)])
    return model


def by_name(model):
    """Names are attributes, which only a subclassed model has; the others choose by paths."""
    named = optimizers()
    if not hasattr(model, "head"):
        named["head"] = (lambda path: "head" in path, named["head"])
    return named


def fit(model):
    return model.fit(X, Y, batch_size=8, epochs=2, shuffle=False, verbose=0).history


def parameters(model):
    """Those of each part in a model."""
    head, rest = model.optimizer["head"], model.optimizer["*"]
    body = model.body.layers[0] if isinstance(model, users.Net) else model.get_layer("body")
    scaled = model.body.layers[1] if isinstance(model, users.Net) else model.layers[-2]
    return {
        "quantile": model.loss.quantile,
        "width": model.get_compile_config()["metrics"][0]["config"]["width"],
        "factor": scaled.factor,
        "strength": body.kernel_regularizer.strength,
        "dead zone": head.inner_optimizer.dead_zone,
        "transforms": [head.transforms[0].factor, head.transforms[1].__name__],
        "steps and decay": [rest.steps, rest.inner_optimizer.decay],
    }


def outcome(path):
    """What is in a saved model, and how it trains on."""
    model = keras.saving.load_model(path)
    return {"kind": type(model).__name__, "parameters": parameters(model), "history": fit(model)}


def in_a_fresh_process(code, *arguments):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


# Over 10 s where a step takes long to compile; the process that loads them compiles again.
@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Models of each kind, trained and saved; and how each trains on."""
    folder, going_on = tmp_path_factory.mktemp("saved"), {}
    for kind, make in KINDS.items():
        model = make()
        compiled(model, by_name(model))
        fit(model)
        model.save(folder / f"{kind}.keras")
        going_on[kind] = {"kind": type(model).__name__, "parameters": parameters(model), "history": fit(model)}
    return folder, going_on


@pytest.mark.parametrize("kind", KINDS)
def test_own_parts_come_back_with_their_parameters_and_train_on(kind, saved):
    folder, going_on = saved
    found, expected = outcome(folder / f"{kind}.keras"), going_on[kind]
    assert found["history"] == expected["history"]
    assert found == expected
    assert found["parameters"]["transforms"] == [0.5, "turn_around"]
    assert [found["parameters"][name] for name in ("quantile", "width", "factor", "strength")] == [0.75, 0.5, 0.5, 0.25]


@pytest.mark.once
def test_a_process_that_imports_the_users_module_loads_them(saved):
    folder, going_on = saved
    code = """
import json, sys
from tests.model.test_own_components import outcome  # Which imports the user's module, and does nothing else for it.
print(json.dumps([outcome(path) for path in sys.argv[1:]]))
"""
    kinds = ["functional", "subclassed"]
    done = in_a_fresh_process(code, *(folder / f"{kind}.keras" for kind in kinds))
    assert done.returncode == 0, done.stderr
    for kind, found in zip(kinds, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert found["parameters"] == going_on[kind]["parameters"]
        for name, values in going_on[kind]["history"].items():
            np.testing.assert_allclose(found["history"][name], values, rtol=1e-6, err_msg=name)


@pytest.mark.once
def test_a_process_that_does_not_import_it_is_told_what_to_do(saved):
    code = "import keras, sys, handloom; handloom.Model; keras.saving.load_model(sys.argv[1])"
    done = in_a_fresh_process(code, saved[0] / "subclassed.keras")
    assert done.returncode != 0
    assert "Could not locate class 'Net'" in done.stderr
    assert "make sure they are all imported" in done.stderr


# --------------------------------------------------------------- without the decorator

PLAIN = {
    "PlainPinball": lambda: compiled(functional(), loss=users.PlainPinball(0.75)),
    "plain_error": lambda: compiled(functional(), loss=users.plain_error),
    "PlainShareWithin": lambda: compiled(functional(), metrics=[users.PlainShareWithin(0.5)]),
    "PlainScaled": lambda: compiled(functional(scaled=users.PlainScaled)),
    "PlainFourth": lambda: compiled(functional(penalty=users.PlainFourth)),
    "PlainSignDescent": lambda: compiled(functional(), {"*": GradientAccumulation(users.PlainSignDescent(0.01), 2)}),
    "PlainShrink": lambda: compiled(functional(), GradientTransforms("sgd", [users.PlainShrink(0.5)])),
    "plain_turn_around": lambda: compiled(functional(), GradientTransforms("sgd", [users.plain_turn_around])),
}


@pytest.mark.once
@pytest.mark.parametrize("name", PLAIN)
def test_what_lacks_the_decorator_is_named_with_it_or_given_on_loading(name, tmp_path):
    model = PLAIN[name]()
    fit(model)
    model.save(tmp_path / "model.keras")
    with pytest.raises(SavedModelError, match=rf"not known here: {name} \(of .*write @keras.saving.register.*'{name}'"):
        keras.saving.load_model(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", custom_objects={name: getattr(users, name)})
    assert fit(loaded) == fit(model)


@pytest.mark.once
def test_a_whole_model_that_lacks_the_decorator_is_named_with_it_by_keras(tmp_path):
    compiled(functional(users.PlainTwice)).save(tmp_path / "model.keras")
    with pytest.raises(TypeError, match=r"locate class 'PlainTwice'.*`@keras.saving.register_keras_serializable\(\)`"):
        keras.saving.load_model(tmp_path / "model.keras")


@pytest.mark.once
def test_a_lambda_among_the_transforms_is_told_of_on_saving(tmp_path):
    model = compiled(functional(), GradientTransforms("sgd", [lambda gradients, variables: gradients]))
    with pytest.warns(UserWarning, match="use named Python functions instead"):
        model.save(tmp_path / "model.keras")
    with pytest.raises((TypeError, ValueError), match="disallowed by default"):
        keras.saving.load_model(tmp_path / "model.keras")


# ------------------------------------------------------------------------ hostile files


def of_no_keras(module, class_name, config):
    return {"module": module, "class_name": class_name, "config": config, "registered_name": class_name}


def hostile_parts():
    """Things that would leave a file where they are run, as a config might hold them."""
    leave = lambda x: (__import__("os").system("touch ran"), x)[1]  # noqa: E731  Keras saves the code of lambdas alone.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras warns of that.
        code = keras.saving.serialize_keras_object(leave)
        layer = keras.saving.serialize_keras_object(layers.Lambda(leave, output_shape=(4,)))
    return {
        "a lambda": code,
        "a Lambda layer": layer,
        "a function of the system": of_no_keras("os", "function", "system"),
        "a class that starts a process": of_no_keras("subprocess", "Popen", {"args": "touch ran", "shell": True}),
        "a builtin": of_no_keras("builtins", "function", "exec"),
        "a function of Keras that is no part of a model": of_no_keras("keras.utils", "function", "get_file"),
        "what runs code inside Keras": of_no_keras("keras.src.utils.python_utils", "func_load", code["config"]),
    }


HOSTILE = hostile_parts()


def set_loss(config, part):
    config["compile_config"]["loss"] = part


def set_metric(config, part):
    config["compile_config"]["metrics"] = [part]


def set_layer(config, part):
    layer = config["config"]["layers"][2]
    layer.update(part | {"build_config": None})


def set_regularizer(config, part):
    config["config"]["layers"][1]["config"]["kernel_regularizer"] = part


def set_named_optimizer(config, part):
    config["compile_config"]["optimizer"]["config"]["optimizers"]["*"] = part


def set_inner_optimizer(config, part):
    named = config["compile_config"]["optimizer"]["config"]["optimizers"]
    named["*"]["config"]["inner_optimizer"] = part


def set_transform(config, part):
    named = config["compile_config"]["optimizer"]["config"]["optimizers"]
    named["*"]["config"]["transforms"] = [part]


PLACES = [set_loss, set_metric, set_layer, set_regularizer, set_named_optimizer, set_inner_optimizer, set_transform]


@pytest.fixture(scope="module")
def harmless(tmp_path_factory):
    """A file in which each place is."""
    model = compiled(functional(), {"*": GradientTransforms("sgd", [ClipByGlobalNorm(1.0)])})
    path = tmp_path_factory.mktemp("harmless") / "model.keras"
    model.save(path)
    assert keras.saving.load_model(path).optimizer["*"].transforms
    return path


def with_config(path, change, to):
    """A copy of a saved model with another config."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(to, "w") as target:
        for name in source.namelist():
            contents = source.read(name)
            if name == "config.json":
                config = json.loads(contents)
                change(config)
                contents = json.dumps(config)
            target.writestr(name, contents)
    return to


@pytest.mark.once
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__.removeprefix("set_"))
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_and_nothing_in_it_runs(kind, place, harmless, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = with_config(harmless, lambda config: place(config, HOSTILE[kind]), tmp_path / "model.keras")
    with pytest.raises((TypeError, ValueError)):
        keras.saving.load_model(path)
    assert not Path("ran").exists()


@pytest.mark.once
def test_the_same_file_would_run_its_code_if_it_were_trusted(harmless, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change = lambda config: set_layer(config, HOSTILE["a Lambda layer"])  # noqa: E731
    path = with_config(harmless, change, tmp_path / "model.keras")
    keras.saving.load_model(path, safe_mode=False, compile=False).predict(X, verbose=0)
    assert Path("ran").exists()


@pytest.mark.once
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_part_of_what_a_plain_step_trains_is_refused(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with callback_model({"net": functional(), "other": functional()}) as model:
        config = keras.saving.serialize_keras_object(model)
    config["config"]["parts"]["net"] = HOSTILE[kind]
    with pytest.raises((TypeError, ValueError)):
        keras.saving.deserialize_keras_object(config)
    assert not Path("ran").exists()
