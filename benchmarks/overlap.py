"""Seconds of an RL step of the quick start with and without rl.overlap=one_step_off, in one run.

    python benchmarks/overlap.py                          warms a model up first (some minutes)
    python benchmarks/overlap.py --model runs/demo/hf     or takes one
    python benchmarks/overlap.py --judge_seconds 0.5      with a reward that waits so long, as a remote judge does

The runs take turns, so that other work on the machine hits all of them; medians over their steps, the first ones,
which compile, left out. "hidden": seconds that decoding and judging took beside the updates. What is saved is less
where both want the same cores.
"""

import argparse
import contextlib
import dataclasses
import os
import statistics
import tempfile
import time
from pathlib import Path

from tracerl_jax.config import RunConfig
from tracerl_jax.config_io import load_config
from tracerl_jax.launch.demo import use_all_cores
from tracerl_jax.report.run_dir import intact_rows
from tracerl_jax.rewards import register_reward

OVERLAP = {"overlap": "one_step_off"}
TOKEN = {"importance_sampling": "token", "old_logprobs": "recompute"}
MODES = {"none": {}, "one_step_off": OVERLAP, "none, recompute": {"old_logprobs": "recompute"},
         "one_step_off, recompute, token": OVERLAP | TOKEN}  # fmt: skip
PHASES = ("rollout", "reward", "wait", "update_value", "update_policy")
COMPILING = 4  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--model", help="Hugging Face folder that the quick start wrote, default: warm one up")
    flag("--steps", type=int, default=16, help="of a run")
    flag("--repeats", type=int, default=2, help="runs of every mode")
    flag("--judge_seconds", type=float, default=0.0, help="that a step's reward waits")
    args = parser.parse_args()

    use_all_cores()
    from tracerl_jax.training.pipeline import train

    @register_reward("waiting_judge")
    def wait(prompts, completions, **columns):
        time.sleep(args.judge_seconds)
        return [0.0] * len(completions)

    with tempfile.TemporaryDirectory() as folder:
        demo = load_config(RunConfig, "demo", [f"runs_dir={folder}", "eval.strategies=()", "checkpoint.every=1000000"])
        if args.model is None:
            quietly(train, replace(demo, name="warm-up", rl={"steps": 0}))
            args.model = str(Path(folder) / "warm-up" / "hf")
        start = replace(
            demo, model={"path": args.model, "preset": None}, sft={"steps": 0},
            task={"rewards": {"exact_match": 1.0, "waiting_judge": 0.0}},
        )  # fmt: skip
        rows = {mode: [] for mode in MODES}
        for repeat in range(args.repeats):
            for mode, changes in MODES.items():
                name = f"{mode} {repeat}"
                quietly(train, replace(start, name=name, rl={"steps": args.steps, **changes}))
                rows[mode] += list(intact_rows(Path(folder) / name / "metrics.jsonl"))[COMPILING:]
    print_table(rows)


def replace(config: RunConfig, **changes) -> RunConfig:
    """Sections are changed by the dicts given for them."""
    sections = {
        key: dataclasses.replace(getattr(config, key), **value) if isinstance(value, dict) else value
        for key, value in changes.items()
    }
    return dataclasses.replace(config, **sections)


def quietly(call, *args) -> None:
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        call(*args)


def print_table(rows: dict[str, list[dict]]) -> None:
    def median(mode: str, *names: str) -> float:
        return statistics.median(sum(row.get(name, 0.0) for name in names) for row in rows[mode])

    phases = [f"seconds/{phase}" for phase in PHASES]
    heads = "".join(f"{phase:>15}" for phase in (*PHASES, "hidden"))
    print(f"{'seconds, medians':32}{'step':>6}{heads}{'saved':>8}")
    for mode in rows:
        step = median(mode, "seconds/total")
        hidden = median(mode, "overlap/rollout_seconds", "overlap/reward_seconds")
        cells = [*(median(mode, phase) for phase in phases), hidden]
        saved = 1 - step / median("none", "seconds/total")
        print(f"{mode:32}{step:>6.2f}" + "".join(f"{cell:>15.2f}" for cell in cells) + f"{saved:>8.1%}")


if __name__ == "__main__":
    main()
