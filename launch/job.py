"""How a command joins a job of several processes and leaves it, whatever happens."""

import logging
import re
import sys
import traceback
from collections.abc import Callable

import jax

from tracerl_jax.parallel import distributed, watchdog
from tracerl_jax.training.interrupt import Interrupted

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


def in_job(command: Callable[[], tuple[int, BaseException | None]]) -> int:
    """Runs a command, which gives its exit status and the error it is for, and returns the status.

    In a job, returns when all processes have ended theirs. A process that fails takes the others with it, see
    `watchdog`.
    """
    try:
        status, error = command()
    except Exception as error:
        if not distributed.is_job():
            raise
        traceback.print_exc()
        sys.stderr.flush()
        if _is_consequence(error):
            watchdog.await_verdict()
        distributed.give_up(STATUS_FAILED, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    if error is None or isinstance(error, Interrupted):  # all processes come here
        distributed.end()
    elif distributed.is_job():
        distributed.give_up(status, str(error) or type(error).__name__)
    return status


def _is_consequence(error: BaseException | None) -> bool:
    """Whether the error may come from a collective that another process has left: XLA's errors begin with a status such
    as "UNAVAILABLE: ", and are of several types."""
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError) or re.match("[A-Z_]{5,}: ", str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
