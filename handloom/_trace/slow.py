"""Says that a function is still being traced or compiled, if that takes long: what looks like a hang is none."""

import contextlib
import contextvars
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import CodeType, FrameType

from handloom._util.findings import log
from handloom._util.source_line import place_in, shown
from handloom.backends import backend
from handloom.backends.layer_at_work import described, frame_of, layer_at_work
from handloom.errors import SlowCompilationWarning

FIRST = 10.0
"""The seconds after which the first notice comes; each further one comes after three times as long."""

_traced_code: set[CodeType] = set()


def runs_when_traced(function: Callable[..., object]) -> None:
    """Declares a function that runs for as long as a backend traces, and not while it compiles."""
    _traced_code.add(function.__code__)


@contextlib.contextmanager
def told_if_slow(name: str) -> Iterator[None]:
    """A block of this thread in which a function is traced and compiled.

    Args:
        name: The name of the function.
    """
    ended, context = threading.Event(), contextvars.copy_context()
    watch = threading.Thread(target=context.run, args=(_watch, name, threading.get_ident(), ended), daemon=True)
    watch.start()
    try:
        yield
    finally:
        ended.set()
        watch.join()


def _watch(name: str, thread: int, ended: threading.Event) -> None:
    begun = time.perf_counter()
    wait = FIRST
    while not ended.wait(wait):
        seconds = time.perf_counter() - begun
        _tell(name, seconds, frame_of(thread))
        wait = 2 * seconds


def _tell(name: str, seconds: float, frame: FrameType | None) -> None:
    stack = [(outer.f_code, line) for outer, line in traceback.walk_stack(frame)][::-1]
    # Python generates some code, which is in no file.
    files = [(code.co_filename, line) for code, line in stack if not code.co_filename.startswith("<")]
    place = place_in(files)
    if _traced_code.isdisjoint(code for code, _ in stack):
        notice = SlowCompilationWarning(
            f"HL151: {backend.title} has been compiling {name} for {seconds:.0f} s.",
            "This happens once for each set of shapes of the arguments; a large step may take minutes.",
            at=place or files[-1],
        )
    else:
        layer = layer_at_work(frame)
        notice = SlowCompilationWarning(
            f"HL150: Tracing {name} has taken {seconds:.0f} s so far, now in "
            f"{'code outside of layers' if layer is None else described(layer)} ({shown(place)}).",
            "A trace records each operation, in a Python loop those of every pass.",
            "Replace long loops by operations on whole tensors, or run it eagerly: compile(run_eagerly=True).",
            at=place or files[-1],
        )
    log(notice)
