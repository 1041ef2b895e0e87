"""The names of the backends that Handloom runs on, as Keras spells them: one folder of `backends/` each."""

from pathlib import Path

_FOLDER = Path(__file__).parents[1] / "backends"

BACKENDS = tuple(sorted(path.parent.name for path in _FOLDER.glob("*/backend.py")))

OF_KERAS = "tensorflow"
"""The backend that Keras takes if none is set, and writes into its configuration file."""
