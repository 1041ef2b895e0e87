"""Threads that overlap in a known order."""

import threading
from collections.abc import Callable, Iterator
from typing import Any


def in_a_thread(work: Callable[[], Any]) -> Any:
    """Runs something in a thread, to its end; gives back what it returns, and raises what it raises."""
    [result] = in_threads([work])
    return result


def in_threads(works: list[Callable[[], Any]]) -> list[Any]:
    """Runs each in a thread of its own, all at once."""
    results: list[Any] = [None] * len(works)
    errors: list[BaseException] = []

    def run(index: int) -> None:
        try:
            results[index] = works[index]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def alternating(*works: Callable[[], Iterator[None]]) -> None:
    """Runs generators in threads of their own, each up to its next `yield` in turn: A in, B in, A out, B out."""
    turns = [threading.Semaphore(0) for _ in works]
    done = [threading.Semaphore(0) for _ in works]
    alive = [True] * len(works)

    def run(index: int) -> None:
        try:
            turns[index].acquire()
            for _ in works[index]():
                done[index].release()
                turns[index].acquire()
        finally:
            alive[index] = False
            done[index].release()

    def lead() -> None:
        while any(alive):
            for index in range(len(works)):
                if alive[index]:
                    turns[index].release()
                    done[index].acquire()

    in_threads([lead, *(lambda index=index: run(index) for index in range(len(works)))])
