"""Bubblewrap instead of our own namespaces: some systems let only this program make them."""

import os
import sys
from collections.abc import Sequence

from tracerl_jax.rewards.sandbox.inside.isolation import SCRATCH, SCRATCH_BYTES
from tracerl_jax.rewards.sandbox.inside.runtime import find_runtime

HOLDS = ("user", "mount", "pid", "network", "ipc", "uts")


def command(bwrap: str, site_folders: Sequence[str], packages: Sequence[str]) -> list[str]:
    """A Python in new namespaces, for one program: what it leaves behind ends with it."""
    executable = os.path.realpath(sys.executable)
    runtime = find_runtime([os.path.realpath(folder) for folder in site_folders], list(packages))
    arguments = [bwrap, "--unshare-all", "--die-with-parent", "--new-session", "--dev", "/dev"]
    arguments += ["--size", str(SCRATCH_BYTES), "--tmpfs", SCRATCH]
    for path in runtime.paths:
        arguments += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    for path in runtime.hidden:
        arguments += ["--tmpfs", path]
    for path in (*runtime.shown, executable):
        arguments += ["--ro-bind", path, path]
    for path in ("/", *runtime.hidden):
        arguments += ["--remount-ro", path]
    arguments += ["--clearenv", "--setenv", "PYTHONHASHSEED", "0", "--setenv", "PYTHONUTF8", "1"]
    return [*arguments, "--", executable, "-P", "-s"]
