"""From compiled programs to memory, roofline time and verdict."""

import logging
import math
import re
import time
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import Mesh

from tracerl_jax.plan.chips import GIB
from tracerl_jax.plan.hlo import parse
from tracerl_jax.plan.hlo_cost import Cost, program_cost
from tracerl_jax.plan.programs import PlannedProgram, PlannedRun
from tracerl_jax.plan.topology import Topology, usable_hbm

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Estimate:
    """One program on one chip. Bytes are per chip; seconds are lower bounds, everything else overlapped."""

    name: str
    runs: float  # per RL step
    compile_seconds: float
    argument_bytes: float
    temp_bytes: float
    peak_bytes: float  # of the chip while it runs: everything resident, its other arguments, results, temporaries
    overflow: str | None = None  # what the compiler said when it could not place the program; no cost is known then
    cost: Cost = field(default_factory=Cost)
    compute_seconds: float = 0.0
    memory_seconds: float = 0.0
    link_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        return max(self.compute_seconds, self.memory_seconds, self.link_seconds)

    @property
    def bound(self) -> str:
        times = {"compute": self.compute_seconds, "HBM": self.memory_seconds, "links": self.link_seconds}
        return max(times, key=times.get)


@dataclass(frozen=True)
class Plan:
    topology: Topology
    mesh: dict[str, int]
    limit_bytes: float  # of HBM that a program may have
    resident_bytes: dict[str, float]
    programs: list[Estimate]
    response_tokens: float  # of an RL step

    @property
    def step_seconds(self) -> float:
        return sum(p.runs * p.seconds for p in self.programs)

    @property
    def peak_bytes(self) -> float:
        return max(p.peak_bytes for p in self.programs)

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.limit_bytes and not any(p.overflow for p in self.programs)


def chip_bytes(tree: Any) -> float:
    """Bytes that arrays of these shapes and shardings take on one chip."""
    return sum(
        float(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)))
        for leaf in jax.tree.leaves(tree)
    )


def estimate_run(run: PlannedRun, topology: Topology, mesh: Mesh) -> Plan:
    """Compile every program of a run and estimate it. Takes seconds to minutes per program."""
    resident = {name: chip_bytes(tree) for name, tree in run.resident.items()}
    total = sum(resident.values())
    estimates = []
    for program in run.programs:
        log.info("compiling %s for %s", program.name, topology.name)
        estimates.append(estimate_program(program, topology, total))
    return Plan(topology, dict(mesh.shape), usable_hbm(topology.chip), resident, estimates, run.tokens_per_step)


# CUB picks how to sort by asking the device, which is not there.
_OPTIONS = {"tpu": {}, "cuda": {"xla_gpu_enable_cub_radix_sort": False}}


def estimate_program(program: PlannedProgram, topology: Topology, resident_bytes: float) -> Estimate:
    start, mesh = time.perf_counter(), program.mesh
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = program.traced.lower(lowering_platforms=(topology.chip.platform,))
        try:
            compiled = lowered.compile(_OPTIONS[topology.chip.platform])
        except jax.errors.JaxRuntimeError as error:
            used = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", str(error))
            if not used:
                raise
            needed = float(used[1]) * GIB * {"K": 2**-20, "M": 2**-10, "G": 1, "T": 2**10}[used[2]]
            needed += resident_bytes - chip_bytes(program.resident)
            return Estimate(
                program.name, program.runs, time.perf_counter() - start, 0.0, 0.0, needed, str(error).splitlines()[0]
            )
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    own = memory.argument_size_in_bytes - chip_bytes(program.resident)
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    cost = program_cost(
        parse(compiled.as_text()), mesh.shape, loops=program.loops, kernel_cost=program.kernel_cost
    )
    chip = topology.chip
    network = sum(
        sent / axis_bandwidth(topology, mesh, axes) for (_, axes), sent in cost.collective_bytes.items()
    )
    return Estimate(
        program.name, program.runs, seconds, memory.argument_size_in_bytes, memory.temp_size_in_bytes,
        resident_bytes + own + results + memory.temp_size_in_bytes, None, cost,
        cost.flops / chip.flops, cost.hbm_bytes / chip.hbm_bandwidth, network,
    )  # fmt: skip


def axis_bandwidth(topology: Topology, mesh: Mesh, axes: str) -> float:
    """Bytes per second that a chip sends along mesh axes: slower where they leave the host of a GPU."""
    chip = topology.chip
    if chip.chips_per_fabric is None:
        return chip.link_bandwidth
    span = 1  # devices are numbered with the last axis fastest, and hosts hold consecutive ones
    for name, size in reversed(mesh.shape.items()):
        span *= size
        if name == axes.split("+")[0]:
            break
    return chip.link_bandwidth if span <= chip.chips_per_fabric else chip.host_bandwidth
