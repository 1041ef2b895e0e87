"""The operations in a trace, read by the reader of the backend."""

import json

import keras


def products(run):
    """The number of matrix products in the only trace of a TensorBoard run."""
    read, is_product = {
        "jax": (_jax_operations, lambda name: name.startswith("dot")),
        "tensorflow": (_tensorflow_operations, lambda name: name.endswith("MatMul")),
        "torch": (_torch_operations, lambda name: name == "aten::mm"),
    }[keras.backend.backend()]
    return sum(map(is_product, read(run)))


def _jax_operations(run):
    from jax.profiler import ProfileData  # noqa: PLC0415

    [path] = run.glob("plugins/profile/*/*.xplane.pb")  # Where the profile plugin looks.
    planes = ProfileData.from_file(str(path)).planes
    return [event.name for plane in planes for line in plane.lines for event in line.events]


def _tensorflow_operations(run):
    from tensorflow.tsl.profiler.protobuf.xplane_pb2 import XSpace  # noqa: PLC0415

    [path] = run.glob("plugins/profile/*/*.xplane.pb")
    planes = XSpace.FromString(path.read_bytes()).planes
    return [
        plane.event_metadata[event.metadata_id].name
        for plane in planes
        for line in plane.lines
        for event in line.events
    ]


def _torch_operations(run):
    [path] = run.glob("*.pt.trace.json")  # Where the plugin for PyTorch's profiler looks.
    return [event["name"] for event in json.loads(path.read_text(encoding="utf-8"))["traceEvents"]]
