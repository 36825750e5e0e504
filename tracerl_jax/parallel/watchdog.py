"""Notices that a process of a job died or hangs, and ends the others: nobody waits for ever in a collective.

Each process writes a counter into the job's key-value store, every `tick`, and reads that of the next process:

    0 -> 1 -> 2 -> 3 -> 0            a ring: the work of each does not grow with their number

    silent       the next one's counter stands still for `heartbeat` seconds: killed, stopped, or its host is gone
    no answer    the store (which process 0 holds) has not answered for as long
    too long     a phase of this process takes longer than its limit: something waits for something that never comes
    notices      what another process has found out, or why it ended, is in the store

Whoever notices tells the others, writes the stacks of all its threads to stderr and <run>/stacks-process-<i>.txt, and
ends with status 76. So all are gone at the latest `heartbeat` + 2 `tick`s after one was silent.

When process 0 dies the store is gone, which JAX's own client answers with SIGABRT, at once, before we can notice: a
handler of that signal does what the watchdog does.

A request to stop (SIGTERM to one process) is spread the same way, see training/interrupt.py.
"""

import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, Protocol

STATUS_PEER_LOST = 76
STATUS_USER_ERROR, STATUS_INTERRUPTED = 2, 130  # a restart would be in vain: all processes end with these then
HEARTBEAT_SECONDS = 60.0
PHASE_SECONDS = 7200.0
BETWEEN = "between"  # phases: the name of the time in which the main thread is in none
NOTICES, STOP, FAILURE = "tracerl/notice/", "stop", "failure"


class Stoppable(Protocol):
    requested: str | None  # name of the signal

    def request(self, name: str) -> None: ...


