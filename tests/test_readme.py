"""The Python blocks of the README run as printed."""

import re
import runpy
from pathlib import Path

import numpy as np

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_readme_python_blocks_run_one_after_the_other(tmp_path):
    file = tmp_path / "readme.py"  # A file, as a user has it: TensorFlow compiles `len(x)` from the source.
    file.write_text("\n".join(re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)), encoding="utf-8")
    names = runpy.run_path(str(file))
    assert names["history"].history["loss"][-1] < names["history"].history["loss"][0]
    np.testing.assert_allclose([names["value"], names["da"], names["db"]], [105, 36, 10], rtol=1e-6)
    (daa, dab), (dba, dbb) = names["second"]
    assert (float(daa), float(dab), float(dba), dbb) == (6, 2, 2, None)
