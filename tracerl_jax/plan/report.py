"""A plan as text for people and as a dict for programs, and what to change when it does not fit."""

from collections import Counter
from typing import Any

from tracerl_jax.config import RunConfig
from tracerl_jax.plan.chips import GIB
from tracerl_jax.plan.estimate import Estimate, Plan
from tracerl_jax.plan.workload import Workload


def plan_dict(plan: Plan) -> dict[str, Any]:
    """Everything in base units: bytes and FLOPs per chip, seconds."""
    return {
        "topology": plan.topology.name,
        "chips": plan.topology.chips,
        "mesh": plan.mesh,
        "fits": plan.fits,
        "hbm_bytes": plan.limit_bytes,
        "peak_bytes": plan.peak_bytes,
        "resident_bytes": plan.resident_bytes,
        "step_seconds": plan.step_seconds,
        "response_tokens": plan.response_tokens,
        "programs": [_program_dict(p) for p in plan.programs],
    }


def _program_dict(p: Estimate) -> dict[str, Any]:
    return {
        "name": p.name,
        "runs_per_step": p.runs,
        "argument_bytes": p.argument_bytes,
        "temp_bytes": p.temp_bytes,
        "peak_bytes": p.peak_bytes,
        "overflow": p.overflow,
        "flops": p.cost.flops,
        "hbm_traffic_bytes": p.cost.hbm_bytes,
        "collective_bytes": {f"{kind} over {axes}": sent for (kind, axes), sent in p.cost.collective_bytes.items()},
        "kernels": dict(p.cost.kernels),
        "seconds": p.seconds,
        "compute_seconds": p.compute_seconds,
        "hbm_seconds": p.memory_seconds,
        "link_seconds": p.link_seconds,
        "bound": p.bound if not p.overflow else None,
        "compile_seconds": p.compile_seconds,
        "not_counted": sorted(p.cost.unknown_kernels | p.cost.unknown_loops),
    }


def format_plan(plan: Plan, config: RunConfig, workload: Workload) -> str:
    """The table, the memory that stays, the step's time, and the verdict."""
    shape = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    lines = [
        f"{config.name} on {plan.topology.name}: {plan.topology.chips} chips, mesh {shape}",
        f"assumed: prompts of {workload.prompt_tokens} and responses of {workload.response_tokens} tokens, "
        f"{workload.tokens_per_step:g} tokens per denoise step, {workload.kept_fraction:.0%} of the responses kept",
        "",
        "stays on every chip: " + ", ".join(f"{name} {_gib(size)}" for name, size in plan.resident_bytes.items()),
        "",
    ]
    lines += _columns([_HEADINGS, *(_row(p) for p in plan.programs)])
    lines += [
        "",
        "GiB per chip: the program's arguments and temporaries, and the peak of all that is there while it runs",
        "per run and chip: FLOPs and HBM traffic, and milliseconds of each resource at its peak rate",
    ]
    lines += _collectives(plan)
    missing = [name for p in plan.programs for name in p.cost.unknown_kernels | p.cost.unknown_loops]
    if missing:
        lines += ["", f"counted too low: {len(missing)} kernels and loops of unknown length (--json names them)"]
    lines += ["", *_verdict(plan)]
    return "\n".join(lines)


_HEADINGS = ("program", "runs", "args", "temp", "peak", "TFLOP", "HBM GB", "compute", "HBM", "links", "bound by",
             "s/step", "compiled")  # fmt: skip


def _row(p: Estimate) -> tuple[str, ...]:
    if p.overflow:
        peak = _number(p.peak_bytes / GIB)
        return (p.name, f"{p.runs:.0f}", "-", "-", peak, *["-"] * 7, f"{p.compile_seconds:.0f} s")
    return (
        p.name, f"{p.runs:.0f}", *(_number(size / GIB) for size in (p.argument_bytes, p.temp_bytes, p.peak_bytes)),
        _number(p.cost.flops / 1e12), _number(p.cost.hbm_bytes / 1e9),
        *(_number(t * 1e3) for t in (p.compute_seconds, p.memory_seconds, p.link_seconds)),
        p.bound, _number(p.runs * p.seconds), f"{p.compile_seconds:.0f} s",
    )  # fmt: skip


def _number(x: float) -> str:
    """Three digits, and no more than two behind the point."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows]  # fmt: skip


def _collectives(plan: Plan) -> list[str]:
    total: Counter = Counter()
    for p in plan.programs:
        for key, sent in p.cost.collective_bytes.items():
            total[key] += p.runs * sent
    if not total:
        return []
    shown = [f"{kind} over {axes} {sent / 1e9:.4g} GB" for (kind, axes), sent in total.most_common()]
    return ["", f"sent by a chip per RL step: {', '.join(shown)}"]


def _verdict(plan: Plan) -> list[str]:
    peak = max(plan.programs, key=lambda p: p.peak_bytes)
    share = f"{_gib(peak.peak_bytes)} of {_gib(plan.limit_bytes)} ({peak.name})"
    if not plan.fits:
        return [f"DOES NOT FIT: {share}. Turn one of these:", *(f"  {knob}" for knob in knobs(plan))]
    rate = plan.response_tokens / plan.step_seconds
    return [
        f"fits: {share}",
        f"an RL step takes at least {_seconds(plan.step_seconds)}: {rate:,.0f} response tokens/s, "
        f"{rate / plan.topology.chips:,.0f} per chip",
    ]


ROLLOUT = ("sync", "prefill", "decode")


def knobs(plan: Plan) -> list[str]:
    """Config keys that lower the memory of the programs that do not fit, the strongest first."""
    too_large = [p.name for p in plan.programs if p.peak_bytes > plan.limit_bytes or p.overflow]
    found = []
    if sum(plan.resident_bytes.values()) > 0.8 * plan.limit_bytes:
        found.append(f"weights and optimizers alone take {_gib(sum(plan.resident_bytes.values()))}: more chips, with a "
                     "larger mesh.fsdp")
        if "value" in plan.resident_bytes:
            found.append("value.shared_trunk=true: a head on the policy's features instead of a second model")
        if "reference" in plan.resident_bytes:
            found.append("rl.kl_to=old: no frozen copy of the policy")
    if any(name in ROLLOUT for name in too_large):
        found += ["a smaller rollout.slots_per_device or rollout.max_tokens: a smaller KV cache",
                  "a larger rollout.tensor: fewer copies of the weights"]  # fmt: skip
    if any(name not in ROLLOUT for name in too_large):
        found += ["model.remat=full and model.dtype=bfloat16, if they are not yet",
                  "a smaller rl.rows_per_device or rl.row_length: fewer activations",
                  "a larger mesh.fsdp or mesh.tensor, on more chips"]  # fmt: skip
    return found


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.1f} MiB"


def _seconds(t: float) -> str:
    return f"{t:.3g} s" if t >= 1 else f"{t * 1e3:.3g} ms"