class _Watchdog:
    def __init__(self, client: Any, index: int, count: int):
        self.client, self.index, self._next = client, index, (index + 1) % count
        self.heartbeat = HEARTBEAT_SECONDS
        self.default_limit, self.limits = PHASE_SECONDS, {}
        self.folder: Path | None = None
        self.stoppable: Stoppable | None = None
        self.phases: list[tuple[str, float]] = []  # that the main thread is in, with their start
        self.since = time.monotonic()  # when it was in one last
        self._ended = threading.Event()
        self._failing = threading.Lock()
        self._answered = self._moved = time.monotonic()
        self._last = ""  # counter of the next process
        self.arm()
        for target in (self._beat, self._judge):
            threading.Thread(target=target, name=f"watchdog{target.__name__}", daemon=True).start()

    @property
    def tick(self) -> float:
        return min(2.0, max(0.1, self.heartbeat / 6))

    def end(self) -> None:
        self._ended.set()

    def arm(self) -> None:
        """Has a thread of C end the process if none of Python's gets to run for long, since something holds their lock:
        the others have given it up by then."""
        faulthandler.dump_traceback_later(2 * self.heartbeat + 5, exit=True, file=sys.__stderr__)

    # What the store says. This thread may hang in a call: `_judge` looks at when it last got an answer.

    def _beat(self) -> None:
        beat = 0
        while not self._ended.wait(self.tick):
            beat += 1
            self.arm()
            with contextlib.suppress(RuntimeError):  # the store is gone, or has not heard of the next one yet
                self.client.key_value_set(f"tracerl/beat/{self.index}", str(beat), allow_overwrite=True)
                self._answered = time.monotonic()
                self._read_notices()
                counter = self.client.key_value_try_get(f"tracerl/beat/{self._next}")
                if counter != self._last:
                    self._last, self._moved = counter, time.monotonic()

    def _read_notices(self) -> None:
        notices = {key.removeprefix(NOTICES): value for key, value in self.client.key_value_dir_get(NOTICES)}
        if FAILURE in notices and not self._ended.is_set():
            failure = json.loads(notices[FAILURE])
            if failure["process"] != self.index:
                final = failure["status"] in (STATUS_USER_ERROR, STATUS_INTERRUPTED)
                self.fail(f"process {failure['process']}: {failure['reason']}",
                          failure["status"] if final else STATUS_PEER_LOST, tell=False, stacks=not final)  # fmt: skip
        if self.stoppable is not None:
            if STOP in notices:
                self.stoppable.request(notices[STOP])
            elif self.stoppable.requested:
                self.client.key_value_set(NOTICES + STOP, self.stoppable.requested, allow_overwrite=True)

    def _judge(self) -> None:
        while not self._ended.wait(self.tick):
            now = time.monotonic()
            if now - self._answered > self.heartbeat:
                self.fail(f"process 0, which holds the coordinator, has not answered for {self.heartbeat:g} s: it was "
                          "killed or stopped, or its host is gone", tell=False)  # fmt: skip
            if now - self._moved > self.heartbeat:
                self.fail(f"process {self._next} has given no sign of life for {self.heartbeat:g} s: it was killed or "
                          "stopped, or its host is gone")  # fmt: skip
            for name, since in list(self.phases) or [(BETWEEN, self.since)]:
                limit = self.limits.get(name, self.default_limit)
                if now - since > limit:
                    self.fail(f"phase {name} takes longer than {limit:g} s (faults.phase_timeout, "
                              "faults.phase_seconds): a process hangs, or the limit is too low")  # fmt: skip

    def fail(self, reason: str, status: int = STATUS_PEER_LOST, *, tell: bool = True, stacks: bool = True) -> NoReturn:
        """Ends this process. The first thread that comes here does it; others wait for it for ever."""
        self._failing.acquire()
        if tell:
            self.tell(status, reason)
        self._let_others_read()
        with contextlib.suppress(OSError, ValueError):
            os.write(2, f"[process {self.index}] tracerl: error: {reason}\n".encode())
            if stacks:
                self._dump(reason)
        os._exit(status)

    def give_up(self, reason: str, status: int) -> NoReturn:
        """`fail` by the main thread, which has said why."""
        self._failing.acquire()
        self.tell(status, reason)
        self._let_others_read()
        os._exit(status)

    def tell(self, status: int, reason: str) -> None:
        """Leaves a notice for the other processes."""
        text = json.dumps({"process": self.index, "status": status, "reason": reason})

        def write() -> None:
            with contextlib.suppress(RuntimeError):  # another one was first, or the store is gone
                self.client.key_value_set(NOTICES + FAILURE, text, allow_overwrite=False)

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        writer.join(timeout=5)

    def _let_others_read(self) -> None:
        """A notice, whoever left it: the store ends with process 0."""
        if self.index == 0:
            time.sleep(2 * self.tick + 0.5)

    def _dump(self, reason: str) -> None:
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        writer = threading.Thread(target=self._write_stacks, args=(reason,), daemon=True)
        writer.start()
        writer.join(timeout=10)  # what hangs may be the file system

    def _write_stacks(self, reason: str) -> None:
        if self.folder is not None and self.folder.is_dir():
            with open(self.folder / f"stacks-process-{self.index}.txt", "w") as file:
                file.write(f"{time.strftime('%F %T')} {reason}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)


_watchdog: _Watchdog | None = None


def start(client: Any, index: int, count: int) -> None:
    """`client`: of the job's key-value store."""
    global _watchdog
    _watchdog = _Watchdog(client, index, count)
    reason = "aborted, by JAX or by what stands above"
    if index:
        reason += ": JAX does so when process 0, which holds the coordinator, is gone, or a process was started again"
    _on_abort(lambda: _watchdog.fail(reason))


def configure(heartbeat: float, default_limit: float, limits: Mapping[str, float], folder: Path | None) -> None:
    """Limits in seconds, and the folder for stacks, once it is there. Without a job of no effect."""
    if _watchdog is not None:
        _watchdog.heartbeat, _watchdog.default_limit, _watchdog.limits = heartbeat, default_limit, dict(limits)
        _watchdog.folder = folder
        _watchdog.arm()


def listen(stoppable: Stoppable) -> None:
    """What requests to stop go to and come from."""
    if _watchdog is not None:
        _watchdog.stoppable = stoppable


def stop() -> None:
    """Before this process leaves in good order."""
    if _watchdog is not None:
        _watchdog.end()
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGABRT, signal.SIG_DFL)


def give_up(status: int, reason: str) -> NoReturn:
    """This process ends with `status`, and so do the others: with the same one for a mistake of the user or an
    interruption, else with 76."""
    _watchdog.give_up(reason, status)


def await_verdict() -> None:
    """Gives the watchdog the time to find a dead peer: what the main thread got may be but the consequence."""
    time.sleep(_watchdog.heartbeat + 3 * _watchdog.tick)


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """A part of the work whose time is limited. Without a job of no effect."""
    if _watchdog is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    entry = (name, time.monotonic())
    _watchdog.phases.append(entry)
    try:
        yield
    finally:
        _watchdog.since = time.monotonic()
        _watchdog.phases.remove(entry)


# JAX ends a process that lost its coordinator, or never found it, by abort(). A handler written in Python would come
# too late: Python runs it when the signal handler in C has returned, which abort() does not wait for.

_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)
_handlers: list[Any] = []  # they must live as long as the process


def _on_abort(act) -> None:
    handler = _HANDLER(lambda _: act())
    _handlers.append(handler)
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, _HANDLER), ctypes.c_void_p
    libc.signal(signal.SIGABRT, handler)


@contextlib.contextmanager
def instead_of_abort(message: str) -> Iterator[None]:
    """An abort() inside becomes a PeerError with this message, as the command line shows it."""

    def act() -> NoReturn:
        os.write(2, f"tracerl: error: {message}\n".encode())
        os._exit(STATUS_PEER_LOST)

    _on_abort(act)
    yield
    signal.signal(signal.SIGABRT, signal.SIG_DFL)
