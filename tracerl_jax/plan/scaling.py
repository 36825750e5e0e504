"""Weak scaling on paper: what an RL step would take on 8 to 1,024 chips with the same work for each.

Nothing but the plan of one topology is compiled. From it to other numbers of chips:

    fewer chips     fsdp shrinks with them (then data), inside one slice or island
    more chips      more slices (TPU), or more groups of GPUs of the plan's size; data grows, all else stays

    of a program             per chip
    compute, HBM             stay; those of an optimizer's update follow the shard of weights that a chip holds
    collectives along axes   of n chips: (n-1)/n of what is gathered, scattered or reduced, which stays; of what is
                             already cut up by fsdp (gradients along data), the shard
    hops                     a collective waits for one hop after the other: these grow with n
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jax.sharding import Mesh

from tracerl_jax.parallel.mesh import make_mesh
from tracerl_jax.plan.estimate import Estimate, Plan, bandwidth, fabric_group, leaves_fabric, spanned_dimensions
from tracerl_jax.plan.hlo_cost import SLICES
from tracerl_jax.plan.topology import SLICES as SLICE_SHAPES
from tracerl_jax.plan.topology import Topology, compile_devices

CHIPS = tuple(2**n for n in range(3, 11))
TERMS = ("compute", "HBM", "links", "network", "hops")
# Assumed, not published: from a chip to the next one, and from host to host over the network.
HOP_SECONDS = {"links": 1e-6, "network": 2e-5}
DECODING = ("prefill", "decode")
ENOUGH = 0.9  # of the throughput per chip on the fewest chips


@dataclass(frozen=True)
class Scaled:
    """An RL step on some number of chips: seconds by term, each if it had the chip to itself, and of all together."""

    topology: Topology
    mesh: dict[str, int]
    terms: dict[str, float]
    seconds: float  # every program as long as the slowest of compute, HBM and what is sent


def weak_scaling(plan: Plan, chips: Sequence[int] = CHIPS) -> list[Scaled]:
    """The plan's RL step on each of `chips` that its mesh can be cut or repeated to. Compiles nothing.

    Raises ConfigError where the devices of a topology cannot be described here.
    """
    return [scaled(plan, *found) for n in chips if (found := layout(plan.topology, plan.mesh, n))]


def layout(topology: Topology, mesh: dict[str, int], chips: int) -> tuple[Topology, dict[str, int]] | None:
    """Topology and mesh of `chips` chips; None where the mesh does not come out whole."""
    is_gpu = topology.chip.platform == "cuda"
    island, mesh = math.prod(topology.shape), {**mesh, "data": mesh["data"] // topology.slices}
    name = topology.chip.name
    if chips >= island:
        times, rest = divmod(chips, island)
        mesh["data"] *= times
        shape = (chips,) if is_gpu else topology.shape
        slices = 1 if is_gpu else times
    else:
        times, rest = divmod(island, chips)
        for axis in ("fsdp", "data"):
            both = math.gcd(mesh[axis], times)
            mesh[axis], times = mesh[axis] // both, times // both
        rest += times - 1
        fitting = [s for s in SLICE_SHAPES.get(len(topology.shape), ()) if math.prod(map(int, s.split("x"))) == chips]
        if is_gpu:
            fitting = [str(chips)]
        if rest or not fitting:
            return None
        shape, slices = tuple(map(int, fitting[-1].split("x"))), 1
    text = f"{name}:{'x'.join(map(str, shape))}"
    return None if rest else (Topology(f"{slices}x{text}" if slices > 1 else text, topology.chip, shape, slices), mesh)


def scaled(plan: Plan, topology: Topology, mesh: dict[str, int]) -> Scaled:
    devices = compile_devices(topology)
    there = make_mesh(**mesh, slices=topology.slices, devices=devices)
    totals, seconds = dict.fromkeys(TERMS, 0.0), 0.0
    for program in plan.programs:
        terms = _program_terms(program, plan, topology, there)
        for term, t in terms.items():
            totals[term] += program.runs * t
        sent = terms["links"] + terms["network"] + terms["hops"]
        seconds += program.runs * max(terms["compute"], terms["HBM"], sent)
    return Scaled(topology, mesh, totals, seconds)


def _program_terms(program: Estimate, plan: Plan, topology: Topology, there: Mesh) -> dict[str, float]:
    shard = weight_shards(plan.mesh) / weight_shards(there.shape)  # of the weights a chip holds, over that in the plan
    own = shard if program.name.endswith("apply") else 1.0
    terms = {"compute": own * program.compute_seconds, "HBM": own * program.memory_seconds, "links": 0.0,
             "network": 0.0, "hops": 0.0}  # fmt: skip
    if program.name in DECODING:  # what they send stays in a group of rollout.tensor chips, as large as ever
        calls, where = sum(program.cost.collective_calls.values()), "network" if program.network_seconds else "links"
        steps = plan.rollout_mesh["tensor"] - 1
        links = program.link_seconds - program.network_seconds
        return terms | {"links": links, "network": program.network_seconds, "hops": calls * steps * HOP_SECONDS[where]}
    for (kind, axes), (sent, calls) in sent_there(program, plan, topology, there.shape).items():
        where = "network" if leaves_fabric(topology, there, axes) else "links"
        terms[where] += sent / bandwidth(topology, there, kind, axes)
        terms["hops"] += calls * hops(topology, there, axes) * HOP_SECONDS[where]
    return terms


def weight_shards(mesh: dict[str, int]) -> int:
    return mesh["fsdp"] * mesh.get("expert", 1)


def sent_there(
    program: Estimate, plan: Plan, topology: Topology, mesh: dict[str, int]
) -> dict[tuple[str, str], tuple[float, float]]:
    """(bytes, calls) of a chip's collectives, by (kind, axes), on a larger or smaller mesh than the plan's."""
    here, found = plan.mesh, {}
    shard = weight_shards(here) / weight_shards(mesh)
    for (kind, axes), sent in program.cost.collective_bytes.items():
        before = _members(axes, here, plan.topology)
        if program.name == "sync":  # decoding's names for the devices: what is gathered are training's shards
            axes = "+".join(axis for axis in ("fsdp", "expert") if axis in here)
            before = weight_shards(here)
        after = _members(axes, mesh, topology)
        if before > 1 and after > 1:
            cut = shard if axes in ("data", SLICES) and program.name != "sync" else 1.0
            bytes_before, calls = found.get((kind, axes), (0.0, 0.0))
            sent = cut * sent * ring(after) / ring(before)
            found[kind, axes] = bytes_before + sent, calls + program.cost.collective_calls[kind, axes]
    if program.name.endswith("gradient"):
        new = _first_replicas(plan.topology, here, topology, mesh)
        if new:  # gradients are as large as the float32 weights, and reduced weight by weight
            reduced = 2 * ring(_members(new, mesh, topology)) * plan.resident_bytes[program.name.split()[0]] * shard
            calls = max(program.cost.collective_calls.values(), default=0.0)
            found["all-reduce", new] = reduced, calls
    return found


def _first_replicas(before: Topology, here: dict[str, int], topology: Topology, mesh: dict[str, int]) -> str | None:
    """The axis of a gradient reduction that the plan has nothing of, for want of a second replica or slice."""
    if topology.slices > 1:
        return SLICES if before.slices == 1 else None
    return "data" if mesh["data"] > 1 and here["data"] == 1 else None


def ring(n: int) -> float:
    """The share of all that a chip of a ring of n sends."""
    return (n - 1) / n


def _members(axes: str, mesh: dict[str, int], topology: Topology) -> int:
    if axes == SLICES:
        return topology.slices
    inside = {**mesh, "data": mesh["data"] // topology.slices}
    return math.prod(inside[axis] for axis in axes.split("+"))


def hops(topology: Topology, mesh: Mesh, axes: str) -> int:
    """Steps of a ring along the axes: of several slices or hosts, over those; in a torus, along each dimension."""
    if axes == SLICES:
        return topology.slices - 1
    group = fabric_group(topology, mesh, axes)
    if topology.chip.chips_per_fabric is not None:
        hosts = len({device.process_index for device in group})
        return hosts - 1 if hosts > 1 else len(group) - 1
    return sum(size // 2 if topology.is_ring(size) else size - 1 for size in spanned_dimensions(topology, group))


# As text and as data


def scaling_dicts(rows: Sequence[Scaled]) -> list[dict]:
    return [
        {"topology": row.topology.name, "chips": row.topology.chips, "mesh": row.mesh, "seconds": row.seconds,
         "efficiency": rows[0].seconds / row.seconds, "terms": row.terms}
        for row in rows
    ]  # fmt: skip


def format_scaling(plan: Plan, rows: Sequence[Scaled]) -> str:
    """The table, which term grows, and where it stops scaling."""
    if not rows:
        return f"weak scaling: the mesh of {plan.topology.name} cannot be cut or repeated to 8 to 1,024 chips"
    head = ("chips", "topology", "mesh", *(f"{term} s" for term in TERMS), "step s", "per chip")
    table = [head]
    for row in rows:
        mesh = " x ".join(f"{axis} {size}" for axis, size in row.mesh.items())
        table.append((
            f"{row.topology.chips:,}", row.topology.name, mesh, *(f"{row.terms[term]:.3g}" for term in TERMS),
            f"{row.seconds:.4g}", f"{rows[0].seconds / row.seconds:.0%}",
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
    return "\n".join([
        f"weak scaling from {plan.topology.name}, the work of a chip as in the plan; seconds of an RL step:", *lines,
        "links: inside a slice or host. network: between them. hops: "
        f"{HOP_SECONDS['links'] * 1e6:g} us and {HOP_SECONDS['network'] * 1e6:g} us each (assumed), none overlapped.",
        "step: every program as long as the slowest of compute, HBM and all that is sent.", *_verdict(rows),
    ])  # fmt: skip


def _verdict(rows: Sequence[Scaled]) -> list[str]:
    first, last = rows[0], rows[-1]
    grown = {term: last.terms[term] - first.terms[term] for term in TERMS}
    most = max(grown, key=grown.get)
    lines = [f"grows most from {first.topology.chips:,} to {last.topology.chips:,} chips: {most}, "
             f"{first.terms[most]:.3g} s to {last.terms[most]:.3g} s"]  # fmt: skip
    short = next((row for row in rows if first.seconds / row.seconds < ENOUGH), None)
    if short is None:
        return [*lines, f"stops scaling: not up to {last.topology.chips:,} chips, "
                        f"{first.seconds / last.seconds:.0%} of the throughput per chip"]  # fmt: skip
    return [*lines, f"stops scaling: at {short.topology.chips:,} chips, where throughput per chip falls below "
                    f"{ENOUGH:.0%} of that on {first.topology.chips:,}"]  # fmt: skip
