"""Each recipe, run whole: it learns what it says, and leaves what it says."""

import ast
import re
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops
from matplotlib.image import imread

import handloom as hl
import handloom.recipes
from handloom.recipes import digits, gan_digits, loop_by_hand, wide_and_deep
from handloom.report import save_image_grid
from tests.run.run_log import epochs_in

FILES = sorted(path for path in Path(handloom.recipes.__file__).parent.glob("*.py") if path.stem != "__init__")


def assert_is_a_picture(path):
    pixels = imread(path)
    assert pixels.ndim == 3
    assert np.ptp(pixels) > 0.5


# ------------------------------------------------------------------- their form


@pytest.mark.once
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_is_short_explains_itself_and_names_no_backend(path):
    source = path.read_text(encoding="utf-8")
    module = ast.parse(source)
    assert len(source.splitlines()) <= 100
    assert ast.get_docstring(module).splitlines()[0].endswith(".")
    [main] = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    assert [argument.arg for argument in main.args.args] == ["run_dir", "epochs"]
    assert ast.get_docstring(main)
    assert not re.search(r"\b(jax|jnp|tensorflow|tf|torch)\b", source, re.IGNORECASE)


@pytest.mark.once
def test_there_are_the_recipes_that_the_readme_speaks_of():
    assert {path.stem for path in FILES} >= {"digits", "gan_digits", "loop_by_hand", "wide_and_deep"}


# ----------------------------------------------------------------------- digits


@pytest.fixture(scope="module")
def told_apart(tmp_path_factory):
    """A whole run of `digits`: its directory and the line it returns."""
    run_dir = tmp_path_factory.mktemp("digits")
    return run_dir, digits.main(run_dir)


def test_digits_tells_held_out_digits_apart_and_says_how_many(told_apart):
    run_dir, line = told_apart
    model = keras.models.load_model(run_dir / "model.keras")
    _, (x, y) = digits.load()
    accuracy = np.mean(model.predict(x, verbose=0).argmax(axis=1) == y)
    assert accuracy > 0.95
    assert line == f"Accuracy on held-out digits: {accuracy:.3f}."


def test_digits_holds_out_a_third_that_it_never_trains_on():
    (x, y), (x_held_out, y_held_out) = digits.load()
    assert (len(x), len(x_held_out)) == (1198, 599)
    assert len(y) == len(x)
    assert np.bincount(y_held_out).min() > 50
    assert -1 == min(x.min(), x_held_out.min()) < max(x.max(), x_held_out.max()) == 1
    trained_on = {image.tobytes() for image in x}
    assert not any(image.tobytes() in trained_on for image in x_held_out)


def test_digits_leaves_its_curves_and_a_line_an_epoch(told_apart):
    run_dir, line = told_apart
    assert_is_a_picture(run_dir / "curves.png")
    lines = epochs_in(run_dir)
    assert [entry["epoch"] for entry in lines] == list(range(1, 31))
    assert lines[-1]["loss"] < 0.2 * lines[0]["loss"]
    assert f"{lines[-1]['val_accuracy']:.3f}" in line


# ---------------------------------------------------------------- wide and deep


@pytest.fixture(scope="module")
def tumours(tmp_path_factory):
    """A whole run of `wide-and-deep`: its directory, the line it returns, and the weights that it began with."""
    begun = {}

    class Recording(wide_and_deep.WideAndDeep):
        def fit(self, x, y, **options):
            self({name: part[:1] for name, part in x.items()})
            begun.update(_paths(self))
            return super().fit(x, y, **options)

    run_dir = tmp_path_factory.mktemp("wide-and-deep")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wide_and_deep, "WideAndDeep", Recording)
        line = wide_and_deep.main(run_dir)
    return run_dir, line, begun


@pytest.fixture
def tumour_model(tumours):
    """The model that the run left."""
    model = wide_and_deep.WideAndDeep()
    _, (x, _) = wide_and_deep.load()
    model({name: part[:1] for name, part in x.items()})
    model.load_weights(tumours[0] / "model.weights.h5")
    return model


def _paths(model):
    return {
        name: [ops.convert_to_numpy(weight) for weight in getattr(model, name).weights if weight.trainable]
        for name in ("wide", "deep")
    }


def test_wide_and_deep_tells_held_out_tumours_apart_and_says_how_many(tumours, tumour_model):
    _, (x, y) = wide_and_deep.load()
    accuracy = np.mean((ops.convert_to_numpy(tumour_model(x)) > 0) == y)
    assert accuracy > 0.93
    assert tumours[1].startswith(f"Accuracy on held-out tumours: {accuracy:.3f}; ")


def test_wide_and_deep_moves_both_paths_each_by_its_own_optimizer(tumours, tumour_model):
    _, line, begun = tumours
    ended = _paths(tumour_model)
    for path in ("wide", "deep"):
        for before, after in zip(begun[path], ended[path], strict=True):
            assert np.abs(after - before).max() > 1e-3
    # Only Ftrl, by its L1 strength, sets weights to zero exactly; Adam never does.
    used = np.count_nonzero(ended["wide"][0])
    assert 0 < used < ended["wide"][0].size / 2
    assert all(np.all(weight) for weight in ended["deep"] if weight.ndim == 2)
    assert line.endswith(f"; {used} of {ended['wide'][0].size} wide weights in use.")


