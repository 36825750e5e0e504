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
import itertools
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIG = Path(__file__).with_name("chaos_config.py")
TOKEN = "TRACERL_CHAOS"  # variable of every process that a round starts
TIMES = ("seconds", "per_second", "tokens/s", "chips/", "hosts/")  # in the names of metrics that differ in equal runs
LONGEST = 300.0, 10.0  # seconds, and times the undisturbed run, until a job that does not end is given up
PATIENCE = 5.0  # seconds that processes have to be gone behind their launcher
STARTS = 4  # by hand, of a round


class Job:
    """`tracerl launch` on a run folder, and the processes that it starts."""

    def __init__(self, run: Path, log: Path, cache: Path, options: argparse.Namespace):
        self.run, self.log, self.token = run, log, f"{os.getpid()} {log.name}"
        self.processes, self.starts = options.processes, 0
        self.limit: float | None = None  # seconds that the launcher may take
        self._launcher: subprocess.Popen | None = None
        self._command = [
            sys.executable, "-m", "tracerl_jax", "launch", f"--processes={options.processes}",
            f"--devices_per_process={options.devices_per_process}", "--max_restarts=3", "--grace=40", "--",
            "rl", f"--config={CONFIG}", f"--config.runs_dir={run.parent}", f"--config.name={run.name}",
        ]  # fmt: skip
        self._environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {
            TOKEN: self.token,
            "TRACERL_CONNECT_TIMEOUT": "90",
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
            return self._launcher.wait(self.limit)
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
    return Reference(job.run, [b - a for a, b in itertools.pairwise(moments)])


# Faults: each waits for its moment and does it; returns (what it did, to be shown, and whether the launcher has to
# bring the run to its end alone). Raises TooLate when the job has ended before.


class TooLate(Exception):
    pass


def wait_for_moment(
    job: Job, draw: random.Random, reference: Reference, when: Callable[[], bool] = lambda: True
) -> str:
    """Until a random row of the metrics is written and, if it was not so before, `when()` holds, then a random part of
    the time to the next row."""
    row = draw.randrange(len(reference.gaps))
    delay = draw.random() * reference.gaps[row]
    while job.rows() < row or not when():
        if not job.is_running:
            raise TooLate
        time.sleep(0.03)
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
        time.sleep(0.03)
    try:
        os.kill(found[name], number)
    except ProcessLookupError:
        raise TooLate from None
    return name


def kill(job: Job, draw: random.Random, reference: Reference) -> tuple[str, bool]:
    moment = wait_for_moment(job, draw, reference)
    name = send(job, draw, signal.SIGKILL, of_job=True)
    return f"{name}, {moment}", name != "launcher"


def term(job: Job, draw: random.Random, reference: Reference) -> tuple[str, bool]:
    moment = wait_for_moment(job, draw, reference)
    name, start = send(job, draw, signal.SIGTERM, of_job=True), time.monotonic()
    while job.is_running and time.monotonic() - start < job.limit:
        time.sleep(0.03)
    return f"{name}, {moment}, all ended within {time.monotonic() - start:.1f} s", False


def stop(job: Job, draw: random.Random, reference: Reference) -> tuple[str, bool]:
    moment = wait_for_moment(job, draw, reference)
    return f"{send(job, draw, signal.SIGSTOP, of_job=False)}, {moment}", True


def truncate(job: Job, draw: random.Random, reference: Reference) -> tuple[str, bool]:
    """With two checkpoints there is one to go back to."""
    moment = wait_for_moment(job, draw, reference, when=lambda: len(job.checkpoints()) > 1)
    job.kill_all()
    newest = job.checkpoints()[-1]
    file = draw.choice(sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size))
    size = draw.randrange(file.stat().st_size)
    moment += f", {file.relative_to(newest.parent)} of {file.stat().st_size} bytes cut to {size}"
    os.truncate(file, size)
    return moment, False


def disk(job: Job, draw: random.Random, reference: Reference) -> tuple[str, bool]:
    moment = wait_for_moment(job, draw, reference)
    filler = fill(job.run.parent)
    status = job.wait()
    filler.unlink()
    if status == 0:
        raise TooLate
    said = any(word in job.log.read_text() for word in ("full", "No space left"))
    return f"{moment}, status {status}{'' if said else ', BUT NOT SAID WHY'}", False


