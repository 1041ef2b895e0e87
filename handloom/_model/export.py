"""A model on its own: written for a runtime that knows neither Handloom nor Keras."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from handloom._keras import Functional, first_line, keras
from handloom.backends import backend
from handloom.errors import ExportError


def export(
    self: keras.Model,
    filepath: str | Path,
    format: str = "tf_saved_model",  # noqa: A002  Keras's name.
    verbose: bool | None = None,
    input_signature: Any = None,
    **kwargs: Any,
) -> None:
    """Writes what the model computes, for a runtime that needs neither Handloom nor Keras; see `keras.Model.export`.

    | format | loaded by | written on | needs besides |
    |---|---|---|---|
    | `"tf_saved_model"` | `tensorflow.saved_model.load` | JAX, TensorFlow | TensorFlow |
    | `"onnx"` | `onnxruntime.InferenceSession` | JAX, TensorFlow, PyTorch | onnx; jax2onnx, tf2onnx, nothing more |

    What a layer assigns when it is called, a SavedModel goes on assigning. ONNX has no state: there each call is as
    the first one after the export. The model itself stays as it is.

    Args:
        self: The model, once it was called.
        filepath: A directory for a SavedModel, a file for ONNX.
        format: One of these two, or of the others that Keras has.
        verbose: Whether to say what was written.
        input_signature: Shapes and dtypes of the inputs, as for Keras; by default those it was built with.
        kwargs: What else Keras takes for the format.

    Raises:
        ExportError: If the format cannot be written on this backend, or has no word for an operation of the model.
        ImportError: If a library is missing.
    """
    write = _to_onnx if format == "onnx" else keras.Model.export
    with backend.exporting(format):
        write(self, filepath, format, verbose=verbose, input_signature=input_signature, **kwargs)


def _to_onnx(model: keras.Model, filepath: str | Path, *args: Any, **kwargs: Any) -> None:
    path = str(filepath)
    try:
        with keras.StatelessScope():  # Else what layers assign while they are traced would stay in the model.
            # Keras wants it to have been called; a loaded one may not have been.
            if isinstance(model, Functional):
                model(model.input)
            elif isinstance(model, keras.Sequential) and model.built:
                model(model.inputs[0])
            keras.Model.export(model, path, *args, **kwargs)
        _mend_and_check(path)
    except (ImportError, OSError, ValueError):  # Of the arguments, not of what the model computes.
        raise
    except Exception as error:
        reason = first_line(error).removesuffix(".")
        raise ExportError(
            f"HL602: The model cannot be exported to ONNX on this backend: {reason.partition(', Error ')[2] or reason}. "
            'Compute it from other operations, export it as "tf_saved_model", or load the saved model on another '
            "backend and export it there.",
        ) from error


def _mend_and_check(path: str) -> None:
    """Makes sure that a file can be run, or removes it: converters write what they do not know, too."""
    import onnx  # noqa: PLC0415  Slow, and not needed to train.

    try:
        written = onnx.load(path, load_external_data=False)
        if backend.fix_onnx(written.graph):
            onnx.save(written, path)
        onnx.checker.check_model(path)  # By its path: larger than 2 GB, a model is more than one file.
    except Exception:
        Path(path).unlink()
        raise
