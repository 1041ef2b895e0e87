"""PyTorch: the patch that its exporter needs. `tests/model/test_export.py` exports models."""

import warnings

import pytest
import torch

from handloom._interop import onnx_torch as ours


class Normalized(torch.nn.Module):
    """Normalizes as Keras does, over a size taken from the input."""

    def forward(self, x):
        return torch.nn.functional.layer_norm(x, (x.shape[1],))


def export(path):
    options = {"dynamo": False, "input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
    torch.onnx.export(Normalized(), (torch.ones(2, 3),), path, **options)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_torch_cannot_export_a_size_taken_from_the_input(tmp_path):
    with pytest.raises(torch.onnx.errors.SymbolicValueError):
        export(tmp_path / "model.onnx")


def test_exportable_exports_without_a_warning_and_restores_all(tmp_path):
    original, filters = torch.nn.functional.layer_norm, list(warnings.filters)
    with ours.exportable():
        export(tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").stat().st_size
    assert torch.nn.functional.layer_norm is original
    assert warnings.filters == filters
