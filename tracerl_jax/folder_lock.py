"""A folder that one process at a time writes, also when another one was killed."""

import errno
import fcntl
import os
import socket
import time
from pathlib import Path

from tracerl_jax.errors import UserError

LOCK = "lock"  # file in the folder

LEASE_SECONDS = 120.0  # a file server may take so long to let go of what a lost host had locked

_held: set[Path] = set()  # lock files of this process


class FolderLock:
    """Holds `folder`, which exists, until `release`. Raises UserError when another process holds it; in a job, when it
    still does after `LEASE_SECONDS`.

    `what` and `remedy` are for the message: "WHAT FOLDER is in use by process 7: wait for it, stop it, or REMEDY".
    """

    def __init__(self, folder: str | os.PathLike, what: str, remedy: str):
        self._path = Path(folder) / LOCK
        # POSIX locks, unlike flock, are not inherited by forked workers: one that outlives a killed run blocks nothing.
        self._file = open(self._path, "a+")  # stays open as long as the lock is held
        if not _try_lock(self._file) and not _lock_in_time(self._file):
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise UserError(f"{what} {folder} is in use by {holder}: wait for it, stop it, or {remedy}")
        _held.add(self._path.resolve())
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    @property
    def released(self) -> bool:
        return self._file.closed

    def release(self) -> None:
        self._file.close()
        _held.discard(self._path.resolve())


def is_locked(folder: str | os.PathLike) -> bool:
    """Whether a process, maybe this one, is writing `folder` now."""
    path = Path(folder) / LOCK
    if path.resolve() in _held:  # closing any handle of the file would release this process's own lock
        return True
    try:
        with open(path, "r+") as file:
            return not _try_lock(file)
    except OSError:  # no lock file, or a folder that may only be read
        return False


def _lock_in_time(file) -> bool:
    """For a job, which may have lost the host that holds it."""
    from tracerl_jax.parallel.distributed import is_job  # jax

    deadline = time.monotonic() + LEASE_SECONDS
    while is_job() and time.monotonic() < deadline:
        time.sleep(1.0)
        if _try_lock(file):
            return True
    return False


def _try_lock(file) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)  # some network file systems have no locks at all
    return True
