"""docs/rows.md, made from what the tests of the rows found out on each backend.

python -m tests.rows.table build/rows            writes the table
python -m tests.rows.table build/rows --check    fails if the one that is there says something else
"""

import argparse
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
    "B": "Own steps inside `fit`",
    "C": "Own components",
    "D": "Gradients",
    "E": "Compiled functions",
    "F": "Data, devices, beyond Python",
}
ROWS = {
    "A1": "A subclassed regressor, a whole-batch loop, Adam",
    "A2": "Two outputs, two losses, each weighted by a half",
    "A3": "A streaming metric, reset every epoch",
    "A4": "A classifier of digits, batches of 32, a status now and then",
    "A5": "Epoch means of loss and accuracy, the last batch smaller",
    "A6": "Linear regression, full-batch gradient descent, 1000 epochs",
    "A7": "A plain function as a metric",
    "A8": "A learning rate changed from the loss inside the loop",
    "A9": "Class weights recomputed from what was seen; a chosen part trained",
    "A10": "l2, Nadam, constraints, the training flag, a status bar",
    "A11": "Validation, the best and the last three saved, early stopping",
    "A12": "A GAN: two clipped gradients, two optimizers",
    "A13": "Wide and deep: Ftrl on the one path, Adam on the other",
    "A14": "Replicas on N devices, the last batch uneven",
    "A15": "Op by op against compiled",
    "A16": "Pipelines of `tf.data`, `DataLoader`, Grain into a step of any backend",
    "A17": "The architecture changes during training",
    "B1": "`train_step` with `compute_loss` and the compiled metrics",
    "B2": "Own trackers in `metrics`, an own loss",
    "B3": "`sample_weight` and `class_weight` in an own step",
    "B4": "An own `test_step`; `evaluate` without an optimizer",
    "B5": "A GAN class with its own `compile`",
    "B6": "Callbacks and fused steps with own steps",
    "B7": "Gradient accumulation with own steps",
    "C1": "Huber loss: a function, from a factory, a class with a config",
    "C2": "Activation, initializer, regularizer, constraint of one's own",
    "C3": "A function as a metric; precision that streams",
    "C4": "A Huber metric with a threshold",
    "C5": "Own layers: exponential, dense, two inputs to three outputs, noise",
    "C6": "Residual blocks and a residual regressor",
    "C7": "A reconstruction loss by `add_loss`, its error as a metric",
    "C8": "An own optimizer with a config",
    "D1": "3a² + 2ab at (5, 3)",
    "D2": "Several gradients at once; of plain tensors; of what is not reached",
    "D3": "Second derivatives",
    "D4": "`stop_gradient` on the second term",
    "D5": "log(exp(z) + 1) at z = 100",
    "D6": "A penalty on a gradient, in a trained step",
    "D7": "A gradient through an update",
    "E1": "Cube, compiled",
    "E2": "Loops and branches over tensors",
    "E3": "What happens at tracing only, explained",
    "E4": "A step run op by op",
    "F1": "NumPy and tensors in and out; 64 bits, whole numbers, mixed types",
    "F2": "Variables assigned, in part and scattered, inside a step",
    "F3": "Sparse, ragged and text batches; TensorArray, sets, queues",
    "F4": "Export to SavedModel and ONNX",
    "F5": "Curves and a profile in TensorBoard",
    "F6": "Several processes and machines",
    "F7": "Data larger than memory",
}
LATER = {"A14", "E3", "F6"}  # Asked for later.
HEAD = """# Every row, on every backend

What must work, each row shown by tests of that number in `tests/rows/`. This file is made by `make rows`; `make test`
fails if it says anything else than the tests have found. "In part": what the backend cannot do is an error that says
what to do instead, and the test has seen it.
"""


def read(directory):
    """What was found, by backend and row.

    Raises:
        SystemExit: There is no file of a backend.
    """
    files = {backend: directory / f"{backend}.json" for backend in BACKENDS}
    missing = [str(file) for file in files.values() if not file.exists()]
    if missing:
        sys.exit(f"{', '.join(missing)}: not there. `make rows` runs the rows on each backend and makes the table.")
    return {backend: json.loads(file.read_text(encoding="utf-8"))["rows"] for backend, file in files.items()}


