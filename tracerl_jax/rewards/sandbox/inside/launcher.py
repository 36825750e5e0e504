"""The process that starts programs: reads a job, forks gate, judge and program (see the package), writes the reply.

Conversation on standard input and output: first the settings, then per job two messages in and one out. The second
message holds the tests; only the judge reads it, when the program's process is already apart.

Settings: `packages` that can be imported, from `site_folders` (default: this Python's); `scratch`, where to make
scratch folders; `filter` (BPF, hex, or ""); `namespaces`, whether to try them; `required`, the names without which
nothing is run.
Job: `kind` "script" or "function", `program`, `input`, `cpu_seconds`, `wait_seconds`, `memory_bytes`; its second
message: see examine.py, or null. Reply: `status`, `detail` and more, and what isolation `held` and what it `lacks`.
"""

import contextlib
import fcntl
import gc
import math
import os
import select
import shutil
import signal
import site
import sys
import tempfile
from collections.abc import Callable

from tracerl_jax.rewards.sandbox.inside import isolation as kernel
from tracerl_jax.rewards.sandbox.inside.clock import Clock
from tracerl_jax.rewards.sandbox.inside.examine import examine
from tracerl_jax.rewards.sandbox.inside.frames import read_frame, write_frame
from tracerl_jax.rewards.sandbox.inside.isolation import Isolation
from tracerl_jax.rewards.sandbox.inside.program import run_script, serve_functions
from tracerl_jax.rewards.sandbox.inside.runtime import Runtime, find_runtime
from tracerl_jax.rewards.sandbox.inside.supervise import Program, supervise

