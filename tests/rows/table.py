"""docs/rows.md, generated from the results of the row tests on each backend.

python -m tests.rows.table build/rows            writes the table
python -m tests.rows.table build/rows --check    fails if docs/rows.md differs from the results
"""

import itertools
import json
import math
import sys
from pathlib import Path

from tests.rows.figures import FIGURE, NUMBER, NUMBERS, REFUSAL, blank

TABLE = Path(__file__).parents[2] / "docs" / "rows.md"
BACKENDS = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}
SECTIONS = {
    "A": "Loops written by hand",
    "B": "Custom steps inside `fit`",
    "C": "Custom components",
    "D": "Gradients",
    "E": "Compiled functions",
    "F": "Data, devices, beyond Python",
}
ROWS = {
    "A1": "Subclassed regressor, whole-batch loop, Adam",
    "A2": "Two outputs and two losses, each weighted by a half",
    "A3": "Streaming metric, reset every epoch",
    "A4": "Classifier of digits, batches of 32, a status line now and then",
    "A5": "Epoch means of loss and accuracy with a smaller last batch",
    "A6": "Linear regression, full-batch gradient descent, 1000 epochs",
    "A7": "Plain function as a metric",
    "A8": "Learning rate changed from the loss inside the loop",
    "A9": "Class weights recomputed from what was seen; only a chosen part trained",
    "A10": "l2, Nadam, constraints, the training flag, a status bar",
    "A11": "Validation, the best and the last three checkpoints kept, early stopping",
    "A12": "GAN with two clipped gradients and two optimizers",
    "A13": "Wide and deep: Ftrl on one path, Adam on the other",
    "A14": "Replicas on N devices, uneven last batch",
    "A15": "Eager against compiled",
    "A16": "Pipelines of `tf.data`, `DataLoader` and Grain into a step of any backend",
    "A17": "Architecture changed during training",
    "B1": "`train_step` with `compute_loss` and the compiled metrics",
    "B2": "Custom trackers in `metrics`, custom loss",
    "B3": "`sample_weight` and `class_weight` in a custom step",
    "B4": "Custom `test_step`; `evaluate` without an optimizer",
    "B5": "GAN class with a custom `compile`",
    "B6": "Callbacks and fused steps with custom steps",
    "B7": "Gradient accumulation with custom steps",
    "C1": "Huber loss: a function, from a factory, a class with a config",
    "C2": "Custom activation, initializer, regularizer and constraint",
    "C3": "Function as a metric; streaming precision",
    "C4": "Huber metric with a threshold",
    "C5": "Custom layers: exponential, dense, two inputs to three outputs, noise",
    "C6": "Residual blocks and a residual regressor",
    "C7": "Reconstruction loss by `add_loss`, its error as a metric",
    "C8": "Custom optimizer with a config",
    "D1": "3a² + 2ab at (5, 3)",
    "D2": "Several gradients at once; of plain tensors; `None` where not reached",
    "D3": "Second derivatives",
    "D4": "`stop_gradient` on the second term",
    "D5": "log(exp(z) + 1) at z = 100",
    "D6": "Penalty on a gradient in a trained step",
    "D7": "Gradient through an update",
    "E1": "Cube, compiled",
    "E2": "Loops and branches over tensors",
    "E3": "Effects at tracing time only, explained",
    "E4": "Step run eagerly",
    "F1": "NumPy and tensors in and out; 64 bits, whole numbers, mixed types",
    "F2": "Variables assigned, in part and by index, inside a step",
    "F3": "Sparse, ragged and text batches; TensorArray, sets, queues",
    "F4": "Export to SavedModel and ONNX",
    "F5": "Curves and a profile in TensorBoard",
    "F6": "Several processes and machines",
    "F7": "Data larger than memory",
}
LATER = {"A14", "E3", "F6"}  # Not required yet.
HEAD = """# Every row on every backend

Each row is shown by the tests of its number in `tests/rows/`. `make rows` generates this file; `make test` fails if it
differs from the results of the tests. "In part" means that the backend cannot do some of it; the test has then seen an
error that says what to do instead.
"""


def read(directory):
    """The results by backend and row.

    Raises:
        SystemExit: The file of a backend is missing.
    """
    files = {backend: directory / f"{backend}.json" for backend in BACKENDS}
    if missing := [str(file) for file in files.values() if not file.exists()]:
        sys.exit(f"Missing: {', '.join(missing)}. Run `make rows`, which tests every backend and writes the table.")
    return {backend: json.loads(file.read_text(encoding="utf-8"))["rows"] for backend, file in files.items()}


