"""tracerl launch: the processes of a job on this machine, watched and restarted."""

import argparse
import contextlib
import dataclasses
import difflib
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tracerl_jax.errors import ConfigError, UserError
from tracerl_jax.launch.cli import JOINING, STATUS_INTERRUPTED, STATUS_USER_ERROR

log = logging.getLogger(__name__)

HELP = """Start a command of tracerl, watch it, and start it again from its last checkpoint when it was killed, crashed
or lost a process of its job. With --processes N it is N processes on this machine that form one job: for tests and
debugging, since one process drives all the devices of a host. Without, it is one process that joins whatever job its
environment names: what a host of a TPU slice runs.

When one of N fails, the others have --grace seconds to notice, to write where they are and to exit; then they are
killed. A mistake of the user (status 2) and an interruption (status 130) restart nothing. SIGINT and SIGTERM are
passed on to every process. The status is that of the process that failed first, 128 + n for signal n."""

EPILOG = """examples:
  tracerl launch --processes 2 --devices_per_process 4 -- rl --config demo
  tracerl launch --max_restarts 5 -- rl --config rl_sdar_8b_math ..          (on every host of a slice)"""

VARIABLES = ("TRACERL_COORDINATOR", "TRACERL_PROCESSES", "TRACERL_PROCESS_ID")
DEVICE_COUNT = "--xla_force_host_platform_device_count"
FINAL = (STATUS_USER_ERROR, STATUS_INTERRUPTED)  # statuses of a failure that comes again, or was wanted
TICK = 0.1  # seconds between looks at the processes
LONGEST_DELAY = 60.0
LONGEST_LINE = 1 << 16  # bytes that wait for their newline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument
    flag("--processes", type=int, default=1, metavar="N", help="of the job on this machine (default: %(default)s)")
    flag("--devices_per_process", type=int, metavar="M", help="use this many virtual CPU devices (default: real ones)")
    flag("--max_restarts", type=int, default=0, metavar="K", help="starts after the first one (default: %(default)s)")
    flag("--grace", type=float, default=90.0, metavar="SECONDS",
         help="for the others when one has failed (default: %(default)g)")  # fmt: skip
    parser.takes_command = True


