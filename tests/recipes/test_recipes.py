"""Whole runs of the recipes: how good they are, and the files that they leave."""

import ast
import re
from pathlib import Path

import keras
import numpy as np
import pytest
from matplotlib.image import imread

import handloom as hl
import handloom.recipes
from handloom.recipes import digits, gan_digits, loop_by_hand, wide_and_deep
from handloom.report import save_image_grid
from tests.numbers import close, each_same, numpy, same
from tests.run.run_log import epochs_in

FILES = sorted(path for path in Path(handloom.recipes.__file__).parent.glob("*.py") if path.stem != "__init__")


def assert_left_curves_and_epochs(run_dir, epochs, steps, *names):
    """Checks `curves.png` and the log of a run, which reports these names."""
    pixels = imread(run_dir / "curves.png")
    assert pixels.ndim == 3
    assert np.ptp(pixels) > 0.5
    lines = epochs_in(run_dir)
    assert [(line["epoch"], line["step"]) for line in lines] == [(n, steps * n) for n in range(1, epochs + 1)]
    assert all(np.isfinite([line[name] for name in names]).all() for line in lines)
    return lines


# ------------------------------------------------------------------------- form


@pytest.mark.once
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_recipe_is_short_and_documented_and_names_no_backend(path):
    source = path.read_text(encoding="utf-8")
    module = ast.parse(source)
    assert len(source.splitlines()) <= 100
    assert ast.get_docstring(module).splitlines()[0].endswith(".")
    [main] = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    assert [argument.arg for argument in main.args.args] == ["run_dir", "epochs"]
    assert ast.get_docstring(main)
    assert not re.search(r"\b(jax|jnp|tensorflow|tf|torch)\b", source, re.IGNORECASE)


# ----------------------------------------------------------------------- digits


@pytest.fixture(scope="module")
def classified(tmp_path_factory):
    """A whole run of `digits`: its directory and the line that it returns."""
    run_dir = tmp_path_factory.mktemp("digits")
    return run_dir, digits.main(run_dir)


def test_digits_classifies_held_out_digits_and_returns_the_accuracy(classified):
    run_dir, line = classified
    model = keras.models.load_model(run_dir / "model.keras")
    _, (x, y) = digits.load()
    accuracy = np.mean(model.predict(x, verbose=0).argmax(axis=1) == y)
    assert accuracy > 0.95
    assert line == f"Accuracy on held-out digits: {accuracy:.3f}."


def test_digits_load_holds_out_a_third():
    (x, y), (x_held_out, y_held_out) = digits.load()
    assert (len(x), len(x_held_out)) == (1198, 599)
    assert len(y) == len(x)
    assert np.bincount(y_held_out).min() > 50
    assert -1 == min(x.min(), x_held_out.min()) < max(x.max(), x_held_out.max()) == 1
    trained_on = {image.tobytes() for image in x}
    assert not any(image.tobytes() in trained_on for image in x_held_out)


def test_digits_leaves_its_curves_and_its_log(classified):
    run_dir, line = classified
    lines = assert_left_curves_and_epochs(run_dir, 30, 19, "loss")
    assert lines[-1]["loss"] < 0.2 * lines[0]["loss"]
    assert f"{lines[-1]['val_accuracy']:.3f}" in line


# ---------------------------------------------------------------- wide and deep


@pytest.fixture(scope="module")
def tumours(tmp_path_factory):
    """A whole run of `wide-and-deep`: its directory, the line that it returns, and its initial weights."""
    initial = {}

    class Recording(wide_and_deep.WideAndDeep):
        def fit(self, x, y, **options):
            self({name: part[:1] for name, part in x.items()})
            initial.update(_paths(self))
            return super().fit(x, y, **options)

    run_dir = tmp_path_factory.mktemp("wide-and-deep")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wide_and_deep, "WideAndDeep", Recording)
        line = wide_and_deep.main(run_dir)
    return run_dir, line, initial


def _paths(model):
    return {name: list(map(numpy, getattr(model, name).trainable_weights)) for name in ("wide", "deep")}


