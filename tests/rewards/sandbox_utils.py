"""What the tests of the sandbox share: sandboxes of several strengths, and a look at what they leave behind."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from tracerl_jax.config import RewardSection
from tracerl_jax.errors import ConfigError
from tracerl_jax.rewards.sandbox import Sandbox, pool, worker
from tracerl_jax.rewards.sandbox.inside.isolation import FIRST_UID

FAST = {"code_wall_seconds": 0.4, "code_memory_mb": 256, "workers": 2}

SYSTEM_PYTHON = "/usr/bin/python3"  # other users can read it
NO_NAMESPACES = """
import errno, os, sys
sys.path += {path!r}
import pyseccomp
rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
for name in {calls!r}:
    rules.add_rule(pyseccomp.ERRNO(errno.EPERM), name)
rules.load()
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def open_sandbox(**section) -> Sandbox:
    """Skips the test where the machine does not give what `section` asks for."""
    try:
        return Sandbox(RewardSection(**{**FAST, **section}))
    except ConfigError as error:
        pytest.skip(str(error))


def without_namespaces(monkeypatch, *more: str) -> None:
    """A machine whose kernel makes no namespaces, as in a Docker container with the default settings; nor does it
    know the system calls `more`."""
    pytest.importorskip("pyseccomp", exc_type=(ImportError, RuntimeError))
    python = SYSTEM_PYTHON if os.geteuid() == 0 and os.path.exists(SYSTEM_PYTHON) else sys.executable
    monkeypatch.setattr(
        worker, "PYTHON", (python, "-c", NO_NAMESPACES.format(path=sys.path, calls=("unshare", *more)), "-s")
    )
    monkeypatch.setattr(pool.shutil, "which", lambda name: None)  # no bubblewrap either


def as_another_user(monkeypatch) -> None:
    """Launchers run as a user without privileges, with a Python that this user can read."""
    if os.geteuid() != 0 or not shutil.which("setpriv") or not os.path.exists(SYSTEM_PYTHON):
        pytest.skip("needs root, setpriv and a system Python")
    command = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", SYSTEM_PYTHON, "-s")
    monkeypatch.setattr(worker, "PYTHON", command)


def left_behind() -> dict[str, list]:
    """Processes, folders, mounts and IPC objects that programs may have left; launchers do not count."""
    launchers = _children(os.getpid())
    programs = [pid for launcher in launchers for pid in _children(launcher)]
    return {
        "processes": programs + [pid for pid in _processes() if _uid(pid) >= FIRST_UID and _is_below(pid, launchers)],
        "folders": [str(p) for launcher in launchers for p in Path("/tmp").glob(f"program-{launcher}-*")],
        "files": [str(p) for folder in ("/", "/tmp", "/dev/shm") for p in Path(folder).glob("sandbox-escape*")],
        "mounts": Path("/proc/self/mountinfo").read_text().splitlines(),
        "ipc": [Path(f"/proc/sysvipc/{kind}").read_text().splitlines()[1:] for kind in ("shm", "sem", "msg")],
    }


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def _children(pid: int) -> list[int]:
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(child) for child in file.read_text().split()]
        except OSError:
            pass
    return found


def _uid(pid: int) -> int:
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return -1


def _is_below(pid: int, launchers: list[int]) -> bool:
    while pid > 1:
        if pid in launchers:
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            return False
    return False
