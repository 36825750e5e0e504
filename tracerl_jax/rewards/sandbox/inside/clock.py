"""The clock of a program under test: what it computes, and what it lets others wait for.

Time in which it could run but the machine was busy with something else counts for neither, so a verdict does not
depend on the load.
"""

import os
import time


class Overtime(Exception):
    pass


class Clock:
    """Runs while `running`: the CPU time of process `pid` always counts, waiting only between `start` and `stop`.

    `schedstat` is an open /proc/PID/schedstat, or None where there is none: then waiting for a CPU counts as waiting.
    """

    TICK = 0.005  # seconds, at least, between two looks

    def __init__(self, pid: int, schedstat: int | None, cpu_seconds: float, wait_seconds: float):
        self._cpu_clock = (~pid << 3) | 2  # CPUCLOCK_SCHED of the whole process, as clock_getcpuclockid makes it
        self._schedstat = schedstat
        self.cpu_seconds, self.wait_seconds = cpu_seconds, wait_seconds
        self._waited = self._last_cpu = 0.0
        self._started: tuple[float, float] | None = None  # (time, CPU time and queueing) at `start`

    def start(self) -> None:
        self._started = time.monotonic(), self._busy()

    def stop(self) -> None:
        self._waited, self._started = self._waiting(), None

    def left(self) -> float:
        """Seconds until it is worth looking again. Raises `Overtime`."""
        cpu, waiting = self._cpu(), self._waiting()
        if cpu > self.cpu_seconds:
            raise Overtime(f"more than {self.cpu_seconds:g} s of CPU time")
        if waiting > self.wait_seconds:
            raise Overtime(f"more than {self.wait_seconds:g} s of waiting")
        return max(self.TICK, min(self.cpu_seconds - cpu, self.wait_seconds - waiting))

    def _cpu(self) -> float:
        try:
            self._last_cpu = time.clock_gettime(self._cpu_clock)
        except OSError:
            pass  # it has ended
        return self._last_cpu

    def _busy(self) -> float:
        queued = 0.0
        if self._schedstat is not None:
            try:
                queued = int(os.pread(self._schedstat, 100, 0).split()[1]) / 1e9
            except (OSError, IndexError, ValueError):
                pass
        return self._cpu() + queued

    def _waiting(self) -> float:
        if self._started is None:
            return self._waited
        since, busy = self._started
        return self._waited + max(0.0, time.monotonic() - since - (self._busy() - busy))
