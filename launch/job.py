"""How a command joins a job of several processes and leaves it, whatever happens."""

import logging
import sys
import traceback
from collections.abc import Callable

import jax

from tracerl_jax.parallel import distributed, watchdog

STATUS_FAILED = 1


def join() -> None:
    """Joins the job that the environment describes, if any. Only its process 0 reports progress; the others warn."""
    distributed.start()
    if distributed.is_job():
        index = distributed.process_index()
        for handler in logging.getLogger().handlers:
            handler.setFormatter(logging.Formatter(f"%(asctime)s [process {index}] %(message)s", "%H:%M:%S"))
        if index:
            logging.getLogger("tracerl_jax").setLevel(logging.WARNING)


def in_job(command: Callable[[], int]) -> int:
    """Runs a command and returns its exit status. In a job, returns when all processes have ended theirs; a process
    that ends otherwise than the others takes them with it, see `watchdog`."""
    try:
        status = command()
    except Exception as error:
        if not distributed.is_job():
            raise
        traceback.print_exc()
        sys.stderr.flush()
        if _is_consequence(error):
            watchdog.await_verdict()
        distributed.give_up(STATUS_FAILED, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    if not distributed.is_job():
        return status
    if status in (0, watchdog.STATUS_INTERRUPTED):
        try:
            distributed.end()
        except jax.errors.JaxRuntimeError:  # not all of them were interrupted
            distributed.give_up(status or watchdog.STATUS_PEER_LOST, "not all processes came to the end")
        return status
    distributed.give_up(status, "ended by an error, see its message")


def _is_consequence(error: BaseException | None) -> bool:
    """Whether the error may come from a collective that another process has left."""
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError):
            return True
        error = error.__cause__ or error.__context__
    return False
