"""A plan as text for people and as a dict for programs, and what to change when it does not fit."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from tracerl_jax.config import RunConfig
from tracerl_jax.errors import ConfigError
from tracerl_jax.plan.estimate import PHASES, Estimate, Plan
from tracerl_jax.plan.workload import Workload
from tracerl_jax.units import GIB, format_bytes


def check_utilisation(utilisation: float) -> None:
    if not 0 < utilisation <= 1:
        raise ConfigError(f"utilisation is {utilisation}, must lie in (0, 1]")


def plan_dict(plan: Plan, config: RunConfig, workload: Workload, utilisation: float) -> dict[str, Any]:
    """Everything in base units: bytes and FLOPs per chip, seconds. JSON-able.

    `utilisation`: share of the chip's peak rates, for estimates of time that are no lower bounds.
    """
    return {
        "name": config.name,
        "topology": plan.topology.name,
        "chips": plan.topology.chips,
        "mesh": plan.mesh,
        "rollout_mesh": plan.rollout_mesh,
        "workload": dataclasses.asdict(workload),
        "fits": plan.fits,
        "knobs": knobs(plan, config),
        "hbm_bytes": plan.limit_bytes,
        "peak_bytes": plan.peak_bytes,
        "resident_bytes": plan.resident_bytes,
        "step_seconds": plan.step_seconds,
        "response_tokens": plan.response_tokens,
        "programs": [_program_dict(p) for p in plan.programs],
        "forwards_per_response": dataclasses.asdict(plan.forwards),
        "utilisation": utilisation,
        "shrink": {
            str(cost.replay.shrink): {
                "responses": cost.replay.responses,
                "replay": dataclasses.asdict(cost.replay.count),
                "runs_per_step": cost.replay.runs,
                "flops": cost.flops,  # of all chips
                "step_seconds": cost.seconds,
                "estimated_seconds": cost.seconds and cost.seconds / utilisation,
            }
            for cost in plan.shrinks
        },
    }


def _program_dict(p: Estimate) -> dict[str, Any]:
    """What is not known of a program that the compiler could not place is None."""
    known = {
        "argument_bytes": p.argument_bytes,
        "temp_bytes": p.temp_bytes,
        "flops": p.cost.flops,
        "hbm_traffic_bytes": p.cost.hbm_bytes,
        "collective_bytes": _sent(p),
        "kernels": dict(p.cost.kernels),
        "seconds": p.seconds,
        "compute_seconds": p.compute_seconds,
        "hbm_seconds": p.memory_seconds,
        "link_seconds": p.link_seconds,
        "bound": p.bound,
        "not_counted": sorted(p.cost.unknown_kernels | p.cost.unknown_loops),
    }
    return {
        "name": p.name,
        "runs_per_step": p.runs,
        "peak_bytes": p.peak_bytes,
        "overflow": p.overflow,
        "compile_seconds": p.compile_seconds,
        **(dict.fromkeys(known) if p.overflow else known),
    }


def _sent(p: Estimate) -> dict[str, float]:
    return {f"{kind} over {axes}": sent for (kind, axes), sent in p.cost.collective_bytes.most_common()}


def format_plan(plan: Plan, config: RunConfig, workload: Workload, utilisation: float) -> str:
    """The table, the memory that stays, what is sent, the step by `rl.shrink`, and the verdict."""
    chip, mesh = plan.topology.chip, _mesh(plan.mesh)
    share = f", of {format_bytes(chip.hbm_bytes)} (XLA_PYTHON_CLIENT_MEM_FRACTION)" if chip.platform == "cuda" else ""
    mesh += f", in decoding {_mesh(plan.rollout_mesh)}" if plan.rollout_mesh != plan.mesh else ""
    lines = [
        f"{config.name} on {plan.topology.name}: {_chips(plan.topology.chips)} with "
        f"{format_bytes(plan.limit_bytes)} for programs{share}",
        f"mesh: {mesh}",
        f"assumed: prompts of {workload.prompt_tokens} and responses of {workload.response_tokens} tokens "
        f"(the longest: {config.task.max_prompt_tokens} and {config.rollout.max_tokens}), "
        f"{workload.tokens_per_step:g} tokens per denoise step, {workload.kept_fraction:.0%} of the responses kept",
        *["rl.overlap: decoding and updates share the chips, so the step is no shorter than both, and peaks add up"]
        * (config.rl.overlap != "none"),
        "",
        "stays on every chip: "
        + ", ".join(f"{name} {format_bytes(size)}" for name, size in plan.resident_bytes.items()),
        "",
        *_columns([_HEADINGS, *(_row(p) for p in plan.programs)]),
        "",
        "runs: per RL step. GiB: the program's arguments and temporaries, and the peak of all that is there meanwhile.",
        "TFLOP, HBM GB: of one run on one chip. ms: what they, and what is sent, take at the chip's peak rates.",
    ]
    if sent := [(f"  {p.name}", _sent_text(p)) for p in plan.programs if p.cost.collective_bytes]:
        lines += ["", "sent by a chip in one run, GB:", *_columns(sent, right=False)]
    missing = sorted({f"  {p.name}: {what}" for p in plan.programs for what in p.cost.unknown_kernels})
    missing += sorted({f"  {p.name}: loop {what}" for p in plan.programs for what in p.cost.unknown_loops})
    if missing:
        lines += ["", "counted too low (FLOPs of unknown kernels, loops of unknown length):", *missing]
    return "\n".join([*lines, "", *_shrink_table(plan, config, utilisation), "", *_verdict(plan, config)])


def _shrink_table(plan: Plan, config: RunConfig, utilisation: float) -> list[str]:
    """What an RL step computes, with the run's shrink and with others."""
    f, samples = plan.forwards, config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    kinds = [f"{_number(f.steps)} denoise steps"]
    kinds += [f"{_number(f.whole)} of them of the whole canvas"] * (f.whole > 0)
    kinds += [f"{_number(f.commits)} commits"] * (f.commits > 0)
    lines = [f"a response takes {_number(f.total)} forwards ({', '.join(kinds)}); {samples:,} responses an RL step"]
    known = plan.shrinks[0].flops
    phases = [phase for phase in PHASES if known is None or known[phase]]
    heading = ("shrink", "states/response", "rows", "Mtokens", "micro-batches",
               *([f"{phase} PFLOP" for phase in phases] if known else ()), "step at least", f"at {utilisation:.0%}")
    rows = [heading]
    for cost in plan.shrinks:
        count, own = cost.replay.count, "*" * (cost.replay.shrink == config.rl.shrink)
        times = ("-", "-") if cost.seconds is None else map(_duration, (cost.seconds, cost.seconds / utilisation))
        rows.append((
            f"{cost.replay.shrink}{own}", _number(count.states / cost.replay.responses), f"{count.rows:,.0f}",
            _number(count.tokens / 1e6), f"{cost.replay.runs['policy gradient']:,.0f}",
            *([_number(cost.flops[phase] / 1e15) for phase in phases] if known else ()), *times,
        ))  # fmt: skip
    return [
        *lines, *_columns(rows), "",
        "shrink: merged denoise steps, * the config's. States, rows, tokens: of one pass over the responses kept.",
        f"PFLOP: of all chips, padding and recomputation included. At {utilisation:.0%}: of the chip's peak rates, all "
        "of which the lower bound takes for granted.",
    ]  # fmt: skip