ENVIRONMENT = {"HOME": "/nonexistent", "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
JOBS, REPLIES = 0, 1  # file descriptors of the launcher


def serve() -> Callable[[], None] | None:
    """Serves until its standard input is closed. Returns in the process of a program, with what this is to do."""
    settings = read_frame(JOBS)
    os.environ.clear()
    os.environ.update(ENVIRONMENT)
    site_folders = settings["site_folders"] or [path for path in site.getsitepackages() if os.path.isdir(path)]
    sys.path = [*filter(None, sys.path), *site_folders]  # not the current folder: it will be a program's
    sys.dont_write_bytecode = True
    runtime = find_runtime([os.path.realpath(folder) for folder in site_folders], settings["packages"])
    readable = runtime.readable(), runtime.listed
    kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
    gc.freeze()  # what is there now stays shared with the forks
    while True:
        try:
            job = read_frame(JOBS)
        except EOFError:
            return None
        folder = tempfile.mkdtemp(
            prefix=f"program-{os.getpid()}-", dir=settings["scratch"]
        )  # used where there is no mount namespace
        reply_read, reply_write = os.pipe()
        gate = os.fork()
        if gate == 0:
            os.close(reply_read)
            return _gate(settings, job, folder, reply_write, runtime, readable)
        os.close(reply_write)
        reply = _wait(reply_read, gate)
        shutil.rmtree(folder, ignore_errors=True)
        write_frame(REPLIES, reply)
        if reply["status"] == "broken":  # who knows how far the judge has read
            return None


def _wait(reply_fd: int, gate: int) -> dict:
    """The judge's reply. Ends everything when the parent goes away."""
    poll = select.poll()
    poll.register(reply_fd, select.POLLIN)
    poll.register(JOBS, 0)  # its end is reported all the same
    gone = any(fd == JOBS and event & (select.POLLHUP | select.POLLERR) for fd, event in poll.poll())
    try:
        reply = {"status": "broken", "detail": "the parent is gone"} if gone else read_frame(reply_fd)
    except (EOFError, ValueError):
        reply = {"status": "broken", "detail": "the judge of a program died"}
    os.close(reply_fd)
    os.kill(gate, signal.SIGKILL)  # and by PR_SET_PDEATHSIG the judge, and by the PID namespace all others
    _end_children()
    return reply


def _end_children() -> None:
    """Where a PID namespace does not: whatever a program has left behind is or becomes a child of this process."""
    while True:
        children = _children()
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        try:
            if os.waitpid(-1, 0 if children else os.WNOHANG)[0] == 0:
                return
        except ChildProcessError:
            return


def _children() -> list[int]:
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return [int(pid) for pid in file.read().split()]
    except OSError:
        return []


def _gate(
    settings: dict, job: dict, folder: str, reply_fd: int, runtime: Runtime, readable: tuple[list[str], list[str]]
) -> Callable[[], None]:
    """Enters the namespaces; the judge, first in them, makes the file system and gives up its privileges."""
    uid = kernel.FIRST_UID + os.getpid()
    found = Isolation()
    root = os.geteuid() == 0
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    proc = os.open("/proc" if os.path.isdir("/proc/self") else "/", os.O_PATH | os.O_DIRECTORY)
    if settings["namespaces"]:
        kernel.enter_namespaces(found)
    judge = os.fork()
    if judge:
        os.close(reply_fd)
        os.waitpid(judge, 0)
        os._exit(0)
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    if "mount" in found.held:
        found.held.remove("mount")
        found.attempt("mount", kernel.make_root, runtime.paths, runtime.hidden, runtime.shown)
    if "mount" in found.held:
        folder = kernel.SCRATCH
    if root and "user" not in found.held:
        found.attempt("uid", kernel.own_uid, uid, folder)
    kernel.drop_privileges()
    return _judge({**settings, "readable": readable}, job, found, folder, reply_fd, proc)


def _judge(settings: dict, job: dict, found: Isolation, folder: str, reply_fd: int, proc: int) -> Callable[[], None]:
    """Starts the program, in which it returns, and judges it."""
    is_script = job["kind"] == "script"
    theirs, ours = _pipes(is_script)
    ready_read, ready_write = os.pipe()
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    pid = os.fork()
    if pid == 0:
        _settle(settings, job, found, folder, theirs, ready_write, proc)
        return lambda: (run_script if is_script else serve_functions)(job["program"])
    for fd in (*theirs, ready_write):
        os.close(fd)
    tests = read_frame(JOBS)
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(nothing, fd)  # tests may print
    reply = {"status": "refused", "detail": "a program could not be started"}
    try:
        host_pid, found.held, found.lacks = read_frame(ready_read)
        missing = found.missing(settings["required"])
        if missing:
            reply["detail"] = f"isolation that held before does not any more: {missing}"
        else:
            schedstat = _open_schedstat(host_pid, proc)
            os.close(proc)  # the tests need not see other processes
            clock = Clock(pid, schedstat, job["cpu_seconds"], job["wait_seconds"])
            program = Program(pid, clock, None if "mount" in found.held else folder)
            seconds = 5 * math.ceil(job["cpu_seconds"]) + 10  # a test may be more work than the program
            kernel.limit_resources(seconds, job["memory_bytes"] + (256 << 20), None)
            reply = supervise(program, ours, job["input"]) if is_script else examine(program, ours, tests)
    except EOFError:
        pass
    write_frame(reply_fd, {**reply, "held": found.held, "lacks": found.lacks})
    os._exit(0)


def _settle(settings, job, found: Isolation, folder: str, pipes: tuple, ready: int, proc: int) -> None:
    """Makes the process of a program ready: its file descriptors, folder, limits; says so to the judge."""
    os.setsid()
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        host_pid = os.readlink("self", dir_fd=proc)
    except OSError:
        host_pid = ""
    nothing = os.open(os.devnull, os.O_RDWR)
    wanted = pipes if len(pipes) == 3 else (nothing, nothing, nothing, *pipes)
    copies = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in (*wanted, ready)]
    for target, fd in enumerate(copies):
        os.dup2(fd, target)
    ready = len(wanted)
    os.closerange(ready + 1, os.sysconf("SC_OPEN_MAX"))
    os.chdir(folder)
    tempfile.tempdir = folder
    found.attempt("limits", kernel.limit_resources, math.ceil(job["cpu_seconds"]) + 1, job["memory_bytes"])
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if "mount" not in found.held and settings["namespaces"]:
        found.attempt("landlock", kernel.restrict_files, *settings["readable"], folder)
    if settings["filter"]:
        found.attempt("seccomp", kernel.filter_system_calls, bytes.fromhex(settings["filter"]))
    write_frame(ready, [host_pid, found.held, found.lacks])
    os.close(ready)
    if found.missing(settings["required"]):
        os._exit(1)


def _pipes(is_script: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(the program's ends, the judge's): standard input, output and errors, or requests and replies."""
    pairs = [os.pipe() for _ in range(3 if is_script else 2)]
    theirs = [pairs[0][0], *(write for _, write in pairs[1:])]
    ours = [pairs[0][1], *(read for read, _ in pairs[1:])]
    return tuple(theirs), tuple(ours)


def _open_schedstat(pid: str, proc: int) -> int | None:
    try:
        return os.open(f"{pid}/schedstat", os.O_RDONLY, dir_fd=proc)
    except OSError:
        return None
