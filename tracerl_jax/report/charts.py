"""From metric rows to the curves of the report page: which metrics share a chart, and how many points are kept."""

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_POINTS = 400  # per curve; more cannot be told apart on a screen

Points = list[tuple[int, float | None]]  # (step, value); None where the value is not finite


@dataclass(frozen=True)
class Chart:
    """`metrics` are shell patterns -> label ("*" in a label is what the pattern's "*" matched). One unit per chart."""

    section: str
    title: str
    metrics: Mapping[str, str]
    unit: str = "number"  # or "percent" (of fractions), "seconds", "log"
    kind: str = "lines"  # or "band" (mean, low, high), "stack"


CHARTS = (
    Chart("Learning", "Reward", {"reward": "mean", "reward_std": "standard deviation"}),
    Chart("Learning", "Accuracy", {"accuracy": "rollouts", "eval/*/accuracy": "held-out, *"}, "percent"),
    Chart("Learning", "Tokens per denoise step",
          {"rollout/tokens_per_denoise_step": "rollouts", "eval/*/tokens_per_step": "held-out, *"}),
    *(
        Chart("Held-out", title, {f"eval/*/{name}": "*", f"sft/eval/*/{name}": "*, supervised"}, unit)
        for title, name, unit in (
            ("Standard error of the accuracy", "accuracy_stderr", "percent"),
            ("One of several answers right", "pass@*", "percent"),
            ("Majority of several answers right", "maj@*", "percent"),
            ("Tokens per forward, commits included", "tokens_per_forward", "number"),
            ("Mean response length", "response_length", "number"),
            ("Truncated answers", "truncated_fraction", "percent"),
            ("Answers without verdict", "no_verdict", "number"),
        )
    ),
    Chart("Rollout", "Response length",
          {"response_length/mean": "mean", "response_length/min": "shortest", "response_length/max": "longest"},
          kind="band"),
    Chart("Rollout", "Shares of responses and groups",
          {"response_length/truncated_fraction": "truncated", "groups/kept_fraction": "groups kept"}, "percent"),
    Chart("Rollout", "Responses without verdict", {"no_verdict": "responses"}),
    Chart("Rollout", "Steps rewarded in a response", {"process/steps_per_response": "mean"}),
    Chart("Rollout", "Tokens per forward", {"rollout/tokens_per_forward": "with commits"}),
    Chart("Rollout", "Sampling until the batch is full", {"sampling/rounds": "rounds", "sampling/prompts": "problems"}),
    Chart("Rollout", "Curriculum",
          {"curriculum/seen_fraction": "problems seen", "curriculum/success_rate": "running success rate",
           "curriculum/weight_mean": "mean weight"}, "percent"),
    Chart("Rollout", "Schedules", {"rollout/max_tokens": "completion limit", "rollout/block_size": "block size"}),
    Chart("Policy", "Loss", {"policy/loss": "loss"}),
    Chart("Policy", "Clipped ratios", {"policy/clip_fraction": "clipped"}, "percent"),
    Chart("Policy", "Mean ratio", {"policy/ratio_mean": "mean"}),
    Chart("Policy", "KL", {"policy/kl": "to the old policy", "policy/kl_reference": "to the reference"}),
    Chart("Policy", "Entropy", {"policy/entropy": "nats per token"}),
    Chart("Policy", "Gradient norm", {"policy/grad_norm": "before clipping"}),
    Chart("Policy", "Learning rate", {"policy/lr": "policy", "value/lr": "value model"}),
    Chart("Value model", "Loss", {"value/loss": "loss"}),
    Chart("Value model", "Explained variance", {"value/explained_variance": "explained"}),
    Chart("Value model", "Gradient norm", {"value/grad_norm": "before clipping"}),
    Chart("Replay", "Log-prob gap between rollout and replay",
          {"replay/logprob_gap_max": "largest", "replay/logprob_gap_mean": "mean"}, "log"),
    Chart("Off-policy", "Age of the samples", {"overlap/staleness": "policy updates"}),
    Chart("Off-policy", "Importance ratios",
          {"importance/ratio_mean": "mean", "importance/ratio_max": "largest"}, "log"),
    Chart("Off-policy", "Importance weights",
          {"importance/truncated_fraction": "truncated", "importance/effective_sample_size": "effective sample size"},
          "percent"),
    Chart("Replay", "Packing efficiency", {"replay/packing_efficiency": "tokens that are not padding"}, "percent"),
    Chart("Time", "Seconds per step, by phase", {"seconds/*": "*"}, "seconds", "stack"),
    Chart("Time", "Beside the updates", {"overlap/*_seconds": "*"}, "seconds"),
    Chart("Time", "Rollout speed", {"rollout/tokens_per_second": "tokens per second"}),
    Chart("Chips", "Model FLOPs utilisation", {"chips/*/mfu": "*"}, "percent"),
    Chart("Chips", "Model FLOPs per second and chip", {"chips/*/flops_per_second": "*"}, "log"),
    Chart("Chips", "Tokens per second and chip", {"chips/*/tokens_per_second": "*"}, "log"),
    Chart("Chips", "Memory of the fullest chip, GiB", {"chips/hbm_gib": "in use", "chips/hbm_peak_gib": "peak"}),
    Chart("Hosts", "Slowest process, seconds over the median's", {"hosts/*/ratio": "*"}),
    Chart("Hosts", "Which process is the slowest", {"hosts/*/slowest": "*"}),
    Chart("Supervised warm-up", "Loss", {"sft/loss": "loss"}),
    Chart("Supervised warm-up", "Gradient norm", {"sft/grad_norm": "before clipping"}),
    Chart("Supervised warm-up", "Learning rate", {"sft/lr": "learning rate"}),
    Chart("Supervised warm-up", "Updates skipped so far", {"sft/skipped": "updates"}),
    Chart("Supervised warm-up", "Accuracy", {"sft/eval/*/accuracy": "held-out, *"}, "percent"),
    Chart("Supervised warm-up", "Tokens per denoise step", {"sft/eval/*/tokens_per_step": "held-out, *"}),
    Chart("Supervised warm-up", "Speed", {"sft/tokens_per_second": "tokens per second"}),
    Chart("Supervised warm-up", "Seconds between rows, by phase", {"sft/seconds/*": "*"}, "seconds", "stack"),
    Chart("Supervised warm-up", "Model FLOPs utilisation", {"sft/chips/*/mfu": "*"}, "percent"),
    Chart("Supervised warm-up", "Model FLOPs per second and chip", {"sft/chips/*/flops_per_second": "*"}, "log"),
    Chart("Supervised warm-up", "Tokens per second and chip", {"sft/chips/*/tokens_per_second": "*"}),
    Chart("Supervised warm-up", "Memory of the fullest chip, GiB",
          {"sft/chips/hbm_gib": "in use", "sft/chips/hbm_peak_gib": "peak"}),
    Chart("Supervised warm-up", "Slowest process, seconds over the median's", {"sft/hosts/*/ratio": "*"}),
    Chart("Supervised warm-up", "Which process is the slowest", {"sft/hosts/*/slowest": "*"}),
)  # fmt: skip


