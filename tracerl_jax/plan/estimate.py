"""From compiled programs to memory, roofline time and verdict."""

import logging
import math
import re
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import jax
from jax.sharding import Mesh

from tracerl_jax.plan.decoding import Forwards
from tracerl_jax.plan.hlo import parse
from tracerl_jax.plan.hlo_cost import Cost, program_cost
from tracerl_jax.plan.programs import PlannedProgram, PlannedRun
from tracerl_jax.plan.replays import StepReplay
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
    # What the compiler said when it could not place the program: peak_bytes is then the least it needs, with no cost.
    overflow: str | None = None
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


PHASES = ("rollout", "replay", "policy", "value", "reward")


@dataclass(frozen=True)
class ShrinkCost:
    """An RL step with one `rl.shrink`, all chips together. None: a program could not be compiled."""

    replay: StepReplay
    flops: dict[str, float] | None  # by phase, what the programs execute: padding and recomputation included
    seconds: float | None  # at least


@dataclass(frozen=True)
class Plan:
    topology: Topology
    mesh: dict[str, int]
    rollout_mesh: dict[str, int]  # the same chips as decoding sees them
    limit_bytes: float  # of HBM that a program may have
    resident_bytes: dict[str, float]
    programs: list[Estimate]
    response_tokens: float  # of an RL step
    forwards: Forwards  # of a response
    shrinks: list["ShrinkCost"]

    @property
    def step_seconds(self) -> float:
        """Of the programs that could be compiled."""
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
    if run.beside:
        estimates = run_beside(estimates, run.beside, total)
    meshes = (dict(mesh.shape), dict(run.rollout_mesh.shape))
    shrinks = [shrink_cost(estimates, replay, topology.chips) for replay in run.replays]
    return Plan(
        topology, *meshes, usable_hbm(topology.chip), resident, estimates, run.tokens_per_step, run.forwards, shrinks
    )


def shrink_cost(estimates: list[Estimate], replay: StepReplay, chips: int) -> ShrinkCost:
    """From the programs of a run with another `rl.shrink`: rows are as long, only more or fewer. (That the head sees
    more targets in a row of merged states is left out.)"""
    if any(p.overflow for p in estimates):
        return ShrinkCost(replay, None, None)
    runs = {p.name: replay.runs.get(p.name, p.runs) for p in estimates}
    flops = dict.fromkeys(PHASES, 0.0)
    for p in estimates:
        flops[phase_of(p.name)] += chips * runs[p.name] * p.cost.flops
    return ShrinkCost(replay, flops, sum(runs[p.name] * p.seconds for p in estimates))


def phase_of(program: str) -> str:
    if program in ("sync", "prefill", "decode"):
        return "rollout"
    return "value" if program.startswith("value") else program.split()[0]


def run_beside(estimates: list[Estimate], names: tuple[str, ...], resident_bytes: float) -> list[Estimate]:
    """The same programs, those of these names running while others do: what each side needs besides all that is
    resident is there together with the most that the other one needs. `sync` runs alone."""

    def most(beside: bool) -> float:
        needs = [p.peak_bytes - resident_bytes for p in estimates if p.name != "sync" and (p.name in names) == beside]
        return max(needs, default=0.0)

    return [
        p if p.name == "sync" else replace(p, peak_bytes=p.peak_bytes + most(p.name not in names)) for p in estimates
    ]


# CUB picks how to sort by asking the device, which is not there.
COMPILER_OPTIONS = {"tpu": {}, "cuda": {"xla_gpu_enable_cub_radix_sort": False}}


def estimate_program(program: PlannedProgram, topology: Topology, resident_bytes: float) -> Estimate:
    """Compile a program for a topology. `resident_bytes`: of all that stays on a chip, the program's own included."""
    start, mesh = time.perf_counter(), program.mesh
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = program.traced.lower(lowering_platforms=(topology.chip.platform,))
        try:
            compiled = lowered.compile(COMPILER_OPTIONS[topology.chip.platform])
        except jax.errors.JaxRuntimeError as error:
            seconds = time.perf_counter() - start
            needed = overflow_bytes(str(error), resident_bytes, chip_bytes(program.resident))
            if needed is None:
                raise
            return Estimate(program.name, program.runs, seconds, 0.0, 0.0, needed, str(error).splitlines()[0])
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    own = memory.argument_size_in_bytes - chip_bytes(program.resident)
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    cost = program_cost(
        parse(compiled.as_text()), mesh.shape, loops=program.loops, kernel_cost=program.kernel_cost
    )
    chip = topology.chip
    links = sum(
        sent / bandwidth(topology, mesh, kind, axes) for (kind, axes), sent in cost.collective_bytes.items()
    )
    return Estimate(
        program.name, program.runs, seconds, memory.argument_size_in_bytes, memory.temp_size_in_bytes,
        resident_bytes + own + results + memory.temp_size_in_bytes, None, cost,
        cost.flops / chip.flops, cost.hbm_bytes / chip.hbm_bandwidth, links,
    )  # fmt: skip


_UNITS = {"": 2**0, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def overflow_bytes(message: str, resident: float, own: float) -> float | None:
    """The least a chip needs for a program, from the compiler's complaint; None if it complains of something else.

    resident: bytes that stay on the chip; own: those of them that are arguments of the program.
    """
    # The whole program, arguments included; or, found out earlier, what it needs besides them.
    whole = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message)
    besides = re.search(r"memory required for HLO temporaries \(([\d.]+)([KMGT]?)\)", message)
    if not (found := whole or besides):
        return None
    needed = float(found[1]) * _UNITS[found[2]]
    return needed + resident - (own if whole else 0.0)


def bandwidth(topology: Topology, mesh: Mesh, kind: str, axes: str) -> float:
    """Bytes per second that a chip can send in a collective of this kind along "+"-joined mesh axes.

    GPU: over NVLink, or out of the host, where its group's GPUs in a host share their network cards. TPU: over the
    links along every dimension of the torus that the group spans, both ways where the dimension is a ring; a permute
    goes to one neighbour and back from another.
    """
    chip = topology.chip
    index = tuple(slice(None) if axis in axes.split("+") else 0 for axis in mesh.axis_names)
    group = mesh.devices[index].ravel()
    if chip.chips_per_fabric is not None:
        hosts = Counter(device.process_index for device in group)
        if len(hosts) == 1:
            return chip.link_bandwidth
        return min(chip.link_bandwidth, chip.host_bandwidth * max(hosts.values()))
    places = [{device.coords[n] for device in group} for n in range(len(topology.shape))]
    spanned = [size for size, found in zip(topology.shape, places, strict=True) if len(found) > 1]
    links = sum(2 if topology.is_ring(size) else 1 for size in spanned)
    return chip.link_bandwidth * (min(2, links) if kind == "collective-permute" else links)
