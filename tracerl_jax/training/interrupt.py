"""Ctrl-C and SIGTERM: finish what must not be torn, save, leave."""

import contextlib
import os
import signal
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """Raised at a place where the state of the run is whole, after a signal asked to stop."""


class StopSignal:
    """Turns SIGINT and SIGTERM into a request that loops look at; a second signal stops at once.

    with StopSignal() as stop:
        for ...:
            stop.check()  # raises Interrupted
    """

    def __init__(self):
        self._requested: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        if self._requested:
            raise Interrupted(self._requested)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._requested:
            raise KeyboardInterrupt(f"second {name}")
        self._requested = name
        # Not `print`: the signal may have come in the middle of one, and a buffered file refuses a second writer.
        with contextlib.suppress(OSError):
            text = f"\n{name}: finishing the current phase and saving (once more stops at once)\n"
            os.write(2, text.encode())
