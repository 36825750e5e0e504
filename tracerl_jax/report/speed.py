"""How fast the chips and the hosts are: seconds, tokens and model FLOPs per chip, memory in use, who is late."""

import logging
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from tracerl_jax.parallel import peers
from tracerl_jax.parallel.distributed import is_lead
from tracerl_jax.plan.chips import chip_of
from tracerl_jax.report.flops import Work
from tracerl_jax.report.follower import Follower
from tracerl_jax.report.hosts import LOCAL, Gather, Stragglers, by_host, slowest
from tracerl_jax.report.run_dir import RunDir
from tracerl_jax.units import GIB

log = logging.getLogger(__name__)

MEMORY = {"chips/hbm_gib": "bytes_in_use", "chips/hbm_peak_gib": "peak_bytes_in_use"}


class Speed:
    """The metrics of a loop's steps that measure its processes and chips (docs/metrics.md#time).

    Args:
      folder: of the run; where several processes take part, hosts.jsonl is written there.
      phase: of the rows, "sft" or "rl".
      phases: what the loop's timer knows, "total" not among them; the same on every process.
      chips: that the loop's programs run on, on all processes together.
      product: the phase whose tokens the whole step is for; None: the work of "total" is given.
    """

    def __init__(
        self, folder: RunDir | Follower, phase: str, *, phases: Sequence[str], chips: int,
        product: str | None = None, gather: Gather = peers.gather,
    ):  # fmt: skip
        self.folder, self.phase, self.chips, self.product = folder, phase, chips, product
        self.gather = gather
        chip = chip_of(jax.local_devices()[0].device_kind)
        self.peak = None if chip is None else chip.flops
        self.stragglers = Stragglers()
        every = (*phases, "total")
        self.names = [f"{kind}/{name}" for kind in ("seconds", "tokens", "flops", "working") for name in every]
        self.names += MEMORY

    def row(self, step: int, seconds: Mapping[str, float], work: Mapping[str, Work]) -> dict[str, float]:
        """Metrics of a step from what this process measured, the same on every process.

        seconds: `PhaseTimer.seconds()`; the metric is that of the slowest process.
        work: by phase, this process's own part.
        """
        if self.product in work:
            every = [done.flops for done in work.values()]
            work = {**work, "total": Work(work[self.product].tokens, None if None in every else sum(every))}
        mine = dict(seconds) | device_memory(jax.local_devices())
        for phase, done in work.items():
            mine[f"tokens/{phase}"] = done.tokens
            mine[f"working/{phase}"] = seconds[f"seconds/{phase}"] if done.seconds is None else done.seconds
            if done.flops is not None:
                mine[f"flops/{phase}"] = done.flops
        table = by_host(mine, self.names, self.gather)
        processes = len(table["seconds/total"])
        slow = {
            name: float(np.nanmax(each))
            for name, each in table.items()
            if name.startswith("seconds/") or name in MEMORY
        }
        return slow | chip_metrics(table, self.chips, self.peak) | self._host_metrics(step, table, processes)

    def _host_metrics(self, step: int, table: Mapping[str, np.ndarray], processes: int) -> dict[str, float]:
        if processes == 1:
            return {}
        named = {name.partition("/")[2]: each for name, each in table.items() if name.startswith("seconds/")}
        local = {name: named[name] for name in LOCAL if name in named}
        warnings = self.stragglers.look(local, float(np.nanmax(named["total"])))
        each = {name: [float(value) for value in values] for name, values in named.items()}
        self.folder.append_hosts([{"step": step, "phase": self.phase, "seconds": each}])
        if is_lead():
            for warning in warnings:
                log.warning("%s step %d: %s", self.phase, step, warning)
        metrics = {}
        for name, values in local.items():
            index, ratio, _ = slowest(values)
            metrics |= {f"hosts/{name}/slowest": float(index), f"hosts/{name}/ratio": ratio}
        return metrics


def chip_metrics(table: Mapping[str, np.ndarray], chips: int, peak: float | None) -> dict[str, float]:
    """Rates per chip of every phase with work out of a table of all processes' tokens, FLOPs and working seconds.

    The work is added up over processes; they work side by side, so the seconds are those of the slowest. `peak`: FLOP/s
    of a chip; None: the chip is not known, and there is no utilisation.
    """
    metrics = {}
    for phase in [name.removeprefix("working/") for name in table if name.startswith("working/")]:
        seconds = chips * float(np.nanmax(table[f"working/{phase}"]))
        if not seconds:
            continue
        metrics[f"chips/{phase}/tokens_per_second"] = float(np.nansum(table[f"tokens/{phase}"])) / seconds
        flops = float(np.nansum(table.get(f"flops/{phase}", math.nan))) / seconds
        if flops:
            metrics[f"chips/{phase}/flops_per_second"] = flops
            metrics |= {} if peak is None else {f"chips/{phase}/mfu": flops / peak}
    return metrics


def device_memory(devices: Sequence[jax.Device]) -> dict[str, float]:
    """GiB in use now, and the most there ever were, of the fullest device; {} where devices do not say (CPU)."""
    every = [device.memory_stats() or {} for device in devices]
    return {
        name: max(stats.get(key, 0) for stats in every) / GIB
        for name, key in MEMORY.items()
        if any(key in stats for stats in every)
    }
