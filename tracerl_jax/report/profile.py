"""A profile of some steps of a run, by `--profile FIRST:COUNT`: what hosts and devices did when, to the microsecond."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import jax

from tracerl_jax.parallel.distributed import is_job, process_index

log = logging.getLogger(__name__)


class Profiler:
    """Traces the steps of a range into a folder, in every process into one of its own.

        profiler.at(step, pending)    before each step; `pending`: what the device still works on
        profiler.close()

    A trace that fails is a warning: training goes on.
    """

    def __init__(self, steps: range, folder: Path):
        # JAX names its files by host and second, which several processes of a machine may share.
        self.folder = folder / f"process{process_index()}" if is_job() else folder
        self._steps = steps
        self._traced: list[int] = []

    def at(self, step: int, pending: Any = ()) -> None:
        if step not in self._steps:
            self._stop(pending)
            return
        if not self._traced:
            jax.block_until_ready(pending)  # else the trace would begin with the step before
            if not self._try(partial(jax.profiler.start_trace, profiler_options=_options()), self.folder):
                self._steps = range(0)
                return
        self._traced.append(step)

    def close(self) -> None:
        """After the last step."""
        self._stop(())
        if self._steps:
            log.warning("report.profile: none of the steps %d to %d was run", self._steps[0], self._steps[-1])

    def _stop(self, pending: Any) -> None:
        if not self._traced:
            return
        jax.block_until_ready(pending)
        traced, self._traced, self._steps = self._traced, [], range(0)
        if self._try(jax.profiler.stop_trace):
            log.info(
                "profile of steps %d to %d: %s. To look at it: pip install xprof; xprof --logdir=%s",
                traced[0], traced[-1], self.folder, self.folder,
            )  # fmt: skip

    def _try(self, call, *args) -> bool:
        try:
            call(*args)
        except (RuntimeError, OSError) as error:
            log.warning("no profile (%s)", error)
            return False
        return True


def _options() -> jax.profiler.ProfileOptions:
    """Without every Python call, which slows steps down and fills the trace; the timer's phases are in it."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    return options
