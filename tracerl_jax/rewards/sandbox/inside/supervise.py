"""The judge of a script: gives it its input, takes its output, and watches its time."""

import os
import select
import signal
from dataclasses import dataclass, field

from tracerl_jax.rewards.sandbox.inside.clock import Clock, Overtime
from tracerl_jax.rewards.sandbox.inside.isolation import SCRATCH_BYTES

MAX_OUTPUT = 8 << 20  # bytes
ERRORS_KEPT = 2000  # bytes, the last
PIECE = 1 << 16
MAX_PIPE = 1 << 20


@dataclass
class Program:
    """The process of a program, seen from its judge. `folder` is its scratch folder, if that has no limit."""

    pid: int
    clock: Clock
    folder: str | None
    pidfd: int = field(init=False)

    def __post_init__(self):
        self.pidfd = os.pidfd_open(self.pid)

    def wait(self, reads: tuple[int, ...] = (), writes: tuple[int, ...] = ()) -> set[int]:
        """Descriptors that are ready, the process's own `pidfd` when it has ended. Raises `Overtime`, `OSError`."""
        poll = select.poll()
        for fd in (self.pidfd, *reads):
            poll.register(fd, select.POLLIN)
        for fd in writes:
            poll.register(fd, select.POLLOUT)
        while True:
            left = self.clock.left()
            if self.folder is not None:
                left = min(left, 0.05)
            ready = {fd for fd, _ in poll.poll(left * 1000)}
            if ready:
                return ready
            if self.folder is not None and _size(self.folder) > SCRATCH_BYTES:
                raise Overtime(f"more than {SCRATCH_BYTES >> 20} MiB of files")

    def end(self) -> int:
        """Kills it if it still runs; exit status, or minus the signal."""
        os.kill(self.pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def supervise(program: Program, pipes: tuple[int, ...], text: str) -> dict:
    """Runs a script to its end. The reply has its exit status, its output and the last line of its errors."""
    stdin, stdout, stderr = pipes
    for fd in pipes:
        os.set_blocking(fd, False)
    waiting = memoryview(text.encode(errors="surrogatepass"))
    output, errors = bytearray(), bytearray()
    program.clock.start()
    try:
        open_reads, ended = {stdout, stderr}, False
        while not ended:
            if not waiting and stdin >= 0:
                os.close(stdin)
                stdin = -1
            ready = program.wait(tuple(open_reads), (stdin,) if waiting else ())
            ended = program.pidfd in ready
            if stdin in ready:
                waiting = _write(stdin, waiting)
            if stdout in open_reads and not _read(stdout, output, ended):
                open_reads.discard(stdout)
            if stderr in open_reads and not _read(stderr, errors, ended):
                open_reads.discard(stderr)
            if len(output) > MAX_OUTPUT:
                program.end()
                return {"status": "output", "detail": f"more than {MAX_OUTPUT >> 20} MiB of output"}
            del errors[:-ERRORS_KEPT]
    except Overtime as error:
        program.end()
        return {"status": "overtime", "detail": str(error)}
    last = errors.decode(errors="replace").strip().rpartition("\n")[2]
    return {
        "status": "done", "exit": program.end(), "output": output.decode(errors="replace"), "detail": last[:200]
    }  # fmt: skip


def _write(fd: int, data: memoryview) -> memoryview:
    try:
        return data[os.write(fd, data[:PIECE]) :]
    except BlockingIOError:
        return data
    except BrokenPipeError:
        return data[:0]  # it does not want any more


def _read(fd: int, into: bytearray, everything: bool) -> bool:
    """Takes a piece, or `everything` that a pipe can hold; whether more may come."""
    for _ in range(MAX_PIPE // PIECE if everything else 1):
        try:
            piece = os.read(fd, PIECE)
        except BlockingIOError:
            return True
        into += piece
        if not piece:
            return False
    return True


def _size(folder: str) -> int:
    total = 0
    for place, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
            except OSError:
                pass
    return total
