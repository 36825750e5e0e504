"""A pool of worker processes for work that may never end: each item has a CPU clock that starts in its worker.

A worker reads items from its standard input and writes replies to its standard output, one JSON line each, one item at
a time. When an item has used up its CPU time the kernel kills the worker, whatever it is doing, and the pool starts
another. The clock counts the worker's own CPU time, so a reply depends neither on the number of workers nor on what
else the machine does. Workers are fresh interpreters: no forks of this process, which may be running JAX, and no second
import of the user's script. They end when their standard input does, so also when this process is killed.
"""

import contextlib
import json
import os
import queue
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from tracerl_jax.errors import ConfigError

START_SECONDS = 300.0  # for the imports of a worker on a busy machine
ATTEMPTS = 2  # of an item whose worker died of something else than its clock
ITEMS_PER_WORKER = 5000  # then a fresh one: caches grow
MAX_WORKERS = 16


@dataclass(frozen=True)
class Reply:
    """`value` is what the worker's function returned, or, when not "ok", a text for people.

    overtime: the item's CPU time ran out. error: the function raised. died: the worker did, of this item or of an
    accident, `ATTEMPTS` times. hung: it neither computed nor answered.
    """

    status: Literal["ok", "overtime", "error", "died", "hung"]
    value: Any


class WorkerPool:
    """Runs `python -m module` workers (see `serve`). Raises `ConfigError` when a worker says it cannot work.

    Args:
        workers: processes; default: the CPUs this process may use, at most `MAX_WORKERS`.
        cpu_seconds: of one item.
        wall_seconds: after which a worker that has not answered is taken for hung, however busy the machine.
        memory_bytes: address space of a worker.
    """

    def __init__(
        self,
        module: str,
        *,
        workers: int | None = None,
        cpu_seconds: float = 1.0,
        wall_seconds: float = 300.0,
        memory_bytes: int = 2 << 30,
    ):
        command = [sys.executable, "-m", module, str(cpu_seconds), str(memory_bytes)]
        size = workers or min(MAX_WORKERS, _cpus())
        self._workers = [_Worker(command, wall_seconds) for _ in range(size)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(size, thread_name_prefix=module)  # each waits for one worker
        try:
            list(self._threads.map(_Worker.start, self._workers))  # all import at the same time
        except BaseException:
            self.close()
            raise

    def map(self, items: Sequence[Any]) -> list[Reply]:
        """One reply per item, in order; items and values are what JSON carries. May be called from several threads."""
        return list(self._threads.map(self._run, items))

    def _run(self, item: Any) -> Reply:
        worker = self._idle.get()
        try:
            for _ in range(ATTEMPTS):
                reply = worker.ask(item)
                if reply.status != "died":
                    break
            return reply
        finally:
            self._idle.put(worker)

    def pids(self) -> list[int]:
        """Process ids of the workers that run now."""
        return [worker.process.pid for worker in self._workers if worker.process is not None]

    def close(self) -> None:
        """Ends the workers; items that are waiting are given up."""
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.stop()


def _cpus() -> int:
    """CPUs this process may use; not every system can say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Worker:
    """A place for one process, which is started when there is none."""

    def __init__(self, command: list[str], wall_seconds: float):
        self.command, self.wall_seconds = command, wall_seconds
        self.process: subprocess.Popen | None = None
        self._served = 0

    def start(self) -> None:
        """Raises `ConfigError` with what the process says when it cannot work."""
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # Ctrl-C is for this process to handle
        )
        self._served = 0
        line = self._read(START_SECONDS)
        if line == b'"ready"\n':
            return
        self.process.kill()
        errors = self.process.stderr.read().decode(errors="replace").strip()
        self.stop()
        raise ConfigError(json.loads(line) if line else f"{' '.join(self.command)} did not start: {errors[-500:]}")

    def ask(self, item: Any) -> Reply:
        if self.process is None or self._served >= ITEMS_PER_WORKER:
            self.stop()
            self.start()
        self._served += 1
        with contextlib.suppress(BrokenPipeError):  # it has died, which reading finds out
            self.process.stdin.write(json.dumps(item).encode() + b"\n")
            self.process.stdin.flush()
        line = self._read(self.wall_seconds)
        if line is not None and line.endswith(b"\n"):
            return Reply(**json.loads(line))
        status = self.stop()
        if line is None:
            return Reply("hung", f"no answer in {self.wall_seconds:g} s")
        if status == -signal.SIGPROF:
            return Reply("overtime", "its CPU time ran out")
        return Reply("died", f"the worker ended with status {status}")

    def _read(self, seconds: float) -> bytes | None:
        """A line, part of one when the process has ended, None when there was nothing in time."""
        poll = select.poll()  # select.select knows only the first 1,024 files of a process
        poll.register(self.process.stdout, select.POLLIN)
        return self.process.stdout.readline() if poll.poll(1000 * seconds) else None

    def stop(self) -> int | None:
        """Ends the process, if there is one. Returns its exit status."""
        process, self.process = self.process, None
        if process is None:
            return None
        process.kill()
        for pipe in (process.stdin, process.stdout, process.stderr):
            with contextlib.suppress(OSError):  # an item that could not be sent
                pipe.close()
        return process.wait()


def serve(prepare: Callable[[], None], function: Callable[[Any], Any]) -> None:
    """Main loop of a worker. `prepare` does the imports, and raises with a text for the user when it cannot."""
    cpu_seconds, memory_bytes = float(sys.argv[1]), int(sys.argv[2])
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no reply

    def write(value: Any) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    try:
        prepare()
    except Exception as error:
        return write(str(error))
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which kills: no exception, that a library could catch
    write("ready")
    for line in sys.stdin:
        item = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        try:
            reply = Reply("ok", function(item))
        except Exception as error:
            reply = Reply("error", f"{type(error).__name__}: {error}"[:200])
        signal.setitimer(signal.ITIMER_PROF, 0)
        write(vars(reply))
