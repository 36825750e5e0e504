"""A pool of worker processes for work that may never end: each item has a CPU clock that starts in its worker.

A worker reads items from its standard input and writes replies to its standard output, one JSON line each, one item at
a time. Its clock counts its own CPU time only, so a verdict depends neither on the number of workers nor on what else
the machine does. When the clock runs out, first an exception ends the item; where that cannot get through (a long call
into C), the kernel kills the worker (RLIMIT_CPU) and the pool starts another. A worker that neither computes nor
answers is killed by the parent's clock. Workers are fresh interpreters, not forks: the parent may be running JAX.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tracerl_jax.errors import ConfigError

START_SECONDS = 120.0  # for the imports of a worker on a busy machine
GRACE_SECONDS = 1  # CPU time between the exception and the kill
ATTEMPTS = 2  # of an item whose worker died of something else than its clock
ITEMS_PER_WORKER = 5000  # then a fresh one: caches grow


@dataclass(frozen=True)
class Reply:
    """`value` is what the worker's function returned, or, when not "ok", a text for people."""

    status: Literal["ok", "overtime", "memory", "error"]
    value: Any


class WorkerPool:
    """Runs `python -m module` workers (see `serve`). Raises `ConfigError` when a worker says it cannot work.

    Args:
        workers: processes; default: the CPUs this process may use, at most 16.
        cpu_seconds: of one item.
        wall_seconds: after which a worker that has not answered is taken for dead, however busy the machine.
        memory_bytes: address space of a worker.
    """

    def __init__(
        self,
        module: str,
        *,
        workers: int | None = None,
        cpu_seconds: float = 2.0,
        wall_seconds: float = 120.0,
        memory_bytes: int = 4 << 30,
    ):
        self.module = module
        self.size = workers or min(16, len(os.sched_getaffinity(0)))
        self.cpu_seconds, self.wall_seconds, self.memory_bytes = cpu_seconds, wall_seconds, memory_bytes
        self._lock = threading.Lock()
        self._workers = [self._start() for _ in range(self.size)]  # all import at the same time
        for worker in self._workers:
            worker.wait_until_ready()

    def _start(self) -> "_Worker":
        return _Worker(self.module, self.cpu_seconds, self.memory_bytes)

    def map(self, items: Sequence[Any]) -> list[Reply]:
        """One reply per item, in order; items and values are what JSON carries."""
        with self._lock, selectors.DefaultSelector() as selector:
            replies: list[Reply | None] = [None] * len(items)
            waiting = deque((index, 1) for index in range(len(items)))
            for slot in range(self.size):
                self._give(slot, selector, waiting, items)
            while selector.get_map():
                for key, _ in selector.select(timeout=0.2):
                    slot, worker = key.data, self._workers[key.data]
                    index, attempt = worker.item
                    reply = worker.read()
                    if reply is None:
                        continue  # half a line
                    if reply.status == "error" and worker.dead and attempt < ATTEMPTS:
                        waiting.appendleft((index, attempt + 1))
                    else:
                        replies[index] = reply
                    selector.unregister(key.fileobj)
                    self._give(slot, selector, waiting, items)
                for worker in self._workers:
                    if worker.item and time.monotonic() > worker.deadline:
                        worker.process.kill()  # its pipe ends, which the selector reports
            return replies

    def _give(self, slot: int, selector, waiting: deque, items: Sequence[Any]) -> None:
        """Next item to the worker of this slot, which is replaced when it is dead or old."""
        worker = self._workers[slot]
        worker.item = None
        if worker.dead or worker.served >= ITEMS_PER_WORKER:
            worker.close()
            worker = self._workers[slot] = self._start()
        if waiting:
            if not worker.ready:
                worker.wait_until_ready()
            worker.item = waiting.popleft()
            selector.register(worker.process.stdout, selectors.EVENT_READ, slot)
            worker.send(items[worker.item[0]], self.wall_seconds)

    def close(self) -> None:
        with self._lock:
            for worker in self._workers:
                worker.close()


class _Worker:
    def __init__(self, module: str, cpu_seconds: float, memory_bytes: int):
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, str(cpu_seconds), str(memory_bytes)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}, start_new_session=True,
        )  # fmt: skip
        self.item: tuple[int, int] | None = None  # (index, attempt)
        self.deadline = 0.0
        self.served = 0
        self.ready = self.dead = False
        self._received = b""

    def wait_until_ready(self) -> None:
        """Raises `ConfigError` with what the worker says when it cannot work."""
        timer = threading.Timer(START_SECONDS, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        if line.strip() == b'"ready"':
            self.ready = True
            return
        self.process.kill()
        errors = self.process.communicate()[1].decode(errors="replace").strip()
        self.dead = True
        raise ConfigError(json.loads(line) if line else f"a {self.process.args[2]} worker did not start: {errors[-500:]}")

    def send(self, item: Any, wall_seconds: float) -> None:
        self.deadline = time.monotonic() + wall_seconds
        self.served += 1
        try:
            self.process.stdin.write(json.dumps(item).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died: reading says so

    def read(self) -> Reply | None:
        """The reply, None when it is not all there yet; of a worker that has died, what it died of."""
        data = os.read(self.process.stdout.fileno(), 1 << 16)
        self._received += data
        if self._received.endswith(b"\n"):
            line, self._received = self._received, b""
            return Reply(**json.loads(line))
        if data:
            return None
        self.dead = True
        status = self.process.wait()
        if status == -signal.SIGXCPU:
            return Reply("overtime", "its CPU time ran out")
        if time.monotonic() > self.deadline:
            return Reply("overtime", "the worker did not answer")
        return Reply("error", f"the worker ended with status {status}")

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


class _Overtime(BaseException):  # not an Exception: the libraries catch those
    pass


def serve(prepare: Callable[[], None], function: Callable[[Any], Any]) -> None:
    """Main loop of a worker. `prepare` does the imports, and raises with a text for the user when it cannot."""
    import resource

    cpu_seconds, memory_bytes = float(sys.argv[1]), int(sys.argv[2])
    requests, replies = sys.stdin, os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no reply
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

    def write(value) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    try:
        prepare()
    except Exception as error:
        return write(str(error))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGPROF, _raise_overtime)
    write("ready")
    for line in requests:
        used = int(time.process_time())
        limit = used + int(cpu_seconds) + 1 + GRACE_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        write(_answer(function, json.loads(line), cpu_seconds))


def _answer(function: Callable[[Any], Any], item: Any, cpu_seconds: float) -> dict:
    try:
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds, 0.05)  # again and again, where a bare `except` swallows it
        try:
            value = function(item)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        return {"status": "ok", "value": value}
    except _Overtime:
        signal.setitimer(signal.ITIMER_PROF, 0)
        return {"status": "overtime", "value": f"more than {cpu_seconds:g} s of CPU time"}
    except (MemoryError, RecursionError) as error:
        return {"status": "memory", "value": type(error).__name__}
    except Exception as error:
        return {"status": "error", "value": repr(error)[:200]}


def _raise_overtime(signum, frame):
    raise _Overtime
