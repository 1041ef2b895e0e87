"""`filesystem`: `Reader` reads past the cache, and directories are removed through no link."""

import errno
import fcntl
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from handloom.checkpoint import filesystem
from tests.checkpoint.common import save

pytestmark = pytest.mark.once

# Near the ends of a block, and of a sector or page.
SIZES = st.sampled_from([0, 1, 511, 512, 4095, 4096, 4097, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (2 << 20) + 513])


def written(path, *parts):
    path.unlink(missing_ok=True)
    with filesystem.creating(path) as file:
        for part in parts:
            filesystem.write(file, part)
    return path


def read(path, counts):
    """Reads so many bytes of a file, one after the other."""
    with filesystem.reading(path.parent, path.name, from_disk=True) as reader:
        return [reader.read(count) for count in counts]


@pytest.fixture(params=["past the cache", "through the cache"])
def directory(request, monkeypatch, tmp_path_factory):
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
@given(sizes=st.lists(SIZES, min_size=1, max_size=4))
def test_reader_reads_as_many_bytes_as_it_is_asked_for(directory, sizes):
    parts = [os.urandom(size) for size in sizes]
    assert read(written(directory / "file", *parts), sizes) == parts


@pytest.mark.parametrize("kept", [0, 4096, 5000, (1 << 20) + 4999, (1 << 20) + 5000])
def test_reader_reads_less_where_the_file_ends(directory, kept):
    data = os.urandom(5000 + (1 << 20))
    path = written(directory / "file", data)
    os.truncate(path, kept)
    assert read(path, [5000, 1 << 20]) == [data[: min(kept, 5000)], data[5000:kept]]


def test_reader_from_disk_bypasses_the_cache_or_drops_it(directory, monkeypatch):
    asked = []
    control, advise = fcntl.fcntl, os.posix_fadvise
    monkeypatch.setattr(fcntl, "fcntl", lambda *words: control(*words) or asked.append("past"))
    monkeypatch.setattr(os, "posix_fadvise", lambda *words: advise(*words) or asked.append("dropped"))
    assert read(written(directory / "file", b"some"), [4]) == [b"some"]
    assert asked in (["past"], ["dropped"])


def test_remove_follows_no_link_without_dir_fd(tmp_path, monkeypatch):
    monkeypatch.setattr(filesystem.os, "supports_dir_fd", set())
    save(tmp_path / "there", 1)
    (tmp_path / "link").symlink_to(tmp_path / "there" / "step_000000001")
    with pytest.raises(OSError, match="symbolic link"):
        filesystem.remove(tmp_path / "link")
    assert len(list((tmp_path / "link").iterdir())) == 3
    filesystem.remove(tmp_path / "there" / "step_000000001")
    assert not (tmp_path / "there" / "step_000000001").exists()
