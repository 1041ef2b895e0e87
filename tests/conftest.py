"""Fixtures and markers of all tests. One process tests one backend, the one in KERAS_BACKEND."""

import atexit
import os
import shutil
import signal
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# JAX compiles each program once for all tests and processes, which saves a third of the time.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.mkdtemp(prefix="compiled-")
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": compiled,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

import keras
import pytest

import handloom as hl

BACKEND = keras.backend.backend()
pytest_plugins = ["tests.rows.shown"]


# A shell that runs tests in the background makes them ignore Ctrl-C, which some of them test.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "backend(name): runs on this backend only")
    config.addinivalue_line("markers", "once: does not depend on the backend; runs on one of them only")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    first = os.environ.get("HANDLOOM_ONCE_ON", "jax")
    for item in items:
        only = item.get_closest_marker("backend")
        if only and BACKEND not in only.args:
            item.add_marker(pytest.mark.skip(reason=f"for {' and '.join(only.args)}"))
        if item.get_closest_marker("once") and first != BACKEND:
            item.add_marker(pytest.mark.skip(reason=f"runs with {first}"))


@pytest.fixture(autouse=True)
def _same_start():
    """Starts each test in the same state: seeds, compiled steps, dtype policy, names of layers."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)
    hl.run_eagerly(False)
    policy = keras.config.dtype_policy()
    yield
    keras.config.set_dtype_policy(policy)
    hl.run_eagerly(False)


@pytest.fixture
def v():
    """A variable at 2, for tests of assignments."""
    return keras.Variable(2.0)


@pytest.fixture
def w():
    """A variable at 5, for tests of gradients."""
    return keras.Variable(5.0)


@pytest.fixture(params=[False, True], ids=["compiled", "eager"])
def eagerly(request: pytest.FixtureRequest) -> bool:
    """Runs a test compiled and eagerly."""
    hl.run_eagerly(request.param)
    return request.param
