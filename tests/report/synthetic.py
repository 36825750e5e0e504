"""A run folder as the loops would write it, with what makes a page hard: markup, NaN, skipped steps, a torn line."""

import math
from pathlib import Path

import numpy as np

from tracerl_jax.diffusion.trace import Trace
from tracerl_jax.report.metrics import JsonlWriter, MetricLog
from tracerl_jax.report.run_dir import RunDir
from tracerl_jax.report.samples import sample_row

BLOCK = 4
PHASES = {"rollout": 2.1, "reward": 0.1, "values": 0.4, "update_value": 0.8, "update_policy": 1.2}
CONFIG = {
    "name": "arith-seed0", "seed": 0, "model": {"preset": "sdar_demo", "path": None}, "task": {"name": "arithmetic"},
    "rollout": {"block_size": BLOCK, "strategy": "dynamic", "threshold": 0.9}, "sft": {"steps": 200},
    "rl": {"steps": 60, "method": "tracerl", "optimizer": {"learning_rate": 1e-5}}, "eval": {"every": 10},
}  # fmt: skip


class CharTokenizer:
    """One id per character."""

    def __len__(self) -> int:
        return 0x110000

    def decode(self, ids, **kwargs) -> str:
        return "".join(map(chr, ids))


def random_trace(rng: np.random.Generator, prompt: str, text: str, stop: bool = True) -> Trace:
    """A trace of `text` on the absolute grid: each block takes 1 to B steps, left to right at random."""
    p, r = len(prompt), len(text)
    end = -(-(p + r) // BLOCK) * BLOCK
    steps, step = np.zeros(end - p, np.int32), 0
    for start in range(p - p % BLOCK, end, BLOCK):
        inside = np.arange(max(start, p), start + BLOCK) - p
        _, order = np.unique(rng.integers(0, 3, len(inside)), return_inverse=True)
        steps[inside] = step + 1 + order
        step += order.max() + 1
    logprobs = -rng.exponential(0.2, end - p).astype(np.float32)
    ids = np.array([ord(c) for c in text] + [ord("~")] * (end - p - r), np.int32)
    return Trace(
        prompt_ids=np.array([ord(c) for c in prompt], np.int32), ids=ids[:r], step_map=steps[:r], logprobs=logprobs[:r],
        behaviour_logprobs=logprobs[:r], tail_ids=ids[r:], tail_step_map=steps[r:], block_size=BLOCK, temperature=1.0,
        denoise_forwards=int(step), stop_reason="stop" if stop else "length",
    )  # fmt: skip


def write_samples(run: RunDir, rng: np.random.Generator, step: int, phase: str = "rl") -> None:
    for _ in range(4):
        a, b = rng.integers(10, 99, 2)
        right = rng.random() < 0.3 + 0.01 * step
        answer = a + b if right else a + b + 1
        working = f"We add {a} and {b}.\nTens: {a // 10 + b // 10}, ones: {a % 10 + b % 10}."
        text = f"{working}\n<b>So</b> \\boxed{{{answer}}}</s>"
        row = sample_row(
            random_trace(rng, f"Q: {a} + {b} = ?\nA: ", text), step=step, phase=phase, prompt=f"Q: {a} + {b} = ?\nA: ",
            text=text, reward=float(right), rewards={"boxed": float(right)}, accuracy=float(right),
            ground_truth=str(a + b), tokenizer=CharTokenizer(),
        )  # fmt: skip
        run.append_samples([row])


def write_run(path: Path, steps: int = 60, samples_every: int = 10) -> Path:
    rng = np.random.default_rng(0)
    with RunDir(path) as run:
        run.write_config(CONFIG)
        log = MetricLog([JsonlWriter(run)], "rl")
        for step in range(10, 210, 10):
            log.write(step, {
                "sft/loss": 3.2 * math.exp(-step / 60) + 0.4 + 0.05 * rng.random(), "sft/grad_norm": 1 + rng.random(),
                "sft/lr": 1e-3 * min(1, step / 50), "sft/tokens_per_second": 21_000 + 900 * rng.random(),
                "seconds/total": 0.8, "chips/total/tokens_per_second": 2600.0, "chips/total/mfu": 0.31,
            }, phase="sft")  # fmt: skip
        for step in range(steps + 1):
            progress = 1 - math.exp(-step / 25)
            if step % 10 == 0:
                log.write(step, {
                    "eval/dynamic/accuracy": 0.34 + 0.36 * progress, "eval/static/accuracy": 0.38 + 0.36 * progress,
                    "eval/dynamic/accuracy_stderr": 0.03, "eval/static/accuracy_stderr": 0.031,
                    "eval/dynamic/pass@4": 0.5 + 0.3 * progress, "eval/dynamic/maj@4": 0.4 + 0.3 * progress,
                    "eval/dynamic/tokens_per_step": 2.2 + 0.5 * progress, "eval/static/tokens_per_step": 1.0,
                }, phase="eval")  # fmt: skip
            if step:
                log.write(step, rl_metrics(rng, step, progress))
                each = {phase: [value, value, 1.4 * value, 1.0] for phase, value in (PHASES | {"total": 5.0}).items()}
                run.append_hosts([{"step": step, "phase": "rl", "seconds": each}])
            if step and step % samples_every == 0:
                write_samples(run, rng, step)
        write_samples(run, rng, steps, phase="eval")
        run.update_summary({"eval": {
            "before": {"dynamic": {"accuracy": 0.34, "tokens_per_step": 2.21, "n": 200},
                       "static": {"accuracy": 0.38, "tokens_per_step": 1.0, "n": 200}},
            "after": {"dynamic": {"accuracy": 0.665, "accuracy_stderr": 0.033, "tokens_per_step": 2.64, "n": 200},
                      "static": {"accuracy": 0.7, "tokens_per_step": 1.0, "n": 200}},
        }})  # fmt: skip
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"step": 61, "phase": "rl", "rew')
    return path


def rl_metrics(rng: np.random.Generator, step: int, progress: float) -> dict[str, float]:
    skipped = step in (17, 42)
    seconds = {f"seconds/{name}": value * (0.9 + 0.2 * rng.random()) for name, value in PHASES.items()}
    metrics = {
        "reward": 0.3 + 0.4 * progress + 0.05 * rng.normal(), "reward_std": 0.45 - 0.05 * progress,
        "accuracy": 0.3 + 0.4 * progress + 0.04 * rng.normal(), "no_verdict": 0.0,
        "response_length/mean": 34 - 4 * progress + rng.normal(), "response_length/min": 22 + rng.normal(),
        "response_length/max": 52 + 3 * rng.normal(), "response_length/truncated_fraction": 0.05 * rng.random(),
        "rollout/tokens_per_denoise_step": 2.2 + 0.5 * progress + 0.03 * rng.normal(),
        "rollout/tokens_per_forward": 1.6 + 0.3 * progress, "rollout/tokens_per_second": 5200 + 300 * rng.normal(),
        "groups/kept_fraction": 0.8 - 0.2 * progress, "policy/loss": math.nan if skipped else 0.02 * rng.normal(),
        "policy/clip_fraction": 0.02 + 0.01 * rng.random(), "policy/kl": 1e-3 * rng.random(), "policy/ratio_mean": 1.0,
        "policy/entropy": 0.5 - 0.3 * progress, "policy/grad_norm": 0.3 + 0.2 * rng.random(), "policy/lr": 1e-5,
        "value/loss": 0.2 - 0.1 * progress, "value/explained_variance": 0.6 * progress, "value/grad_norm": 1.0,
        "value/lr": 5e-5, "replay/logprob_gap_max": 10 ** (-5.5 + 0.3 * rng.normal()),
        "replay/logprob_gap_mean": 10 ** (-7 + 0.1 * rng.normal()), "replay/packing_efficiency": 0.93,
        "chips/rollout/mfu": 0.02, "chips/update_policy/mfu": 0.4 + 0.01 * rng.random(), "chips/hbm_gib": 61.5,
        "chips/rollout/tokens_per_second": 650.0, "chips/update_policy/flops_per_second": 1.9e14,
        "hosts/rollout/slowest": float(rng.integers(4)), "hosts/rollout/ratio": 1.2 + 0.1 * rng.random(),
        "updates/skipped": float(skipped), **seconds, "seconds/total": sum(seconds.values()) + 0.1,
    }  # fmt: skip
    return metrics
