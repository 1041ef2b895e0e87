"""The matrix: which versions are tried together. A cell is one environment."""

import dataclasses

BACKENDS = {"jax": "JAX", "tensorflow": "TensorFlow", "torch": "PyTorch"}


@dataclasses.dataclass(frozen=True)
class Cell:
    """Versions that are installed together.

    Attributes:
        name: The name of its folder and of its line in the page.
        python: The version of Python, such as `"3.11"`.
        packages: Keras and backends, by package, each with its version. All these backends are tried.
        known: Why tests fail that no change of Handloom can mend, by a part of their names.
    """

    name: str
    python: str
    packages: dict[str, str]
    known: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def backends(self) -> list[str]:
        """The backends to try."""
        return [backend for backend in BACKENDS if backend in self.packages]


JAX, TENSORFLOW, KERAS = {"jax": "==0.10.*"}, {"tensorflow": "==2.21.*"}, {"keras": "==3.15.*"}
TORCH = {"torch": "==2.13.0"}  # The version of the extra "dev", for which there is a CPU build.

SLICES = {
    "slice": "before 3.15, Keras's `slice_update` indexes in a way that torch has deprecated since 2.9. torch warns, "
    "and at a position from a tensor the step falls back to eager execution; the values are right."
}

CELLS = [
    Cell("keras-nightly", "3.11", {"keras-nightly": ""} | JAX | TENSORFLOW | TORCH),
    Cell(
        "keras-3.13",
        "3.11",
        {"keras": "==3.13.*", "jax": "==0.8.*", "tensorflow": "==2.20.*"} | TORCH,
        SLICES,
    ),
    Cell("keras-3.14", "3.11", {"keras": "==3.14.*", "jax": "==0.9.*"} | TORCH, SLICES),
    Cell("python-3.12", "3.12", KERAS | {"jax": "==0.11.*"}),
    Cell("python-3.13", "3.13", KERAS | {"jax": "==0.12.*"}),
    Cell("torch-2.12", "3.11", KERAS | {"torch": "==2.12.*"}),
    Cell("torch-2.14", "3.11", KERAS | {"torch": "==2.14.*"}),
    Cell("torch-2.15", "3.11", KERAS | {"torch": "==2.15.*"}),
]
