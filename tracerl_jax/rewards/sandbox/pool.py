"""The sandbox: a pool of launchers, found out to isolate as promised before the first program is run."""

import json
import logging
import os
import queue
import shlex
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from tracerl_jax.config import RewardSection
from tracerl_jax.errors import ConfigError
from tracerl_jax.rewards.sandbox import bubblewrap, system_calls
from tracerl_jax.rewards.sandbox.worker import START_SECONDS, Worker, WorkerDied

logger = logging.getLogger(__name__)

ALL = ("user", "uid", "mount", "landlock", "pid", "network", "ipc", "uts", "seccomp", "limits")
STRICT = ("mount", "pid", "network", "limits")  # and one of user and uid
MEANING = {
    "user": "user namespace", "uid": "user of its own", "mount": "mount namespace", "landlock": "Landlock",
    "pid": "PID namespace", "network": "network namespace", "ipc": "IPC namespace", "uts": "UTS namespace",
    "seccomp": "seccomp", "limits": "resource limits",
}  # fmt: skip
REMEDY = (
    "let users make namespaces (sysctl kernel.unprivileged_userns_clone=1, on Ubuntu "
    "kernel.apparmor_restrict_unprivileged_userns=0; in Docker --cap-add SYS_ADMIN --security-opt seccomp=unconfined "
    "--security-opt apparmor=unconfined), install bubblewrap, have programs run in a container "
    "(reward.sandbox=container-hook), or take what there is (reward.sandbox=best_effort), see docs/sandbox.md"
)

# Says, in the sandbox, what it sees. Nothing here is believed that its launcher does not also claim.
PROBE = """
import json, os, resource, socket
def works(function, *args):
    try:
        function(*args)
    except OSError:
        return False
    return True
def interfaces():
    try:
        return [name for _, name in socket.if_nameindex()]
    except OSError:
        return []
print(json.dumps({
    "mount": not os.path.exists("/etc/passwd") and not works(os.mkdir, "/probe"),
    "landlock": not works(open, "/etc/passwd") and not works(os.mkdir, "/probe"),
    "pid": os.getpid() < 10,
    "network": interfaces() in ([], ["lo"]),
    "seccomp": not works(os.chroot, "/") and not works(socket.socket),
    "limits": resource.getrlimit(resource.RLIMIT_CORE)[1] == 0,
}))
"""


@dataclass(frozen=True)
class Job:
    """One run of a program: as a script that reads `input`, or with a `test` of its functions (see examine.py)."""

    program: str
    cpu_seconds: float
    input: str = ""
    test: dict | None = None


@dataclass(frozen=True)
class Reply:
    """How a run went. Of a script, "done" means that it ended by itself; "broken" says that the sandbox failed."""

    status: Literal["done", "passed", "failed", "overtime", "output", "broken"]
    detail: str = ""  # for people
    exit: int | None = None  # a script's exit status, or minus the signal that killed it
    output: str = ""  # a script's standard output


