"""Figures: their files, sizes and contents."""

import sys

import keras
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from handloom.report import save_curves, save_image_grid
from tests.numbers import close, same

pytestmark = pytest.mark.once

ENLARGED = 6


def shows(path, colour):
    """Whether a picture has pixels of a colour."""
    return bool((np.abs(imread(path)[..., :3] - to_rgb(colour)) < 0.01).all(axis=-1).any())


def test_save_curves_draws_a_panel_for_each_name_with_its_validation_in_it(tmp_path):
    history, path = keras.callbacks.History(), tmp_path / "new" / "folder" / "curves.png"
    history.history = {"loss": [2.0, 1.0, 0.5], "accuracy": [0.1, 0.5, 0.9], "val_loss": [2.1, 1.2, 0.9]}
    assert save_curves(history, path) == path
    pixels = imread(path)
    one_panel = imread(save_curves({"loss": [2.0, 1.0]}, str(tmp_path / "loss.png")))
    assert pixels.shape[0] == one_panel.shape[0]
    assert pixels.shape[1] - one_panel.shape[1] == 4 * 120  # Four inches more: "val_loss" has no panel of its own.


@pytest.mark.parametrize(
    ("history", "colours"),
    [
        ({"loss": [2.0, 1.0]}, (True, False)),
        ({"loss": [2.0, 1.0], "val_loss": [2.0, 1.5]}, (True, True)),
        ({"val_loss": [2.0, 1.0]}, (True, False)),
    ],
    ids=["training", "both", "validation without training"],
)
def test_save_curves_draws_training_and_validation_in_two_colours(history, colours, tmp_path):
    path = save_curves(history, tmp_path / "curves.png")
    assert (shows(path, "C0"), shows(path, "C1")) == colours


def test_save_image_grid_draws_images_row_by_row_enlarged(tmp_path):
    images = np.zeros((3, 4, 5))
    images[1] = 1  # Second in the first of two rows.
    pixels = imread(save_image_grid(images, tmp_path / "grid.png", columns=2))
    height, width = (4 + 2) * ENLARGED, (5 + 2) * ENLARGED  # Each image has a border of one pixel.
    assert pixels.shape[:2] == (2 * height, 2 * width)
    inside = np.zeros(pixels.shape[:2], bool)
    inside[ENLARGED : height - ENLARGED, width + ENLARGED : 2 * width - ENLARGED] = True
    same(pixels[..., 0] < 0.5, inside)


def test_save_image_grid_draws_the_smallest_value_white_and_the_largest_black(tmp_path):
    images = np.full((1, 2, 2), -1.0)
    images[0, 0, 0], images[0, 1, 1] = 1.0, 0.0
    pixels = imread(save_image_grid(images, tmp_path / "grid.png", columns=1))[ENLARGED // 2 :: ENLARGED]
    grey = pixels[:, ENLARGED // 2 :: ENLARGED, 0]
    close(grey[1:3, 1:3], [[0, 1], [1, 0.5]], atol=0.02)
    close(grey[0], np.ones(4))


def test_save_image_grid_takes_images_with_a_channel_axis(tmp_path):
    images = np.random.default_rng(0).uniform(size=(5, 3, 3))
    plain = imread(save_image_grid(images, tmp_path / "plain.png"))
    same(imread(save_image_grid(images[..., None], tmp_path / "channel.png")), plain)
    assert plain.shape[:2] == (5 * ENLARGED, 8 * 5 * ENLARGED)  # Eight in a row, the last three of them empty.


def test_save_curves_tells_what_to_install_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'need matplotlib\. Type: pip install "handloom\[recipes\]"\. \[HL904\]'):
        save_curves({"loss": [1.0]}, tmp_path / "new" / "picture.png")
    assert not list(tmp_path.iterdir())