def _duration(seconds: float) -> str:
    if seconds < 120:
        return _seconds(seconds)
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


_HEADINGS = ("program", "runs", "args", "temp", "peak GiB", "TFLOP", "HBM GB", "compute", "HBM", "links ms",
             "bound by", "s/step", "compiled")  # fmt: skip


def _row(p: Estimate) -> tuple[str, ...]:
    runs, compiled = f"{p.runs:.4g}", f"{p.compile_seconds:.0f} s"
    if p.overflow:
        return (p.name, runs, "-", "-", f"> {_number(p.peak_bytes / GIB)}", *["-"] * 7, compiled)
    return (
        p.name, runs, *(_number(size / GIB) for size in (p.argument_bytes, p.temp_bytes, p.peak_bytes)),
        _number(p.cost.flops / 1e12), _number(p.cost.hbm_bytes / 1e9),
        *(_number(t * 1e3) for t in (p.compute_seconds, p.memory_seconds, p.link_seconds)),
        p.bound, _number(p.runs * p.seconds), compiled,
    )  # fmt: skip


def _sent_text(p: Estimate) -> str:
    shown = [f"{what} {_number(sent / 1e9)}" for what, sent in _sent(p).items() if sent >= 1e7]
    return ", ".join(shown) or "less than 0.01"