def test_wide_and_deep_classifies_held_out_tumours_by_two_paths_with_an_optimizer_each(tumours):
    run_dir, line, initial = tumours
    model = wide_and_deep.WideAndDeep()
    _, (x, y) = wide_and_deep.load()
    model({name: part[:1] for name, part in x.items()})
    model.load_weights(run_dir / "model.weights.h5")
    accuracy = np.mean((numpy(model(x)) > 0) == y)
    assert accuracy > 0.93

    final = _paths(model)
    for path in ("wide", "deep"):
        for before, after in zip(initial[path], final[path], strict=True):
            assert np.abs(after - before).max() > 1e-3
    # Only Ftrl, by its L1 strength, sets weights to zero exactly; Adam never does.
    used, size = np.count_nonzero(final["wide"][0]), final["wide"][0].size
    assert 0 < used < size / 2
    assert all(np.all(weight) for weight in final["deep"] if weight.ndim == 2)
    assert line == f"Accuracy on held-out tumours: {accuracy:.3f}; {used} of {size} wide weights in use."


def test_wide_and_deep_leaves_its_curves_and_its_log(tumours):
    lines = assert_left_curves_and_epochs(tumours[0], 30, 12, "loss", "accuracy", "val_loss", "val_accuracy")
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]


def test_wide_and_deep_crosses_two_bins_into_one_of_sixteen_combinations():
    bins = np.zeros((1, 30), int)
    bins[0, :2] = 2, 3
    [features] = wide_and_deep.crossed(bins)
    crossings = features[30 * 4 :].reshape(45, 16)
    same(crossings.sum(axis=1), np.ones(45))
    assert crossings[0].argmax() == 2 * 4 + 3  # The first pair is of the first two measurements.


# ------------------------------------------------------------------- gan-digits


# Takes about 30 s: only a long run shows whether it ends nearer to real digits than to noise.
GAN_EPOCHS = 40  # Half of the default of the recipe.


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """A whole run of `gan-digits`: its directory and the line that it returns."""
    run_dir = tmp_path_factory.mktemp("gan-digits")
    return run_dir, gan_digits.main(run_dir, epochs=GAN_EPOCHS)


def test_gan_digits_ends_nearer_to_real_digits_than_to_noise(generated):
    number = r"(\d+\.\d)"
    line = rf"Fréchet distance to held-out digits: real digits {number}, generated digits {number}, noise {number}"
    real, own, noise = map(float, re.fullmatch(line, generated[1]).groups())
    assert real < own < noise
    assert own - real < noise - own


def test_gan_digits_leaves_its_curves_and_both_losses(generated):
    assert_left_curves_and_epochs(generated[0], GAN_EPOCHS, 19, "d_loss", "g_loss")


def test_gan_digits_leaves_its_model_and_samples_of_each_epoch(generated, tmp_path):
    run_dir, _ = generated
    samples = sorted((run_dir / "samples").iterdir())
    assert [path.name for path in samples] == [f"epoch-{epoch:03}.png" for epoch in range(1, GAN_EPOCHS + 1)]
    generator = keras.models.load_model(run_dir / "model.keras")
    noise = np.random.default_rng(0).standard_normal((64, gan_digits.LATENT), dtype="float32")
    again = imread(save_image_grid(generator.predict(noise, verbose=0), tmp_path / "again.png"))
    first, last = imread(samples[0]), imread(samples[-1])
    assert last.shape[:2] == (8 * 10 * 6, 8 * 10 * 6)
    close(again, last, atol=2 / 255)
    assert np.abs(first - last).mean() > 0.1


# ----------------------------------------------------------------- loop by hand


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    """A whole run of `loop_by_hand`: its directory and the line that it returns."""
    run_dir = tmp_path_factory.mktemp("loop_by_hand")
    return run_dir, loop_by_hand.main(run_dir)


def test_loop_by_hand_stops_after_three_bad_epochs_and_keeps_the_best_and_the_last_three_checkpoints(by_hand):
    run_dir, line = by_hand
    accuracy, best = re.search(r"digits: (0\.\d+), after the best epoch, (\d+)\.", line).groups()
    assert float(accuracy) > 0.95
    checkpointer = hl.Checkpointer(run_dir / "checkpoints", {}, best="min:val_loss")
    assert checkpointer.steps == [19 * (int(best) + after) for after in range(4)]
    assert checkpointer.best_step == checkpointer.steps[0]
    kept = [hl.load_checkpoint(folder) for folder in sorted((run_dir / "checkpoints").glob("step_*"))]
    losses = [checkpoint.metrics["val_loss"] for checkpoint in kept]
    assert min(losses) == losses[0]


def test_loop_by_hand_resumes_bitwise_identical(by_hand, tmp_path):
    run_dir, line = by_hand
    loop_by_hand.main(tmp_path, epochs=2)
    assert loop_by_hand.main(tmp_path) == line
    assert loop_by_hand.main(tmp_path) == line  # A finished run stays finished.
    each_same(*(keras.models.load_model(folder / "model.keras").get_weights() for folder in (run_dir, tmp_path)))
