"""Work on what an iterator gives, in a thread beside it."""

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def consume_beside(items: Iterable[Item], consume: Callable[[list[Item]], None], most: int = 64) -> None:
    """Calls `consume` with all items, in order, in a thread of its own, so that slow work does not hold up `items`.

    It gets what has come meanwhile, at most `most` at a time. Returns when everything is consumed. What `consume` or
    `items` raises is raised here; items that were not handed over yet are then dropped.
    """
    waiting: deque[Item] = deque()

    def drain(before: Future | None) -> None:
        if before is not None:
            before.result()  # after an error nothing more is consumed
        while waiting:
            consume([waiting.popleft() for _ in range(min(most, len(waiting)))])

    last: Future | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="consume") as thread:
        try:
            for item in items:
                waiting.append(item)
                if last is not None and last.done():
                    last.result()
                last = thread.submit(drain, last)
            if last is not None:
                last.result()
        except BaseException:
            waiting.clear()
            raise
