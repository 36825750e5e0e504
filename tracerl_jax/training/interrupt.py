"""Ctrl-C and SIGTERM: finish what must not be torn, save, leave."""

import contextlib
import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

import jax

from tracerl_jax.parallel import distributed, peers

Result = TypeVar("Result")


class Interrupted(KeyboardInterrupt):
    """Raised at a place where the state of the run is whole, after a signal asked to stop."""


def together(
    work: Callable[[], Result], waiting: contextlib.AbstractContextManager | None = None
) -> list[Result]:
    """What `work`, in which the processes of a job do not wait for each other, returns in each of them. Raises
    Interrupted in all of them when one was interrupted. `waiting`: around the wait for the others."""
    if not distributed.is_job():
        return [work()]
    try:
        result, reason = work(), None
    except Interrupted as interrupted:
        result, reason = None, str(interrupted)
    with waiting or contextlib.nullcontext():
        answers = peers.gather((result, reason))
    if reasons := [reason for _, reason in answers if reason is not None]:
        raise Interrupted(reasons[0])
    return [result for result, _ in answers]


class StopSignal:
    """Turns SIGINT and SIGTERM into a request that loops look at; a second signal stops at once.

    with StopSignal() as stop:
        for ...:
            stop.check()  # raises Interrupted
    """

    def __init__(self):
        self.requested: str | None = None  # name of the signal, which another process of the job may have got
        self._is_second = False
        self._asked: jax.Array | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        if self.requested:
            raise Interrupted(self.requested)

    def check_together(self) -> None:
        """The same in all processes of a job at the same call: the one after that at which one of them had a signal.
        The device is not waited for."""
        if not distributed.is_job():
            return self.check()
        asked, self._asked = self._asked, peers.ask_any(bool(self.requested))
        if asked is not None and bool(asked):
            raise Interrupted(self.requested or "a signal to another process")

    def request(self, name: str) -> None:
        """What a signal of this name asks for: another process of the job has got it."""
        self.requested = self.requested or name

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._is_second:
            raise KeyboardInterrupt(f"second {name}")
        self._is_second = True
        self.requested = self.requested or name
        # Not `print`: the signal may have come in the middle of one, and a buffered file refuses a second writer.
        with contextlib.suppress(OSError):
            text = f"\n{name}: stopping at the next safe place and saving (once more stops at once)\n"
            os.write(2, text.encode())
