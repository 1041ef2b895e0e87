"""Figures, drawn by matplotlib without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from handloom._keras import keras
from handloom.errors import ExtraNotInstalledError

_MISSING = 'Drawing figures needs matplotlib, which is not installed: pip install "handloom[recipes]".'


def save_curves(history: keras.callbacks.History | Mapping[str, Sequence[float]], path: str | Path) -> Path:
    """Draws what was reported over the epochs: one panel a name, with its validation beside it.

    Args:
        history: What `fit` returned, or a mapping from names to one value an epoch.
        path: The PNG file to write; its directory is created.

    Returns:
        The path.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ExtraNotInstalledError("HL904", _MISSING) from error
    values = getattr(history, "history", history)
    names = [name for name in values if not (name.startswith("val_") and name[4:] in values)]
    figure = Figure(figsize=(1 + 4 * max(len(names), 1), 3.2), layout="constrained")
    for axes, name in zip(np.atleast_1d(figure.subplots(1, max(len(names), 1))), names, strict=False):
        for kind, label in ((name, "training"), (f"val_{name}", "validation")):
            if kind in values:
                axes.plot(np.arange(1, len(values[kind]) + 1), values[kind], label=label)
        axes.set(title=name, xlabel="epoch")
        axes.grid(alpha=0.3)
        if f"val_{name}" in values:
            axes.legend()
    return _saved(figure, Path(path))


def save_image_grid(images: np.ndarray, path: str | Path, *, columns: int = 8) -> Path:
    """Writes images side by side as one PNG, enlarged so that small ones can be seen.

    Args:
        images: Shape `(count, height, width)` or `(count, height, width, 1)`; the smallest value is drawn white, the
            largest black.
        path: The PNG file to write; its directory is created.
        columns: Images in a row.

    Returns:
        The path.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.image import imsave
    except ImportError as error:
        raise ExtraNotInstalledError("HL905", _MISSING) from error
    images = np.asarray(images).reshape(len(images), *np.shape(images)[1:3])
    padded = np.pad(images, ((0, -len(images) % columns), (1, 1), (1, 1)), constant_values=images.min())
    count, height, width = padded.shape
    rows = padded.reshape(count // columns, columns, height, width).swapaxes(1, 2)
    grid = rows.reshape(count // columns * height, columns * width)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    imsave(path, np.kron(grid, np.ones((6, 6))), cmap="gray_r")
    return path


def _saved(figure: object, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)  # type: ignore[attr-defined]
    return path
