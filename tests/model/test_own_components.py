"""Custom components are saved and loaded by Keras's conventions, also in another process; and no file can run code."""

import json
import os
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import keras
import pytest
from keras import layers

import handloom as hl
from handloom._run.callback_model import callback_model
from handloom.errors import SavedModelError
from handloom.optimizers import ClipByGlobalNorm, GradientAccumulation, GradientTransforms, WeightAveraging
from tests.model import users_module as users
from tests.models import compiled, fit, functional, sequential
from tests.numbers import close, normal

X = normal(20, 3)
Y = X[:, :1] - X[:, 1:2]


def parts(scaled=users.Scaled, penalty=users.Fourth):
    body = layers.Dense(4, "tanh", kernel_regularizer=penalty(0.25), name="body")
    return body, scaled(0.5), layers.Dense(1, name="head")


def net():
    model = users.Net(4, penalty=0.25)
    model(X)
    return model


KINDS = {
    "functional": lambda: functional(*parts(), cls=users.Twice),
    "sequential": lambda: sequential(*parts(), cls=hl.Model),
    "subclassed": net,
}


def compiled_by_name(model):
    """The model, compiled with two optimizers. Only a subclassed model has the name as an attribute."""
    head = GradientTransforms(users.SignDescent(0.01, dead_zone=0.125), [users.Shrink(0.5), users.turn_around])
    rest = GradientAccumulation(WeightAveraging(keras.optimizers.Adam(0.01), decay=0.5), 2)
    named = head if hasattr(model, "head") else (lambda path: "head" in path, head)
    return compiled(model, {"head": named, "*": rest}, users.Pinball(0.75), metrics=[users.ShareWithin(0.5)])


def parameters(model):
    """The parameters of each component of a model."""
    head, rest = model.optimizer["head"], model.optimizer["*"]
    body, scaled = model.body.layers if isinstance(model, users.Net) else model.layers[-3:-1]
    return {
        "quantile": model.loss.quantile,
        "width": model.get_compile_config()["metrics"][0]["config"]["width"],
        "factor": scaled.factor,
        "strength": body.kernel_regularizer.strength,
        "dead zone": head.inner_optimizer.dead_zone,
        "transforms": [head.transforms[0].factor, head.transforms[1].__name__],
        "steps and decay": [rest.steps, rest.inner_optimizer.decay],
    }


def outcome(model):
    """The contents of a model, and how it trains on."""
    history = fit(model, X, Y, batch_size=8, epochs=2)
    return {"kind": type(model).__name__, "parameters": parameters(model), "history": history}


@pytest.fixture(scope="module")  # Over 10 s where a step takes long to compile; the process that loads compiles again.
def saved(tmp_path_factory):
    """The folder of trained and saved models of each kind, and the outcome of each."""
    folder, outcomes = tmp_path_factory.mktemp("saved"), {}
    for kind, make in KINDS.items():
        model = compiled_by_name(make())
        fit(model, X, Y, batch_size=8, epochs=2)
        model.save(folder / f"{kind}.keras")
        outcomes[kind] = outcome(model)
    return folder, outcomes


@pytest.mark.parametrize("kind", KINDS)
def test_load_model_restores_custom_components_with_their_parameters_and_trains_on(kind, saved):
    folder, outcomes = saved
    found = outcome(keras.saving.load_model(folder / f"{kind}.keras"))
    assert found == outcomes[kind]
    assert list(found["parameters"].values()) == [0.75, 0.5, 0.5, 0.25, 0.125, [0.5, "turn_around"], [2, 0.5]]


