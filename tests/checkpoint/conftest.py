"""Fixtures of tests of checkpoints."""

import pytest

from tests.checkpoint.common import install


@pytest.fixture(autouse=True)
def _real_system():
    """Removes the system that a test has installed."""
    yield
    install(None)
