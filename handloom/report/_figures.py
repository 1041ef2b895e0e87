"""Figures, drawn by matplotlib without a display."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from handloom._keras import keras
from handloom.errors import ExtraNotInstalledError


def save_curves(history: keras.callbacks.History | Mapping[str, Sequence[float]], path: str | Path) -> Path:
    """Draws the reported values over the epochs: one panel for each name, with its validation values in it.

    Args:
        history: The return value of `fit`, or a mapping from names to one value per epoch.
        path: The PNG file to write; its directory is created.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed.
    """
    values = getattr(history, "history", history)
    names = [name for name in values if not (name.startswith("val_") and name[4:] in values)]
    panels = max(len(names), 1)
    figure = _matplotlib("figure").Figure(figsize=(1 + 4 * panels, 3.2), layout="constrained")
    for axes, name in zip(np.atleast_1d(figure.subplots(1, panels)), names, strict=False):
        for kind, label in ((name, "training"), (f"val_{name}", "validation")):
            if kind in values:
                axes.plot(np.arange(1, len(values[kind]) + 1), values[kind], label=label)
        axes.set(title=name, xlabel="epoch")
        axes.grid(alpha=0.3)
        if f"val_{name}" in values:
            axes.legend()
    figure.savefig(_created(path), dpi=120)
    return Path(path)


def save_image_grid(images: np.ndarray, path: str | Path, *, columns: int = 8) -> Path:
    """Writes images side by side into one PNG, enlarged so that small images can be seen.

    Args:
        images: Shape `(count, height, width)` or `(count, height, width, 1)`. The smallest value is drawn white, the
            largest black.
        path: The PNG file to write; its directory is created.
        columns: Number of images in a row.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed.
    """
    images = np.asarray(images).reshape(len(images), *np.shape(images)[1:3])
    padded = np.pad(images, ((0, -len(images) % columns), (1, 1), (1, 1)), constant_values=images.min())
    count, height, width = padded.shape
    rows = padded.reshape(count // columns, columns, height, width).swapaxes(1, 2)
    grid = rows.reshape(count // columns * height, columns * width)
    _matplotlib("image").imsave(_created(path), np.kron(grid, np.ones((6, 6))), cmap="gray_r")
    return Path(path)


def _matplotlib(module: str) -> Any:
    """A module of matplotlib, which is an optional dependency."""
    try:
        return importlib.import_module(f"matplotlib.{module}")
    except ImportError as error:
        raise ExtraNotInstalledError(
            "HL904: Figures need matplotlib.", fix='Type: pip install "handloom[recipes]".'
        ) from error


def _created(path: str | Path) -> Path:
    """The path of a file, after its directory was created."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return Path(path)
