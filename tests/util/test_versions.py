"""Versions that Handloom was not tested with: a warning, and a range that is also that of the package."""

import re
import tomllib

import pytest

from handloom._keras import TESTED_KERAS
from handloom._util.versions import warn_if_untested
from handloom.backends import backend
from handloom.errors import HandloomWarning
from tests.on_backends import ROOT


@pytest.mark.once
@pytest.mark.parametrize("version", ["3.12.4", "3.17.0", "4.0", "2.15.0"])
def test_warn_if_untested_names_the_versions_and_the_cure(version):
    words = rf"tested with Keras 3\.13 to 3\.16; this is Keras {version}\. .*use Keras 3\.13 to 3\.16\. \[HL911\]"
    with pytest.warns(HandloomWarning, match=words):
        warn_if_untested("Keras", version, "3.13", "3.16")


@pytest.mark.once
@pytest.mark.parametrize("version", ["3.13.0", "3.15.1", "3.16.0.dev2026102704", "3.16.2+cpu", "3.16.0a0"])
def test_warn_if_untested_is_silent_about_tested_versions(version):
    warn_if_untested("Keras", version, "3.13", "3.16")


def test_versions_that_pip_installs_were_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    [keras_range] = [needed for needed in project["dependencies"] if needed.startswith("keras>=")]
    [range_of_backend] = project["optional-dependencies"][backend.name]
    for name, given, tested in (
        ("keras", keras_range, TESTED_KERAS),
        (backend.name, range_of_backend, backend.tested),
    ):
        lowest, major, after = re.fullmatch(rf"{name}>=([\d.]+),<(\d+)\.(\d+)", given).groups()
        assert lowest == tested[0]
        warn_if_untested(name, f"{major}.{int(after) - 1}", *tested)
