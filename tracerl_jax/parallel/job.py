"""How a command joins a job of several processes and leaves it, whatever happens. Imports nothing heavy by itself."""

import logging
import re
import sys
import time
import traceback
from collections.abc import Callable

from tracerl_jax.errors import UserError, in_one_line

STATUS_FAILED = 1
LEAD_SECONDS = 40.0
_STATUSES = "(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): "

_joined = False


def join() -> None:
    """Joins the job that the environment describes, if any. Only its process 0 reports progress; the others warn."""
    global _joined
    from tracerl_jax.parallel import distributed

    distributed.start()
    _joined = distributed.is_job()
    if _joined:
        index = distributed.process_index()
        for handler in logging.getLogger().handlers:
            handler.setFormatter(logging.Formatter(f"%(asctime)s [process {index}] %(message)s", "%H:%M:%S"))
        if index:
            logging.getLogger("tracerl_jax").setLevel(logging.WARNING)


def in_job(command: Callable[[], tuple[int, BaseException | None]]) -> int:
    """Runs a command, which gives its exit status and the error it is for, and returns the status.

    In a job, returns when all processes have ended theirs. A process that fails takes the others with it, see
    `parallel/watchdog.py`.
    """
    try:
        status, error = command()
    except Exception as failure:
        if _joined:
            traceback.print_exc()
            sys.stderr.flush()
            _fail(failure)
        raise
    if _joined:
        _leave(status, error)
    return status


def _leave(status: int, error: BaseException | None) -> None:
    from tracerl_jax.parallel import distributed
    from tracerl_jax.training.interrupt import Interrupted

    if error is None or isinstance(error, Interrupted):  # all processes come here
        distributed.end()
    else:
        if isinstance(error, UserError) and not distributed.is_lead():
            # It may be everybody's. Then the lead, with whose end ours comes, has a summary and writers to finish.
            time.sleep(LEAD_SECONDS)
        distributed.give_up(status, str(error) or type(error).__name__)


def _fail(error: Exception) -> None:
    from tracerl_jax.parallel import distributed, watchdog

    status = STATUS_FAILED
    if is_consequence(error):
        watchdog.await_verdict()
        status = watchdog.STATUS_PEER_LOST  # nobody is dead: a connection broke
    distributed.give_up(status, in_one_line(error))


def is_consequence(error: BaseException | None) -> bool:
    """Whether the error may come from a collective that another process has left: XLA's errors begin with a status and
    are of several types."""
    while error is not None:
        if re.match(_STATUSES, str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
