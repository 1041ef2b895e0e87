"""The names of the backends that Handloom runs on, as Keras spells them: one folder of `backends/` each."""

import importlib.util
from pathlib import Path

from handloom.errors import BackendNotInstalledError

_FOLDER = Path(__file__).parents[1] / "backends"

BACKENDS = tuple(sorted(path.parent.name for path in _FOLDER.glob("*/backend.py")))

OF_KERAS = "tensorflow"
"""The backend that Keras takes if none is set, and writes into its configuration file."""


def missing_backend(name: str, option: str = "KERAS_BACKEND=") -> BackendNotInstalledError:
    """The error about a backend that is not installed.

    Args:
        name: The backend.
        option: How another one is chosen.
    """
    installed = [other for other in BACKENDS if importlib.util.find_spec(other)]
    choice = f", or choose an installed one: {option}{installed[0]}" if installed else ""
    return BackendNotInstalledError(
        f"HL901: Keras is set to the backend {name!r}, which is not installed.",
        fix=f'Install it with: pip install "handloom[{name}]"{choice}.',
    )