class Sandbox:
    """Starts the launchers. Raises `ConfigError` when this machine gives less than `section.sandbox` asks for."""

    def __init__(self, section: RewardSection):
        self._section = section
        self.level = section.sandbox
        self.held: list[str] = []
        if self.level != "container-hook" and not sys.platform.startswith("linux"):
            raise ConfigError(f"programs are isolated by the Linux kernel, and this is {sys.platform}: set "
                              "reward.sandbox=container-hook and reward.container_command")  # fmt: skip
        self._command: list[str] | None = shlex.split(section.container_command) or None
        self._reusable = True
        self._settings = {
            "packages": list(section.code_packages), "site_folders": [], "scratch": None, "namespaces": True,
            "required": [], "filter": "",
        }  # fmt: skip
        if not self._command:
            site_folders = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
            self._settings |= {"site_folders": site_folders, "scratch": tempfile.gettempdir(), "filter": _make_filter()}
        lacks = self._find_out()
        bwrap = shutil.which("bwrap")
        if self.level != "container-hook" and self._insufficient() and bwrap:
            self._command = bubblewrap.command(bwrap, self._settings["site_folders"], section.code_packages)
            self._settings |= {"namespaces": False, "scratch": None}
            self._reusable = False
            lacks = self._find_out()
        if self.level == "strict" and (missing := self._insufficient()):
            reasons = ", ".join(f"no {MEANING[name]} ({lacks.get(name, 'it does not hold')})" for name in missing)
            raise ConfigError(f"reward.sandbox=strict cannot be had on this machine: {reasons}; {REMEDY}")
        if self.level == "best_effort" and (danger := self._danger()):
            raise ConfigError(f"reward.sandbox=best_effort: {danger}; {REMEDY}")
        self._settings["required"] = [name for name in self.held if not (self._command and name in bubblewrap.HOLDS)]
        size = section.workers or min(16, len(os.sched_getaffinity(0)))
        self._threads = ThreadPoolExecutor(size, thread_name_prefix="sandbox")
        self._idle: queue.SimpleQueue[Worker | None] = queue.SimpleQueue()
        for _ in range(size):
            self._idle.put(None)
        self.description = self._describe(lacks)
        logger.info("programs run in a sandbox (%s): %s", self.level, self.description)

    def run(self, jobs: Sequence[Job]) -> list[Reply]:
        """One reply per job, in order."""
        return list(self._threads.map(self._run, jobs))

    def close(self) -> None:
        """Ends the launchers and whatever they run."""
        self._threads.shutdown()
        while not self._idle.empty():
            worker = self._idle.get()
            if worker is not None:
                worker.close()

    def _run(self, job: Job) -> Reply:
        worker = self._idle.get()
        try:
            for _ in range(2):
                worker = worker or self._start()
                reply = self._try(worker, job)
                if reply.status == "broken" or not self._reusable:
                    said = worker.close()
                    worker = None
                if reply.status != "broken":
                    return reply
                logger.warning("a sandbox failed and is replaced: %s %s", reply.detail, said)
            # Whose fault is it? When others run, the program's.
            worker = self._start()
            if self._try(worker, Job("print(1)", 5.0)).output == "1\n":
                return Reply("failed", f"it ended the sandbox twice: {reply.detail}")
            return reply
        finally:
            self._idle.put(worker)

    def _try(self, worker: Worker, job: Job) -> Reply:
        request = {
            "kind": "script" if job.test is None else "function",
            "program": job.program,
            "input": job.input,
            "cpu_seconds": job.cpu_seconds,
            "wait_seconds": self._section.code_wall_seconds,
            "memory_bytes": self._section.code_memory_mb << 20,
        }
        # The judge's clocks are exact; this one is for a launcher that does not answer at all.
        seconds = START_SECONDS + 50 * (job.cpu_seconds + self._section.code_wall_seconds)
        try:
            reply = worker.run(request, job.test, seconds)
        except WorkerDied as error:
            return Reply("broken", str(error))
        if reply["status"] == "refused":
            return Reply("broken", reply["detail"])
        return Reply(**{name: value for name, value in reply.items() if name not in ("held", "lacks")})

    def _start(self) -> Worker:
        return Worker(self._settings, self._command)

    # what holds

    def _find_out(self) -> dict[str, str]:
        """Sets `held` to what the launcher claims and a program in it sees; why the rest does not hold."""
        worker = self._start()
        job = {"kind": "script", "program": PROBE, "input": "", "cpu_seconds": 5.0,
               "wait_seconds": 10.0, "memory_bytes": self._section.code_memory_mb << 20}  # fmt: skip
        try:
            reply = worker.run(job, None, START_SECONDS)
            seen = json.loads(reply.get("output") or "null")
            if not isinstance(seen, dict):
                raise WorkerDied(f"a first program did not run ({reply['status']}): {reply['detail']}")
        except (WorkerDied, ValueError) as error:
            self.held = []
            if self.level == "strict":
                return dict.fromkeys(STRICT, str(error))
            how = f"by {shlex.join(self._command)!r}" if self._command else "here"
            raise ConfigError(f"reward.sandbox={self.level}: no program can be run {how}: {error}") from error
        finally:
            worker.close()
        claimed = {*reply["held"], *(() if self._settings["namespaces"] else bubblewrap.HOLDS)}
        self.held = [name for name in ALL if name in claimed and seen.get(name, True)]
        return {**{name: "it was claimed and does not hold" for name in claimed - {*self.held}}, **reply["lacks"]}

    def _insufficient(self) -> list[str]:
        missing = [name for name in STRICT if name not in self.held]
        return missing if {"user", "uid"} & {*self.held} else ["user", *missing]

    def _danger(self) -> str:
        """What a program could do here that no effort is good enough for."""
        if os.geteuid() == 0 and not {"mount", "landlock", "uid"} & {*self.held}:
            return "programs would run as root and could write anywhere; run as another user, or with a Python " \
                "installation that other users can read"  # fmt: skip
        if not {"pid", "uid", "seccomp"} & {*self.held}:
            return f"programs could end this user's processes; {system_calls.REMEDY}"
        return ""

    def _describe(self, lacks: dict[str, str]) -> str:
        if not self._settings["filter"] and not self._command:
            lacks = {**lacks, "seccomp": system_calls.REMEDY}
        optional = ("user", "uid", "landlock")  # one takes another's place
        relevant = [name for name in ALL if name not in self.held and (name not in optional or name in lacks)]
        without = [f"{MEANING[name]} ({lacks[name]})" if name in lacks else MEANING[name] for name in relevant]
        by = " (by bubblewrap)" if not self._settings["namespaces"] else ""
        text = f"{', '.join(MEANING[name] for name in self.held) or 'nothing'} hold{by}"
        return f"{text}; not: {', '.join(without)}" if without else text


def _make_filter() -> str:
    try:
        return system_calls.make_filter().hex()
    except (ImportError, OSError):
        return ""