@pytest.mark.once
def test_load_model_in_a_process_that_imports_the_module_of_the_user(saved):
    folder, outcomes = saved
    code = """
import json, sys
from tests.model.test_own_components import keras, outcome  # This imports the user's module, and does nothing else.
print(json.dumps([outcome(keras.saving.load_model(path)) for path in sys.argv[1:]]))
"""
    kinds = ["functional", "subclassed"]
    command = [sys.executable, "-W", "ignore", "-c", code, *(folder / f"{kind}.keras" for kind in kinds)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    for kind, found in zip(kinds, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert found["parameters"] == outcomes[kind]["parameters"]
        for name, values in outcomes[kind]["history"].items():
            close(found["history"][name], values)


# --------------------------------------------------------------- without the decorator

PLAIN = {
    users.Pinball: lambda plain: compiled(functional(*parts()), loss=plain(0.75)),
    users.plain_error: lambda plain: compiled(functional(*parts()), loss=plain),
    users.ShareWithin: lambda plain: compiled(functional(*parts()), metrics=[plain(0.5)]),
    users.Scaled: lambda plain: compiled(functional(*parts(scaled=plain))),
    users.Fourth: lambda plain: compiled(functional(*parts(penalty=plain))),
    users.SignDescent: lambda plain: compiled(functional(*parts()), {"*": GradientAccumulation(plain(0.01), 2)}),
    users.Shrink: lambda plain: compiled(functional(*parts()), GradientTransforms("sgd", [plain(0.5)])),
    users.plain_turn_around: lambda plain: compiled(functional(*parts()), GradientTransforms("sgd", [plain])),
}


@pytest.mark.once
@pytest.mark.parametrize("component", PLAIN, ids=lambda component: component.__name__)
def test_load_model_names_a_component_without_the_decorator_or_takes_it(component, tmp_path):
    plain = users.plain(component) if isinstance(component, type) else component
    name, model = plain.__name__, PLAIN[component](plain)
    fit(model, X, Y)
    model.save(tmp_path / "model.keras")
    with pytest.raises(SavedModelError, match=rf"not known here: {name} \(of .*write @keras.saving.register.*'{name}'"):
        keras.saving.load_model(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", custom_objects={name: plain})
    assert fit(loaded, X, Y) == fit(model, X, Y)


@pytest.mark.once
def test_load_model_leaves_a_whole_model_without_the_decorator_to_the_error_of_keras(tmp_path):
    functional(cls=users.plain(users.Twice)).save(tmp_path / "model.keras")
    with pytest.raises(TypeError, match=r"locate class 'PlainTwice'.*`@keras.saving.register_keras_serializable\(\)`"):
        keras.saving.load_model(tmp_path / "model.keras")


@pytest.mark.once
def test_save_warns_of_a_lambda_among_the_transforms(tmp_path):
    model = compiled(functional(), GradientTransforms("sgd", [lambda gradients, variables: gradients]))
    with pytest.warns(UserWarning, match="use named Python functions instead"):
        model.save(tmp_path / "model.keras")
    with pytest.raises((TypeError, ValueError), match="disallowed by default"):
        keras.saving.load_model(tmp_path / "model.keras")


# ------------------------------------------------------------------------ hostile files


def outside_keras(module, class_name, config):
    return {"module": module, "class_name": class_name, "config": config, "registered_name": class_name}


def hostile_parts():
    """Parts of a config that would create a file named `ran` if they were run."""
    leave = lambda x: (__import__("os").system("touch ran"), x)[1]  # noqa: E731  Keras saves the code of lambdas alone.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras warns of that.
        code = keras.saving.serialize_keras_object(leave)
        layer = keras.saving.serialize_keras_object(layers.Lambda(leave, output_shape=(4,)))
    return {
        "a lambda": code,
        "a Lambda layer": layer,
        "a function of the system": outside_keras("os", "function", "system"),
        "a class that starts a process": outside_keras("subprocess", "Popen", {"args": "touch ran", "shell": True}),
        "a builtin": outside_keras("builtins", "function", "exec"),
        "a function of Keras outside of models": outside_keras("keras.utils", "function", "get_file"),
        "a function that runs code inside Keras": outside_keras(
            "keras.src.utils.python_utils", "func_load", code["config"]
        ),
    }


HOSTILE = hostile_parts()
NAMED = ("compile_config", "optimizer", "config", "optimizers", "*")
PLACES = {
    "loss": ("compile_config", "loss"),
    "metric": ("compile_config", "metrics", 0),
    "layer": ("config", "layers", 2),
    "regularizer": ("config", "layers", 1, "config", "kernel_regularizer"),
    "named optimizer": NAMED,
    "inner optimizer": (*NAMED, "config", "inner_optimizer"),
    "transform": (*NAMED, "config", "transforms", 0),
}


@pytest.fixture(scope="module")
def harmless(tmp_path_factory):
    """A file that has all the places."""
    named = {"*": GradientTransforms("sgd", [ClipByGlobalNorm(1.0)])}
    model = compiled(functional(*parts()), named, users.Pinball(0.75), metrics=[users.ShareWithin(0.5)])
    path = tmp_path_factory.mktemp("harmless") / "model.keras"
    model.save(path)
    assert keras.saving.load_model(path).optimizer["*"].transforms
    return path


def with_part(path, place, part):
    """A copy, in the current directory, of a saved model with another part at a place of its config."""
    with zipfile.ZipFile(path) as source:
        files = {name: source.read(name) for name in source.namelist()}
    config = inner = json.loads(files["config.json"])
    *keys, last = PLACES[place]
    for key in keys:
        inner = inner[key]
    inner[last] = inner[last] | part | {"build_config": None} if place == "layer" else part
    with zipfile.ZipFile("hostile.keras", "w") as target:
        for name, contents in (files | {"config.json": json.dumps(config)}).items():
            target.writestr(name, contents)
    return "hostile.keras"


@pytest.mark.once
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", HOSTILE)
def test_load_model_refuses_a_hostile_file_and_runs_nothing_in_it(kind, place, harmless, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = with_part(harmless, place, HOSTILE[kind])
    with pytest.raises((TypeError, ValueError)):
        keras.saving.load_model(path)
    assert not Path("ran").exists()


@pytest.mark.once
def test_load_model_without_safe_mode_would_run_the_code_in_the_same_file(harmless, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = with_part(harmless, "layer", HOSTILE["a Lambda layer"])
    keras.saving.load_model(path, safe_mode=False, compile=False).predict(X, verbose=0)
    assert Path("ran").exists()


@pytest.mark.once
@pytest.mark.parametrize("kind", HOSTILE)
def test_callback_model_with_a_hostile_part_is_refused_and_runs_nothing(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with callback_model({"net": functional(), "other": functional()}) as model:
        config = keras.saving.serialize_keras_object(model)
    config["config"]["parts"]["net"] = HOSTILE[kind]
    with pytest.raises((TypeError, ValueError)):
        keras.saving.deserialize_keras_object(config)
    assert not Path("ran").exists()
