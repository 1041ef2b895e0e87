"""A file named after a backend is collected on that backend only: the others need not even be imported."""

from handloom._util.backend_names import BACKENDS
from handloom.backends import backend

others = [name for name in BACKENDS if name != backend.name]
collect_ignore = [file for name in others for file in (f"test_onnx_{name}.py", f"test_{name}_data.py")]