def test_wide_and_deep_leaves_its_curves_and_a_line_an_epoch(tumours):
    run_dir, _, _ = tumours
    assert_is_a_picture(run_dir / "curves.png")
    lines = epochs_in(run_dir)
    assert [entry["epoch"] for entry in lines] == list(range(1, 31))
    assert {"loss", "accuracy", "val_loss", "val_accuracy"} <= lines[-1].keys()
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]


def test_each_crossing_of_two_bins_is_one_of_sixteen():
    bins = np.zeros((1, 30), int)
    bins[0, :2] = 2, 3
    [features] = wide_and_deep.crossed(bins)
    crossings = features[30 * 4 :].reshape(45, 16)
    np.testing.assert_array_equal(crossings.sum(axis=1), 1)
    assert crossings[0].argmax() == 2 * 4 + 3  # The first pair is that of the first two measurements.


# ------------------------------------------------------------------- gan-digits


# Takes about 30 s: whether it ends nearer to real digits than to noise is seen only in a long run.
DRAWN_FOR = 40  # Epochs, of the 80 that the recipe takes by itself.


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A whole run of `gan-digits`: its directory and the line it returns."""
    run_dir = tmp_path_factory.mktemp("gan-digits")
    return run_dir, gan_digits.main(run_dir, epochs=DRAWN_FOR)


def test_gan_digits_ends_nearer_to_real_digits_than_to_noise(drawn):
    number = r"(\d+\.\d)"
    line = rf"Fréchet distance to held-out digits: real digits {number}, drawn ones {number}, noise {number}"
    real, own, noise = map(float, re.fullmatch(line, drawn[1]).groups())
    assert real < own < noise
    assert own - real < noise - own


def test_gan_digits_leaves_its_curves_and_both_losses_an_epoch(drawn):
    run_dir, _ = drawn
    assert_is_a_picture(run_dir / "curves.png")
    lines = epochs_in(run_dir)
    assert [(entry["epoch"], entry["step"]) for entry in lines] == [
        (epoch, 19 * epoch) for epoch in range(1, DRAWN_FOR + 1)
    ]
    assert all(np.isfinite([entry["d_loss"], entry["g_loss"]]).all() for entry in lines)


def test_gan_digits_leaves_its_model_and_what_that_drew_after_each_epoch(drawn, tmp_path):
    run_dir, _ = drawn
    samples = sorted((run_dir / "samples").iterdir())
    assert [path.name for path in samples] == [f"epoch-{epoch:03}.png" for epoch in range(1, DRAWN_FOR + 1)]
    generator = keras.models.load_model(run_dir / "model.keras")
    noise = np.random.default_rng(0).standard_normal((64, gan_digits.LATENT), dtype="float32")
    again = imread(save_image_grid(generator.predict(noise, verbose=0), tmp_path / "again.png"))
    first, last = imread(samples[0]), imread(samples[-1])
    assert last.shape[:2] == (8 * 10 * 6, 8 * 10 * 6)
    np.testing.assert_allclose(again, last, atol=2 / 255)
    assert np.abs(first - last).mean() > 0.1


# ----------------------------------------------------------------- loop by hand


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    """A whole run of `loop_by_hand`: its directory and the line it returns."""
    run_dir = tmp_path_factory.mktemp("loop_by_hand")
    return run_dir, loop_by_hand.main(run_dir)


def test_a_loop_by_hand_stops_after_three_bad_epochs_with_the_best_and_the_last_three_kept(by_hand):
    run_dir, line = by_hand
    steps_per_epoch = 1198 // 64 + 1
    [accuracy], [best] = re.findall(r"digits: (0\.\d+)", line), re.findall(r"after epoch (\d+), the best", line)
    assert float(accuracy) > 0.95
    checkpointer = hl.Checkpointer(run_dir / "checkpoints", {}, best="min:val_loss")
    assert checkpointer.best_step == int(best) * steps_per_epoch
    assert checkpointer.steps == [(int(best) + after) * steps_per_epoch for after in range(4)]
    kept = [hl.load_checkpoint(folder) for folder in sorted((run_dir / "checkpoints").glob("step_*"))]
    losses = [checkpoint.metrics["val_loss"] for checkpoint in kept]
    assert min(losses) == losses[0]


def test_a_loop_by_hand_that_is_stopped_goes_on_to_the_same_bits(by_hand, tmp_path):
    run_dir, line = by_hand
    loop_by_hand.main(tmp_path, epochs=2)
    assert loop_by_hand.main(tmp_path) == line
    assert loop_by_hand.main(tmp_path) == line  # It has ended, and stays so.
    one, other = (keras.models.load_model(folder / "model.keras").get_weights() for folder in (run_dir, tmp_path))
    for found, expected in zip(other, one, strict=True):
        np.testing.assert_array_equal(found, expected)
