"""Finds the line of the user's code that an error or warning is about."""

import inspect
import linecache
import os
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import FrameType

_PACKAGE = str(Path(__file__).resolve().parents[1]) + os.sep
_LIBRARIES = (sysconfig.get_paths()["purelib"] + os.sep, sysconfig.get_paths()["stdlib"] + os.sep, "<frozen")

Frames = Iterable[tuple[str, int]]
"""File and line of each call on the way to an error, the outermost first."""


def frames_of(error: BaseException) -> Frames:
    """The frames of an error's traceback."""
    return [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]


def place_in(frames: Frames) -> tuple[str, int] | None:
    """The innermost line of the user's code; `None` if there is none."""
    found = [(file, line) for file, line in frames if is_users(file)]
    return found[-1] if found else None


def shown(place: tuple[str, int] | None) -> str:
    """A line of code as text: `file, line 3: code`."""
    if place is None:
        return "line unknown"
    file, line = place
    return f"{file}, line {line}: {linecache.getline(file, line).strip()}"


def users_frame() -> FrameType:
    """The innermost frame of the user's code on the call stack; if there is none, the innermost that is not ours."""
    # Without the frame of this call: a frame whose variables refer to itself would keep all it holds alive.
    frames = [frame for frame, _ in traceback.walk_stack(inspect.currentframe())][1:]
    foreign = [frame for frame in frames if not (_is_ours(frame.f_code.co_filename) or _is_generated(frame))]
    users = [frame for frame in foreign if is_users(frame.f_code.co_filename)]
    return (users or foreign or frames[-1:])[0]


def _is_ours(file: str) -> bool:
    return file.startswith(_PACKAGE) and f"{os.sep}recipes{os.sep}" not in file


def _is_generated(frame: FrameType) -> bool:
    """Whether a frame runs a method that `dataclasses` has generated for a class of ours."""
    name = frame.f_globals.get("__name__", "")
    return frame.f_code.co_filename == "<string>" and name.startswith(f"{__package__.partition('.')[0]}.")


def is_users(file: str) -> bool:
    """Whether a file is the user's: neither Handloom's nor of an installed library."""
    return not _is_ours(file) and not file.startswith(_LIBRARIES)