def collect_series(rows: Iterable[Mapping[str, Any]]) -> dict[str, Points]:
    """{metric: points in step order}; of two rows with the same step the later wins.

    Steps of the warm-up and of RL are different clocks, so a name that both use is kept apart as "sft/<name>".
    """
    series: dict[str, dict[int, float | None]] = {}
    for row in rows:
        for name, value in row.items():
            if name in ("step", "phase") or isinstance(value, bool | str | list | dict):
                continue
            own = row.get("phase") == "sft" and not name.startswith("sft/")
            finite = value is not None and math.isfinite(value)
            series.setdefault(f"sft/{name}" if own else name, {})[row["step"]] = value if finite else None
    return {name: sorted(points.items()) for name, points in series.items()}


def build_charts(series: Mapping[str, Points]) -> list[dict[str, Any]]:
    """The charts that have data, in reading order; metrics no chart knows come last, one each, under "Other"."""
    charts, used = [], {"updates/skipped"}  # drawn as marks on the charts
    for chart in CHARTS:
        curves = []
        for pattern, label in chart.metrics.items():
            for name in fnmatch.filter(series, pattern):
                before, _, after = pattern.partition("*")
                matched = name.removeprefix(before).removesuffix(after).replace("_", " ").replace("/", ", ")
                curves.append((label.replace("*", matched), series[name]))
                used.add(name)
        if chart.kind == "stack":
            curves = _stack_rest(curves)
        if curves:
            charts.append(_chart(chart, curves))
    charts += [_chart(Chart("Other", name, {}), [(name, series[name])]) for name in sorted(series) if name not in used]
    return charts


def _chart(chart: Chart, curves: list[tuple[str, Points]]) -> dict[str, Any]:
    aligned = chart.kind in ("stack", "band")  # drawn against each other: they must keep the same steps
    keep = _thin_steps(curves) if aligned else None
    shown = [
        {"label": label, "points": [p for p in points if p[0] in keep] if aligned else downsample(points)}
        for label, points in curves
    ]
    return {
        "section": chart.section, "title": chart.title, "unit": chart.unit, "kind": chart.kind, "series": shown,
        "thinned": any(len(s["points"]) < len(points) for s, (_, points) in zip(shown, curves, strict=True)),
    }  # fmt: skip


def _stack_rest(curves: list[tuple[str, Points]]) -> list[tuple[str, Points]]:
    """Phases in order of first appearance, "total" replaced by the time outside them."""
    phases = [(label, points) for label, points in curves if label != "total"]
    if not phases:
        return curves
    total = dict(next((points for label, points in curves if label == "total"), []))
    for _, points in phases:
        for step, value in points:
            if total.get(step) is not None:
                total[step] -= value or 0.0
    rest = [(step, None if value is None else max(value, 0.0)) for step, value in total.items()]
    return phases + ([("other", rest)] if rest else [])


def _thin_steps(curves: Sequence[tuple[str, Points]]) -> set[int]:
    steps = sorted({step for _, points in curves for step, _ in points})
    return set(steps[:: math.ceil(len(steps) / MAX_POINTS) or 1]) | set(steps[-1:])


def downsample(points: Points, limit: int = MAX_POINTS) -> Points:
    """At most `limit` points that keep the ends and every bucket's extremes, so that no spike is lost."""
    if len(points) <= limit:
        return points
    buckets = (limit - 2) // 2
    inner, kept = points[1:-1], [points[0]]
    for b in range(buckets):
        bucket = inner[b * len(inner) // buckets : (b + 1) * len(inner) // buckets]
        finite = [p for p in bucket if p[1] is not None] or bucket[:1]
        low, high = min(finite, key=_value), max(finite, key=_value)
        kept += sorted({low, high})
    return [*kept, points[-1]]


def _value(point: tuple[int, float | None]) -> float:
    return 0.0 if point[1] is None else point[1]
