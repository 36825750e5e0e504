"""Bubblewrap instead of our own namespaces: some systems let only this program make them."""

import os
import sys
import sysconfig
from collections.abc import Sequence

from tracerl_jax.rewards.sandbox.inside.isolation import SCRATCH, SCRATCH_BYTES

HOLDS = ("user", "mount", "pid", "network", "ipc", "uts")


def command(bwrap: str, packages: Sequence[str]) -> list[str]:
    """A Python in new namespaces, for one program: what it leaves behind ends with it."""
    executable = os.path.realpath(sys.executable)
    arguments = [bwrap, "--unshare-all", "--die-with-parent", "--new-session", "--dev", "/dev"]
    folders = [sysconfig.get_path("stdlib"), f"{sys.base_exec_prefix}/lib", "/usr/lib", *packages]
    for folder in ("/lib", "/lib64", "/usr/lib64"):
        if os.path.islink(folder):
            arguments += ["--symlink", os.readlink(folder), folder]
        else:
            folders.append(folder)
    for path in (executable, *folders):
        arguments += ["--ro-bind-try", path, path]
    arguments += ["--size", str(SCRATCH_BYTES), "--tmpfs", SCRATCH, "--clearenv"]
    arguments += ["--setenv", "PYTHONHASHSEED", "0", "--setenv", "PYTHONUTF8", "1", "--remount-ro", "/"]
    return [*arguments, "--", executable, "-P", "-s"]
