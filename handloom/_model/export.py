"""`Model.export`: writes a model for a runtime that knows neither Handloom nor Keras."""

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
    """Exports the model to a runtime that needs neither Handloom nor Keras; see `keras.Model.export`.

    | format | loaded by | written on (also needs) |
    |---|---|---|
    | `"tf_saved_model"` | `tensorflow.saved_model.load` | JAX (TensorFlow), TensorFlow |
    | `"onnx"` | `onnxruntime.InferenceSession` | JAX (onnx, jax2onnx), TensorFlow (onnx, tf2onnx), PyTorch (onnx) |

    A SavedModel keeps state: variables that a layer assigns when it is called stay assigned. An ONNX file has no
    state: each call behaves like the first call after the export. The model itself does not change.

    Args:
        self: The model. It must have been called, or be functional or built sequential.
        filepath: A directory for a SavedModel, a file for ONNX.
        format: One of the formats above, or another format of Keras.
        verbose: Whether to print a summary of the exported model.
        input_signature: Shapes and dtypes of the inputs, as for Keras. By default, those that the model was built with.
        kwargs: Further arguments of Keras for the format.

    Raises:
        ExportError: The format cannot be written on this backend, or it lacks an operation of the model.
        ImportError: A library is missing.
    """
    write = _to_onnx if format == "onnx" else keras.Model.export
    with backend.exporting(format):
        write(self, filepath, format, verbose=verbose, input_signature=input_signature, **kwargs)


def _to_onnx(model: keras.Model, filepath: str | Path, *args: Any, **kwargs: Any) -> None:
    try:
        with keras.StatelessScope():  # Otherwise the model would keep what layers assign while they are traced.
            # Keras requires that the model has been called; a loaded model may not have been.
            if isinstance(model, Functional):
                model(model.input)
            elif isinstance(model, keras.Sequential) and model.built:
                model(model.inputs[0])
            keras.Model.export(model, str(filepath), *args, **kwargs)
        from handloom._interop.onnx_fixes import fix_and_check  # noqa: PLC0415  It needs onnx, which may be missing.

        fix_and_check(Path(filepath))
    except (ImportError, OSError, ValueError):  # These are about the arguments, not about the model's operations.
        raise
    except Exception as error:
        reason = first_line(error).removesuffix(".")
        raise ExportError(
            f"HL602: ONNX cannot express this model on this backend: {reason.partition(', Error ')[2] or reason}.",
            fix='Use other operations, export with format="tf_saved_model", or load the saved model on another backend '
            "and export it there.",
        ) from error
