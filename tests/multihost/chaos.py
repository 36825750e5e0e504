"""Breaks a job of several processes, round after round, and compares what it ends with to an undisturbed run.

    python tests/multihost/chaos.py --rounds 50 --seed 0
    python tests/multihost/chaos.py --rounds 6 --only kill,disk

A round starts `tracerl launch --processes 2 --max_restarts 3 -- rl` on a run folder of its own and, at a random point
of the run, does one of

    kill       kill -9 of a process, or of the launcher
    term       SIGTERM to a process, or to the launcher, as a pre-emption does
    stop       SIGSTOP of a process: it hangs
    truncate   kill -9 of everything, then a file of the newest checkpoint is cut short
    disk       the disk is full; space comes back once the job has ended (needs root, for a file system of its own)

What the launcher does not start again by itself is started again here, as a scheduler or a person would. In the end
metrics (without times), samples, evaluation and exported weights must be those of the undisturbed run bit for bit, the
folder must hold nothing half-written, and no process may be left. Prints a line a round and a table; status 1 when a
round failed. Linux only.
"""

import argparse
import contextlib
import dataclasses
import errno
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIG = Path(__file__).with_name("chaos_config.py")
TOKEN = "TRACERL_CHAOS"  # variable of every process that a round starts
TIMES = ("seconds", "per_second", "tokens/s", "mfu", "memory")  # in the names of metrics that differ between equal runs
LONGEST = 600.0  # seconds until a job that does not end is given up
STARTS = 4  # by hand, of a round


class Job:
    """`tracerl launch` on a run folder, and the processes that it starts."""

    def __init__(self, run: Path, cache: Path, options: argparse.Namespace):
        self.run, self.log, self.token = run, run.with_name(f"{run.name}.log"), f"{os.getpid()}-{run.name}"
        self.starts = 0
        self._launcher: subprocess.Popen | None = None
        self._command = [
            sys.executable, "-m", "tracerl_jax", "launch", f"--processes={options.processes}",
            f"--devices_per_process={options.devices_per_process}", "--max_restarts=3", "--grace=30", "--",
            "rl", f"--config={CONFIG}", f"--config.runs_dir={run.parent}", f"--config.name={run.name}",
        ]  # fmt: skip
        self._environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {
            TOKEN: self.token,
            "PYTHONPATH": str(ROOT),
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiles faster; the undisturbed run does the same
        }

    def start(self) -> None:
        self.starts += 1
        with open(self.log, "ab") as log:
            self._launcher = subprocess.Popen(
                self._command, env=self._environment, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    @property
    def is_running(self) -> bool:
        return self._launcher.poll() is None

    def wait(self) -> int | None:
        """The launcher's status, negative for a signal; None, and everything is killed, when it does not end."""
        try:
            return self._launcher.wait(LONGEST)
        except subprocess.TimeoutExpired:
            self.kill_all()
            return None

    def victims(self, of_job: bool = True) -> dict[str, int]:
        """{name: process id} of the processes of the job that run now and, if wanted, of the launcher."""
        found = {"launcher": self._launcher.pid} if of_job else {}
        for pid in marked(self.token):
            parent, index = parent_of(pid), variable(pid, "TRACERL_PROCESS_ID")
            if parent == self._launcher.pid:
                found[f"process {index or 0}"] = pid
        return found

    def kill_all(self) -> None:
        while pids := marked(self.token):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._launcher.poll()
            time.sleep(0.05)
        self._launcher.wait()

    def rows(self) -> int:
        """Lines of metrics.jsonl: how far the run is."""
        try:
            return (self.run / "metrics.jsonl").read_bytes().count(b"\n")
        except OSError:
            return 0

    def checkpoints(self) -> list[Path]:
        folder = self.run / "checkpoints"
        found = [path for path in folder.glob("*") if path.name.isdigit()]
        return sorted(found, key=lambda path: int(path.name))


# Processes, as /proc shows them


def marked(token: str) -> list[int]:
    """Living processes that were started with this token."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        if int(path.name) != os.getpid() and variable(int(path.name), TOKEN) == token:
            found.append(int(path.name))
    return found


def variable(pid: int, name: str) -> str | None:
    """A variable of the environment that a process was started with; None of one that is gone or has it not."""
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    values = [entry.partition(b"=")[2].decode() for entry in environment if entry.startswith(f"{name}=".encode())]
    return values[0] if values else None


def parent_of(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


# The undisturbed run


@dataclasses.dataclass
class Reference:
    run: Path
    gaps: list[float]  # seconds until the first row of the metrics, between rows, until the end

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.run.rglob("*") if path.is_file())


def run_undisturbed(job: Job) -> Reference:
    job.start()
    times, start = [], time.monotonic()
    while job.is_running:
        times += [time.monotonic()] * (job.rows() - len(times))
        time.sleep(0.02)
    if job.wait():
        raise SystemExit(f"the undisturbed run failed:\n{job.log.read_text()[-3000:]}")
    moments = [start, *times, time.monotonic()]
    return Reference(job.run, [b - a for a, b in zip(moments, moments[1:], strict=False)])


# Faults: each waits for its moment and does it; returns (what it did, to be shown, and whether the launcher has to bring
# the run to its end alone). Raises TooLate when the job has ended before.


class TooLate(Exception):
    pass


def wait_for_moment(job: Job, draw: random.Random, reference: Reference, when: Callable[[], bool] = lambda: True) -> str:
    """Until a random row of the metrics is written and, if it was not so before, `when()` holds, then a random part of
    the time to the next row."""
    row = draw.randrange(len(reference.gaps))
    delay = draw.random() * reference.gaps[row]
    while job.rows() < row or not when():
        if not job.is_running:
            raise TooLate
        time.sleep(0.01)
    time.sleep(delay)
    if not job.is_running:
        raise TooLate
    return f"{delay:.1f} s behind row {job.rows()}"


def send(job: Job, draw: random.Random, number: int, of_job: bool) -> str:
    names = [f"process {index}" for index in range(job.processes)]
    name = draw.choice(names + ["launcher"] if of_job else names)
    while name not in (found := job.victims()):
        if not job.is_running:
            raise TooLate
        time.sleep(0.01)
    try:
        os.kill(found[name], number)
    except ProcessLookupError:
        raise TooLate from None
    return name