def table(found):
    """The whole file, from the results by backend and row.

    Raises:
        SystemExit: A test failed, a row has no test or no figure on a backend, or a test belongs to no row.
    """
    problems = [problem for row in ROWS.keys() - LATER for problem in _problems(row, found)]
    unknown = {row for rows in found.values() for row in rows if row not in ROWS or row in LATER}
    problems += [f"{row}: not a row of the table (see tests/rows/table.py)" for row in unknown]
    if problems:
        sys.exit("\n".join(sorted(problems)))
    return HEAD + "".join(_section(section, found) for section in SECTIONS)


def _problems(row, found):
    for backend, rows in found.items():
        if row not in rows:
            yield f"{row}: no test ran on {BACKENDS[backend]}"
        elif rows[row]["failed"]:
            yield f"{row}: failed on {BACKENDS[backend]}: {', '.join(rows[row]['failed'])}"
        elif not rows[row][FIGURE] and not rows[row][REFUSAL]:
            yield f"{row}: no figure on {BACKENDS[backend]} (see tests/rows/shown.py)"


def differences(old, new):
    """The lines of two tables that disagree, one below the other; empty if all agree."""
    pairs = itertools.zip_longest(old.splitlines(), new.splitlines(), fillvalue="")
    return "\n".join(f"- {one}\n+ {other}" for one, other in pairs if not agree(one, other))


def _section(letter, found):
    head = ["Row", "Task", *BACKENDS.values(), "Figures"]
    lines = [_line(row, task, found) for row, task in ROWS.items() if row[0] == letter]
    return f"\n## {letter}. {SECTIONS[letter]}\n\n" + "\n".join([_cells(head), _cells(["---"] * len(head)), *lines, ""])


def _line(row, task, found):
    if row in LATER:
        return _cells([row, task, *["to come"] * len(BACKENDS), ""])
    of_backends = {backend: found[backend][row] for backend in BACKENDS}
    texts = [*_merged(of_backends, FIGURE, "{}"), *_merged(of_backends, REFUSAL, "refused: {}")]
    status = ["in part" if of_row[REFUSAL] else "works" for of_row in of_backends.values()]
    return _cells([row, task, *status, "; ".join(texts)])


def _merged(of_backends, kind, form):
    """Each text once: with the numbers of each backend where they differ, and its backends where not all have it."""
    by_blank = {backend: {blank(text): text for text in of_row[kind]} for backend, of_row in of_backends.items()}
    for key in dict.fromkeys(key for texts in by_blank.values() for key in texts):
        texts = {backend: texts[key] for backend, texts in by_blank.items() if key in texts}
        few = f" ({', '.join(BACKENDS[backend] for backend in texts)})" if len(texts) < len(BACKENDS) else ""
        numbers = zip(*(NUMBER.findall(text) for text in texts.values()), strict=True)
        of_places = iter([" / ".join(place if len(set(place)) > 1 else place[:1]) for place in numbers])
        yield form.format(NUMBER.sub(lambda _, places=of_places: next(places), key)) + few


def _cells(cells):
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def agree(one, other):
    """Whether two lines agree.

    Numbers may differ by a tenth, in their last decimal, and below 0.001 in any way: training amplifies the rounding
    of each processor. One number agrees with the numbers of several backends if it agrees with each.
    """
    of_one, of_other = ([group.split(" / ") for group in NUMBERS.findall(line)] for line in (one, other))
    return NUMBERS.sub("0", one) == NUMBERS.sub("0", other) and all(map(_agree_by_backend, of_one, of_other))


def _agree_by_backend(one, other):
    count = max(len(one), len(other))
    return all(map(_nearly_equal, *(group * (count // len(group)) for group in (one, other))))


def _nearly_equal(one, other):
    digits = min(len(number.partition(".")[2]) for number in (one, other))
    last = 1.01 * 10.0**-digits if digits else 0.0
    one, other = float(one), float(other)
    return max(abs(one), abs(other)) < 1e-3 or math.isclose(one, other, rel_tol=0.1, abs_tol=last)


def main():
    directory, *check = sys.argv[1:]
    new = table(read(Path(directory)))
    if check != ["--check"]:
        TABLE.write_text(new, encoding="utf-8")
    elif changes := differences(TABLE.read_text(encoding="utf-8") if TABLE.exists() else "", new):
        sys.exit(f"docs/rows.md differs from the results of the tests. Run `make rows` to write it.\n{changes}")


if __name__ == "__main__":
    main()
