"""What was written is compared with what the disk holds, wherever files and parts of them end."""

import errno
import fcntl
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from handloom.checkpoint import filesystem

pytestmark = pytest.mark.once

# About where a block begins or ends, and where a sector or page does.
SIZES = st.sampled_from([0, 1, 511, 512, 4095, 4096, 4097, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (2 << 20) + 513])


def written(path, *parts):
    path.unlink(missing_ok=True)
    with filesystem.creating(path) as file:
        for part in parts:
            filesystem.write(file, memoryview(part))
    return path


def differing(path, parts):
    with filesystem.reading(path.parent, path.name) as (file, size):
        return filesystem.differing(file, size, {name: memoryview(part) for name, part in parts.items()})


@pytest.fixture(params=["past the cache", "through the cache"])
def way(request, monkeypatch, tmp_path_factory):
    """A directory on a file system that reads past its cache, if this machine has one, or on one that does not."""
    if request.param == "through the cache":
        asked = fcntl.fcntl

        def refuses(file, command, argument=0):
            if command == fcntl.F_SETFL and argument & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return asked(file, command, argument)

        monkeypatch.setattr(fcntl, "fcntl", refuses)
    return tmp_path_factory.mktemp("files")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(SIZES, min_size=1, max_size=4), data=st.data())
def test_parts_that_differ_are_named_and_no_others(way, sizes, data):
    parts = {str(index): bytearray(os.urandom(size)) for index, size in enumerate(sizes)}
    path = written(way / "file", *parts.values())
    assert differing(path, parts) == []
    flipped = [name for name, part in parts.items() if part and data.draw(st.booleans())]
    for name in flipped:
        parts[name][data.draw(st.sampled_from([0, len(parts[name]) // 2, -1]))] ^= 1 << data.draw(st.integers(0, 7))
    assert differing(path, parts) == flipped


@pytest.mark.parametrize(
    ("kept", "lacking"),
    [
        (0, ["first", "second", "third"]),
        (4096, ["first", "second", "third"]),
        (5000, ["second", "third"]),
        ((1 << 20) + 4000, ["second", "third"]),
        ((1 << 20) + 5000, ["third"]),
        ((1 << 20) + 5002, ["third"]),
    ],
)
@pytest.mark.parametrize("content", [os.urandom, bytes], ids=["random", "zeros, as memory is before it is read to"])
def test_what_a_file_is_too_short_for_differs(way, content, kept, lacking):
    parts = {"first": content(5000), "second": content(1 << 20), "empty": b"", "third": content(3)}
    path = written(way / "file", *parts.values())
    os.truncate(path, kept)
    assert differing(path, parts) == lacking


def test_what_is_read_back_has_been_on_the_disk(way, monkeypatch):
    """Not what the system still holds in memory: each file is asked to be read past that, or to be dropped from it."""
    asked = []
    control, advise = fcntl.fcntl, os.posix_fadvise
    monkeypatch.setattr(fcntl, "fcntl", lambda *words: control(*words) or asked.append("past"))
    monkeypatch.setattr(os, "posix_fadvise", lambda *words: advise(*words) or asked.append("dropped"))
    differing(written(way / "file", b"some"), {"some": b"some"})
    assert asked in (["past"], ["dropped"])