def _mesh(shape: Mapping[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in shape.items())


def _chips(count: int) -> str:
    return "1 chip" if count == 1 else f"{count} chips"


def _number(x: float) -> str:
    """Three digits, and no more than two behind the point."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def _columns(rows: list[tuple[str, ...]], *, right: bool = True) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]),
                       *(c.rjust(w) if right else c for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows]  # fmt: skip


def _verdict(plan: Plan, config: RunConfig) -> list[str]:
    peak = max(plan.programs, key=lambda p: p.peak_bytes)
    at_least = "at least " if peak.overflow else ""
    share = f"{at_least}{format_bytes(peak.peak_bytes)} of {format_bytes(plan.limit_bytes)} ({peak.name})"
    if not plan.fits:
        return [f"DOES NOT FIT: {share}. Turn one of these:", *(f"  {knob}" for knob in knobs(plan, config))]
    rate = plan.response_tokens / plan.step_seconds
    return [
        f"fits: {share}",
        f"an RL step takes at least {_seconds(plan.step_seconds)}: {rate:,.0f} response tokens/s, "
        f"{rate / plan.topology.chips:,.0f} per chip",
    ]


ROLLOUT = ("sync", "prefill", "decode")


def knobs(plan: Plan, config: RunConfig) -> list[str]:
    """Config keys that lower the memory of the programs that do not fit, the strongest first; empty where all fit."""
    too_large = [p.name for p in plan.programs if p.peak_bytes > plan.limit_bytes or p.overflow]
    rollout, rl, resident = config.rollout, config.rl, sum(plan.resident_bytes.values())
    found = []
    if too_large and rl.overlap != "none":
        found.append("rl.overlap=none: the weights and the cache for decoding give way to the updates")
    if too_large and resident > 0.8 * plan.limit_bytes:
        found.append(f"more chips with a larger mesh.fsdp ({plan.mesh['fsdp']}): weights and optimizers alone take "
                     f"{format_bytes(resident)}")  # fmt: skip
        if "value" in plan.resident_bytes and not config.value.shared_trunk:
            found.append("value.shared_trunk=true: a head on the policy's features instead of a second model")
        if "reference" in plan.resident_bytes:
            found.append("rl.kl_to=old: no frozen copy of the policy")
    if any(name in ROLLOUT for name in too_large):
        found += [f"a smaller rollout.slots_per_device ({rollout.slots_per_device}) or rollout.max_tokens "
                  f"({rollout.max_tokens}): a smaller KV cache",
                  f"a larger rollout.tensor ({plan.rollout_mesh['tensor']}): more chips share a copy of the weights"]
    if any(name not in ROLLOUT for name in too_large):
        found += ["model.dtype=bfloat16: activations of half the size"] * (config.model.dtype != "bfloat16")
        found += ["model.remat=full: activations of one layer at a time"] * (config.model.remat != "full")
        found += [f"a smaller rl.rows_per_device ({rl.rows_per_device}) or rl.row_length ({rl.row_length}): fewer "
                  "activations",
                  f"a larger mesh.fsdp ({plan.mesh['fsdp']}) or mesh.tensor ({plan.mesh['tensor']}), on more chips"]
    if too_large and plan.topology.chip.platform == "cuda":
        found.append("the environment variable XLA_PYTHON_CLIENT_MEM_FRACTION=0.9: more of a GPU's memory for JAX, "
                     "here and in the run")  # fmt: skip
    return found


def _seconds(t: float) -> str:
    return f"{t:.3g} s" if t >= 1 else f"{t * 1e3:.3g} ms"
