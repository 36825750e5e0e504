"""What a program may read: Python, the system's libraries, and of the installed packages only those it may import.

Not the others: a package may hold a data set, and with it what the program should find out.
"""

import glob
import os
import sys
import sysconfig
from dataclasses import dataclass


@dataclass(frozen=True)
class Runtime:
    paths: list[str]  # folders, none below another, and links
    hidden: list[str]  # folders of packages that are below them
    shown: list[str]  # folders and files of packages
    listed: list[str]  # folders of packages, which imports look through

    def readable(self) -> list[str]:
        """The same as a list of what is allowed: `paths` without `hidden`, and `shown`."""
        return [part for path in self.paths for part in self._without_hidden(path)] + self.shown

    def _without_hidden(self, path: str) -> list[str]:
        if path in self.hidden or os.path.islink(path):  # what a link leads to is allowed by itself, or not
            return []
        if not any(folder.startswith(f"{path}/") for folder in self.hidden):
            return [path]
        return [part for name in os.listdir(path) for part in self._without_hidden(f"{path}/{name}")]


def find_runtime(site_folders: list[str], packages: list[str]) -> Runtime:
    """Of this Python; `packages` are names, looked for in `site_folders`."""
    folders = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), os.path.dirname(os.__file__)]
    folders += [f"{prefix}/{name}" for prefix in (sys.base_exec_prefix, "/usr", "") for name in ("lib", "lib64")]
    real = {os.path.realpath(folder) for folder in folders if os.path.isdir(folder)}
    tops = sorted(path for path in real if not any(path.startswith(f"{other}/") for other in real))
    links = sorted({folder for folder in folders if os.path.islink(folder)} - real)
    kinds = ("site-packages", "dist-packages")
    patterns = [f"{top}/{below}{kind}" for top in tops for below in ("", "python3*/") for kind in kinds]
    hidden = {path for pattern in patterns for path in glob.glob(pattern)}
    names = [f"{package}{ending}" for package in packages for ending in ("", ".libs", ".py")]
    shown = [f"{folder}/{name}" for folder in site_folders for name in names]
    return Runtime(tops + links, sorted(hidden), [path for path in shown if os.path.exists(path)], site_folders)