def table(found):
    """The whole file, from what was found by backend and row.

    Raises:
        SystemExit: A test failed, a row has no test or no figure on a backend, or a test is of no row.
    """
    problems = [problem for row in ROWS.keys() - LATER for problem in _problems(row, found)]
    strange = sorted({row for rows in found.values() for row in rows if row not in ROWS or row in LATER})
    problems += [f"{row}: no row to be shown (see tests/rows/table.py)" for row in strange]
    if problems:
        sys.exit("\n".join(sorted(problems)))
    return HEAD + "".join(_section(section, found) for section in SECTIONS)


def _problems(row, found):
    for backend, rows in found.items():
        if row not in rows:
            yield f"{row}: no test of it ran on {BACKENDS[backend]}"
        elif rows[row]["failed"]:
            yield f"{row}: failed on {BACKENDS[backend]}: {', '.join(rows[row]['failed'])}"
        elif not rows[row][FIGURE] and not rows[row][REFUSAL]:
            yield f"{row}: no figure on {BACKENDS[backend]} (see tests/rows/shown.py)"


def differences(old, new):
    """The lines of two tables that do not agree, one below the other; nothing if they all do."""
    pairs = itertools.zip_longest(old.splitlines(), new.splitlines(), fillvalue="")
    return "\n".join(f"- {one}\n+ {other}" for one, other in pairs if not agree(one, other))


def _section(letter, found):
    head = ["Row", "What", *BACKENDS.values(), "Shown by"]
    lines = [_line(row, what, found) for row, what in ROWS.items() if row[0] == letter]
    return f"\n## {letter}. {SECTIONS[letter]}\n\n" + "\n".join([_cells(head), _cells(["---"] * len(head)), *lines, ""])


def _line(row, what, found):
    if row in LATER:
        return _cells([row, what, *["to come"] * len(BACKENDS), ""])
    of_backends = {backend: found[backend][row] for backend in BACKENDS}
    texts = [*_together(of_backends, FIGURE, "{}"), *_together(of_backends, REFUSAL, "refused: {}")]
    return _cells([row, what, *map(_status, of_backends.values()), "; ".join(texts)])


def _status(of_row):
    return "in part" if of_row[REFUSAL] else "works"


def _together(of_backends, kind, form):
    """Each text once: with the numbers of each backend where they differ, with its backends where not all told it."""
    told = {backend: {blank(text): text for text in of_row[kind]} for backend, of_row in of_backends.items()}
    for key in dict.fromkeys(key for texts in told.values() for key in texts):
        texts = {backend: texts[key] for backend, texts in told.items() if key in texts}
        few = f" ({', '.join(BACKENDS[backend] for backend in texts)})" if len(texts) < len(BACKENDS) else ""
        yield form.format(_one(key, [NUMBER.findall(text) for text in texts.values()])) + few


def _one(text, numbers):
    """A text with the numbers of the backends in their places, once where they are the same."""
    places = iter(zip(*numbers, strict=True))
    return NUMBER.sub(lambda _: " / ".join(_once(next(places))), text)


def _once(numbers):
    return numbers if len(set(numbers)) > 1 else numbers[:1]


def _cells(cells):
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def agree(one, other):
    """Whether two lines say the same.

    Numbers may differ by a tenth, in their last decimal, and below 0.001 in any way: what processors round
    differently, training amplifies.
    """
    of_one, of_other = ([group.split(" / ") for group in NUMBERS.findall(line)] for line in (one, other))
    same = NUMBERS.sub("0", one) == NUMBERS.sub("0", other)
    return same and all(map(_close, of_one, of_other))


def _close(one, other):
    """Whether the numbers of the backends are, of which one alone stands for all."""
    count = max(len(one), len(other))
    pairs = zip(*(group * (count // len(group)) for group in (one, other)), strict=True)
    return all(_nearly_the_same(*pair) for pair in pairs)


def _nearly_the_same(one, other):
    digits = [len(number.partition(".")[2]) for number in (one, other)]
    last = 1.01 * 10.0 ** -min(digits) if min(digits) else 0.0
    one, other = float(one), float(other)
    return max(abs(one), abs(other)) < 1e-3 or math.isclose(one, other, rel_tol=0.1, abs_tol=last)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the files of the backends are")
    parser.add_argument("--check", action="store_true", help="compare with the table that is there")
    arguments = parser.parse_args()
    new = table(read(arguments.directory))
    if not arguments.check:
        TABLE.write_text(new, encoding="utf-8")
        return
    old = TABLE.read_text(encoding="utf-8") if TABLE.exists() else ""
    if changes := differences(old, new):
        sys.exit(f"docs/rows.md is not what the tests found. `make rows` makes it anew.\n{changes}")


if __name__ == "__main__":
    main()