def run(args: argparse.Namespace) -> int:
    for name, least in (("processes", 1), ("devices_per_process", 1), ("max_restarts", 0), ("grace", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name} is {value:g}, must be at least {least}")
    return run_job(
        [sys.executable, "-m", "tracerl_jax", *checked(args.command)],
        processes=args.processes,
        devices_per_process=args.devices_per_process,
        max_restarts=args.max_restarts,
        grace=args.grace,
    )


def checked(command: Sequence[str]) -> Sequence[str]:
    """A command line of tracerl without its first word, if it is one that can be a job."""
    first = command[0] if command else "nothing"
    if first not in JOINING:
        close = difflib.get_close_matches(first, JOINING, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"it is one of {', '.join(JOINING)}, without `tracerl`"
        raise UserError(f"{first} is no command that launch can run; {remedy}")
    return command


def run_job(
    command: Sequence[str], *, processes: int = 1, devices_per_process: int | None = None, max_restarts: int = 0,
    grace: float = 90.0,
) -> int:
    """Runs `command` in `processes` processes until all have ended, and again if that is worth it. Call it in the main
    thread. Returns the exit status of the last start: 0, or that of the process that failed first.

    Raises ConfigError when the environment already names a job, which this one would not be part of.
    """
    named = [name for name in VARIABLES if name in os.environ]
    if processes > 1 and named:
        raise ConfigError(
            f"{named[0]} is set, and --processes {processes} makes a job of this machine alone: unset it, or leave "
            "--processes out to join the job that it names"
        )
    with _signals() as received:
        for start in range(max_restarts + 1):
            attempt = _Attempt(command, _environments(processes, devices_per_process))
            try:
                status = attempt.watch(received, grace)
            finally:
                attempt.end()
            if status == 0 or status in FINAL or received or start == max_restarts:
                break
            delay = min(2.0**start, LONGEST_DELAY)
            log.warning("the job's status is %d: restart %d of %d in %g s", status, start + 1, max_restarts, delay)
            until = time.monotonic() + delay
            while time.monotonic() < until and not received:
                time.sleep(TICK)
            if received:
                return STATUS_INTERRUPTED
    return status


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are collected in the list instead of ending this process."""
    received: list[int] = []
    previous = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _environments(processes: int, devices: int | None) -> list[dict[str, str]]:
    """What each process finds. A port of its own at every start: nothing that is left of the last one is in the way."""
    common = dict(os.environ)
    if devices is not None:
        flags = [flag for flag in common.get("XLA_FLAGS", "").split() if not flag.startswith(DEVICE_COUNT)]
        common |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join([*flags, f"{DEVICE_COUNT}={devices}"])}
    if processes == 1:
        return [common]
    job = {"TRACERL_COORDINATOR": f"127.0.0.1:{free_port()}", "TRACERL_PROCESSES": str(processes)}
    return [common | job | {"TRACERL_PROCESS_ID": str(index)} for index in range(processes)]


def free_port() -> int:
    """A TCP port of this machine that nobody listens at now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@dataclasses.dataclass
class _Stream:
    """What a process writes to its standard output or error on its way to ours, line by line behind a prefix."""

    prefix: bytes
    target: int  # file descriptor
    waiting: bytes = b""

    def pass_on(self, data: bytes) -> None:
        *lines, self.waiting = (self.waiting + data).split(b"\n")
        if len(self.waiting) > LONGEST_LINE:
            lines, self.waiting = [*lines, self.waiting], b""
        self._write(lines)

    def finish(self) -> None:
        self._write([self.waiting] if self.waiting else [])
        self.waiting = b""

    def _write(self, lines: Sequence[bytes]) -> None:
        text = b"".join(self.prefix + line + b"\n" for line in lines)
        while text:
            text = text[os.write(self.target, text) :]


class _Attempt:
    """The processes of a job from one start to its end."""

    def __init__(self, command: Sequence[str], environments: Sequence[Mapping[str, str]]):
        self._strangers = _children()  # of this process already, and none of the job's
        self._selector = selectors.DefaultSelector()
        self._processes: list[subprocess.Popen] = []
        for index, environment in enumerate(environments):
            alone = len(environments) == 1  # then it may have the terminal, with its progress bar
            process = _start(command, environment, None if alone else subprocess.PIPE)
            self._processes.append(process)
            for pipe, target in () if alone else ((process.stdout, 1), (process.stderr, 2)):
                os.set_blocking(pipe.fileno(), False)
                self._selector.register(pipe, selectors.EVENT_READ, _Stream(b"[%d] " % index, target))

    def watch(self, received: Sequence[int], grace: float) -> int:
        """Waits for all processes; returns the status of the job. `received`: signals to pass on, as they come."""
        passed_on, statuses, deadline, killed = 0, [], None, False
        running = dict(enumerate(self._processes))
        while running:
            self._pass_output_on(TICK)
            while passed_on < len(received):
                for process in running.values():
                    process.send_signal(received[passed_on])
                passed_on += 1
            for index, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[index]
                if process.returncode and not killed:
                    statuses.append(process.returncode if process.returncode > 0 else 128 - process.returncode)
                    log.warning("process %d ended %s", index, _describe(process.returncode))
            if statuses and running and deadline is None:
                deadline = time.monotonic() + grace
                log.warning("the other processes have %g s to end", grace)
            if running and not killed and deadline is not None and time.monotonic() > deadline:
                killed = True
                log.warning("killing %s", ", ".join(f"process {index}" for index in running))
                for process in running.values():
                    process.kill()
        self._pass_output_on(0)
        return STATUS_USER_ERROR if STATUS_USER_ERROR in statuses else statuses[0] if statuses else 0

    def end(self) -> None:
        """Kills what is left of the processes and of those that they started."""
        for process in self._processes:
            process.kill()
            process.wait()
        for key in list(self._selector.get_map().values()):
            key.data.finish()
            key.fileobj.close()
        self._selector.close()
        while orphans := _children() - self._strangers:  # the next round finds the children of these
            for orphan in orphans:
                with contextlib.suppress(ProcessLookupError, ChildProcessError):
                    os.kill(orphan, signal.SIGKILL)
                    os.waitpid(orphan, 0)

    def _pass_output_on(self, seconds: float) -> None:
        for key, _ in self._selector.select(seconds):
            data = os.read(key.fd, LONGEST_LINE)
            if data:
                key.data.pass_on(data)
                continue
            key.data.finish()
            self._selector.unregister(key.fileobj)
            key.fileobj.close()


def _start(command: Sequence[str], environment: Mapping[str, str], output: int | None) -> subprocess.Popen:
    """A process in a session of its own, so that Ctrl-C reaches it through us only, which dies when we do."""
    launcher = os.getpid()

    def die_with_launcher() -> None:
        _prctl("PR_SET_PDEATHSIG", signal.SIGKILL)
        if os.getppid() != launcher:  # it died before that
            os.kill(os.getpid(), signal.SIGKILL)

    _prctl("PR_SET_CHILD_SUBREAPER", 1)  # what a killed process leaves behind becomes a child of ours
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
        preexec_fn=die_with_launcher,
    )  # fmt: skip


def _prctl(option: str, value: int) -> None:
    """Linux only; elsewhere killing the launcher (-9) leaves its processes running."""
    if sys.platform == "linux":
        from tracerl_jax.rewards.sandbox.inside import isolation as kernel

        kernel.prctl(getattr(kernel, option), value)


def _children() -> set[int]:
    """Process ids of all children of this process, where the system tells."""
    with contextlib.suppress(OSError):
        return {int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}
    return set()


def _describe(returncode: int) -> str:
    if returncode >= 0:
        return f"with status {returncode}"
    try:
        return f"by {signal.Signals(-returncode).name}"
    except ValueError:  # a real-time signal has no name
        return f"by signal {-returncode}"
