"""Which line of the user's made a trace fail."""

from __future__ import annotations

import linecache
import sysconfig
from pathlib import Path
from types import TracebackType

from handloom.errors import TraceError

_NOT_THE_USERS = (
    str(Path(__file__).resolve().parents[1]),
    sysconfig.get_paths()["purelib"],
    sysconfig.get_paths()["stdlib"],
    "<frozen",
)


def users_line(traceback: TracebackType | None) -> str:
    """The innermost line of a traceback that is neither ours nor a library's: `file, line 3: code`."""
    found = ""
    while traceback is not None:
        file, line = traceback.tb_frame.f_code.co_filename, traceback.tb_lineno
        if not file.startswith(_NOT_THE_USERS) or "/recipes/" in file:
            found = f"{file}, line {line}: {linecache.getline(file, line).strip()}"
        traceback = traceback.tb_next
    return found or "(line unknown)"


def needs_a_value(error: BaseException) -> TraceError:
    """The error for Python control flow over a tensor, or a tensor turned into a number, inside a trace."""
    return TraceError(
        "A compiled step needs the value of a tensor while it is being compiled, when it has none yet:\n"
        f"    {users_line(error.__traceback__)}\n"
        "Use operations instead of Python here: keras.ops.cond or keras.ops.where for a branch, "
        "keras.ops.while_loop or keras.ops.fori_loop for a loop, keras.ops.cast for a conversion. "
        "To debug, run the step op by op: hl.run_eagerly(True)."
    )
