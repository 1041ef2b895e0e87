"""Runs cells and writes `docs/compatibility.md` from their results and from those of earlier runs.

python -m tools.compat             runs all cells
python -m tools.compat NAME ...    runs these cells
python -m tools.compat --page      runs none
"""

import sys

from tools.compat import page
from tools.compat.cells import CELLS
from tools.compat.trial import kept, tried


def main(arguments: list[str]) -> None:
    """Runs the cells of these names; without names, all of them."""
    names = [cell.name for cell in CELLS]
    if unknown := set(arguments) - {*names, "--page"}:
        sys.exit(f"There is no cell {', '.join(sorted(unknown))}; choose from {', '.join(names)}.")
    for cell in CELLS:
        if cell.name in (arguments or names):
            print(f"== {cell.name}", flush=True)
            print(tried(cell), flush=True)
            page.write({cell.name: kept(cell) for cell in CELLS}, CELLS)
    page.write({cell.name: kept(cell) for cell in CELLS}, CELLS)


main(sys.argv[1:])