def fill(folder: Path) -> Path:
    """A file that takes all the space there is."""
    filler = folder / "filler"
    with open(filler, "wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    return filler


@contextlib.contextmanager
def small_disk(folder: Path, size: int):
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    subprocess.run(mount, check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


FAULTS = {"kill": kill, "term": term, "stop": stop, "truncate": truncate, "disk": disk}


# What must hold in the end


def problems_of(job: Job, reference: Reference) -> list[str]:
    found = [f"{name} differ" for name, read in CONTENTS.items() if read(job.run) != read(reference.run)]
    if read_json(job.run / "summary.json").get("status") != "finished":
        found.append("summary.json does not say finished")
    found += [f"{path.relative_to(job.run)} is left" for path in job.run.rglob("*") if is_unfinished(path)]
    for name in ("metrics.jsonl", "samples.jsonl"):
        if not (job.run / name).read_bytes().endswith(b"\n"):
            found.append(f"{name} has a torn line")
    sealed = {path.stem for path in (job.run / "checksums").glob("*.json")}
    if sealed != {path.name for path in job.checkpoints()}:
        found.append(f"checksums of {sorted(sealed)} for checkpoints {[path.name for path in job.checkpoints()]}")
    if left := wait_until_gone(job.token):
        found.append(f"processes {left} are left")
        job.kill_all()
    return found


def metric_rows(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in row.items() if not any(time in name for time in TIMES)} for row in rows]


CONTENTS = {
    "metrics": metric_rows,
    "samples": lambda run: (run / "samples.jsonl").read_bytes(),
    "evaluations": lambda run: read_json(run / "summary.json").get("eval"),
    "weights": lambda run: (run / "hf" / "model.safetensors").read_bytes(),
}


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def is_unfinished(path: Path) -> bool:
    return path.suffix in (".new", ".partial", ".replaced") or "-tmp" in path.name


def wait_until_gone(token: str) -> list[int]:
    until = time.monotonic() + PATIENCE
    while (left := marked(token)) and time.monotonic() < until:
        time.sleep(0.1)
    return left


# Rounds


@dataclasses.dataclass
class Outcome:
    fault: str
    what: str
    starts: int
    seconds: float
    problems: list[str]


def run_round(fault: str, draw: random.Random, job: Job, reference: Reference) -> Outcome:
    """Raises TooLate when the job came to its end first."""
    start, job.limit = time.monotonic(), LONGEST[0] + LONGEST[1] * sum(reference.gaps)
    job.start()
    try:
        what, alone = FAULTS[fault](job, draw, reference)
    except TooLate:
        job.kill_all()
        raise
    problems = ["the cause is not said"] if "BUT NOT" in what else []
    while status := job.wait():
        if alone or job.starts == STARTS:
            problems.append(f"status {status} at start {job.starts}")
            break
        job.start()
    if status is None:
        problems.append(f"no end within {job.limit:.0f} s")
    if not problems:
        problems = problems_of(job, reference)
    job.kill_all()
    return Outcome(fault, what, job.starts, time.monotonic() - start, problems)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(FAULTS), help="faults, in turn (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="rounds at a time (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices_per_process", type=int, default=2)
    parser.add_argument("--work", type=Path, help="folder for logs, failed runs and compiled programs")
    options = parser.parse_args()
    faults = options.only.split(",")
    if unknown := [name for name in faults if name not in FAULTS]:
        parser.error(f"no fault {unknown[0]}; there are {', '.join(FAULTS)}")
    if "disk" in faults and os.geteuid():
        parser.error("the fault `disk` needs root: leave it out with --only kill,term,stop,truncate")
    with contextlib.ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        outcomes = run_rounds(options, faults, work.absolute())
    print_table(outcomes, faults)
    return int(any(outcome.problems for outcome in outcomes))


def run_rounds(options: argparse.Namespace, faults: list[str], work: Path) -> list[Outcome]:
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "cache").exists():  # compile, so that the time of the next run is what a round takes
        run_undisturbed(Job(work / "compiled", work / "compiled.log", work / "cache", options))
    shutil.rmtree(work / "undisturbed", ignore_errors=True)
    reference = run_undisturbed(Job(work / "undisturbed", work / "undisturbed.log", work / "cache", options))
    print(f"undisturbed: {len(reference.gaps) - 1} rows, {sum(reference.gaps):.0f} s, "
          f"{reference.bytes / 1e6:.0f} MB", flush=True)  # fmt: skip

    def finish_round(number: int) -> Outcome:
        for attempt in itertools.count():
            with contextlib.suppress(TooLate):
                return try_round(options, number, faults[(number - 1) % len(faults)], attempt, work, reference)

    with ThreadPoolExecutor(options.jobs) as pool:
        return list(pool.map(finish_round, range(1, options.rounds + 1)))


def try_round(
    options: argparse.Namespace, number: int, fault: str, attempt: int, work: Path, reference: Reference
) -> Outcome:
    """A round from its folder to its line of output. Raises TooLate; what is drawn differs from attempt to attempt."""
    folder, cache = work / f"round-{number}", work / f"cache-{number}"
    for leftover in (folder, cache):  # of an earlier call with the same --work
        shutil.rmtree(leftover, ignore_errors=True)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        if fault == "disk":
            stack.enter_context(small_disk(folder, 2 * reference.bytes))
        # A process that is killed may tear what it writes into the cache: each round has its own, of links.
        shutil.copytree(work / "cache", cache, copy_function=os.link)
        stack.callback(shutil.rmtree, cache)
        job = Job(folder / "run", work / f"round-{number}.log", cache, options)
        outcome = run_round(fault, random.Random(f"{options.seed} {number} {attempt}"), job, reference)
        if outcome.problems and options.work:
            shutil.copytree(job.run, work / f"failed-{number}")
    print_line(number, outcome)
    return outcome


def print_line(number: int, outcome: Outcome) -> None:
    result = "; ".join(outcome.problems) or "identical"
    print(f"{number:3} {outcome.fault:9} {outcome.seconds:5.0f} s, {outcome.starts} starts by hand: {result} "
          f"({outcome.what})", flush=True)  # fmt: skip


def print_table(outcomes: list[Outcome], faults: list[str]) -> None:
    print("\n| fault | rounds | identical | seconds, median |\n|---|---|---|---|")
    for fault in dict.fromkeys(faults):
        some = [outcome for outcome in outcomes if outcome.fault == fault]
        if some:
            good = sum(not outcome.problems for outcome in some)
            seconds = statistics.median(outcome.seconds for outcome in some)
            print(f"| {fault} | {len(some)} | {good} | {seconds:.0f} |")


if __name__ == "__main__":
    sys.exit(main())
