"""Pictures: that they are there, of the right size, and show what they should."""

import sys

import keras
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from handloom.report import save_curves, save_image_grid

pytestmark = pytest.mark.once

ENLARGED = 6


def shows(path, colour):
    """Whether a picture has pixels of a colour."""
    return bool((np.abs(imread(path)[..., :3] - to_rgb(colour)) < 0.01).all(axis=-1).any())


# ----------------------------------------------------------------------- curves


def test_a_panel_is_drawn_for_each_name_with_its_validation_in_it(tmp_path):
    history = {"loss": [2.0, 1.0, 0.5], "accuracy": [0.1, 0.5, 0.9], "val_loss": [2.1, 1.2, 0.9]}
    pixels = imread(save_curves(history, tmp_path / "curves.png"))
    one_panel = imread(save_curves({"loss": [2.0, 1.0]}, tmp_path / "loss.png"))
    assert pixels.shape[0] == one_panel.shape[0]
    assert pixels.shape[1] - one_panel.shape[1] == 4 * 120  # Four inches more: "val_loss" has no panel of its own.


def test_training_is_drawn_in_one_colour_and_validation_in_another(tmp_path):
    training = save_curves({"loss": [2.0, 1.0]}, tmp_path / "training.png")
    both = save_curves({"loss": [2.0, 1.0], "val_loss": [2.0, 1.5]}, tmp_path / "both.png")
    assert shows(training, "C0")
    assert not shows(training, "C1")
    assert shows(both, "C0")
    assert shows(both, "C1")


def test_a_validation_without_its_training_has_a_panel(tmp_path):
    assert shows(save_curves({"val_loss": [2.0, 1.0]}, tmp_path / "curves.png"), "C0")


def test_what_fit_returns_can_be_drawn_and_the_directory_is_made(tmp_path):
    history = keras.callbacks.History()
    history.history = {"loss": [1.0, 0.5]}
    path = save_curves(history, tmp_path / "new" / "folder" / "curves.png")
    assert path == tmp_path / "new" / "folder" / "curves.png"
    np.testing.assert_array_equal(imread(path), imread(save_curves(history.history, str(tmp_path / "same.png"))))


# -------------------------------------------------------------------- image grid


def test_images_stand_side_by_side_row_by_row_enlarged(tmp_path):
    images = np.zeros((3, 4, 5))
    images[1] = 1  # Second in the first of two rows.
    pixels = imread(save_image_grid(images, tmp_path / "grid.png", columns=2))
    height, width = (4 + 2) * ENLARGED, (5 + 2) * ENLARGED  # Around each image runs a border of one pixel.
    assert pixels.shape[:2] == (2 * height, 2 * width)
    dark = pixels[..., 0] < 0.5
    inside = np.zeros_like(dark)
    inside[ENLARGED : height - ENLARGED, width + ENLARGED : 2 * width - ENLARGED] = True
    np.testing.assert_array_equal(dark, inside)


def test_the_smallest_value_is_white_and_the_largest_black(tmp_path):
    images = np.full((1, 2, 2), -1.0)
    images[0, 0, 0], images[0, 1, 1] = 1.0, 0.0
    pixels = imread(save_image_grid(images, tmp_path / "grid.png", columns=1))[ENLARGED // 2 :: ENLARGED]
    grey = pixels[:, ENLARGED // 2 :: ENLARGED, 0]
    np.testing.assert_allclose(grey[1:3, 1:3], [[0, 1], [1, 0.5]], atol=0.02)
    np.testing.assert_allclose(grey[0], 1)


def test_an_axis_of_one_channel_changes_nothing(tmp_path):
    images = np.random.default_rng(0).uniform(size=(5, 3, 3))
    plain = imread(save_image_grid(images, tmp_path / "plain.png"))
    np.testing.assert_array_equal(imread(save_image_grid(images[..., None], tmp_path / "channel.png")), plain)
    assert plain.shape[:2] == (5 * ENLARGED, 8 * 5 * ENLARGED)  # Eight in a row, the last three of them empty.


# ----------------------------------------------------------------------- missing


@pytest.mark.parametrize(
    ("module", "draw"),
    [
        ("matplotlib.figure", lambda path: save_curves({"loss": [1.0]}, path)),
        ("matplotlib.image", lambda path: save_image_grid(np.zeros((1, 2, 2)), path)),
    ],
)
def test_without_matplotlib_the_error_says_what_to_install(module, draw, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'needs matplotlib, .* pip install "handloom\[recipes\]"'):
        draw(tmp_path / "picture.png")
    assert not list(tmp_path.iterdir())
