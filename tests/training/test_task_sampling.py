"""Whole runs with rounds, a curriculum and schedules: going on after a kill gives the same bits, as do restarts."""

import pytest
from tiny_runs import assert_same_run, metric_rows, run_and_die, saved_state, tiny

from tracerl_jax.errors import ConfigError
from tracerl_jax.report.run_dir import intact_rows
from tracerl_jax.training import run as run_module
from tracerl_jax.training.pipeline import train

pytestmark = pytest.mark.usefixtures("quick")

SAMPLING = {
    "sft__steps": 0, "rl__steps": 3, "eval__every": 0, "checkpoint__every": 1, "rl__old_logprobs": "recompute",
    "task__rewards": {"tiny_odd": 1.0}, "rl__sampling_rounds": 3, "rl__curriculum": "success_rate",
    "rollout__max_tokens_schedule": {"2": 12}, "rollout__block_size_schedule": {"3": 8},
    "report__samples_per_step": 99,
}  # fmt: skip


@pytest.mark.parametrize(
    "overlap, moment",
    [
        ("one_step_off", "tracerl_jax.rl.rollouts:OneStepOff.before_update:3"),
        ("none", "tracerl_jax.rl.rollouts:judge_traces:5"),
    ],
)
@pytest.mark.slow
def test_killed_in_between_a_run_ends_with_the_same_bits(compiled, tmp_path, overlap, moment):
    changes = SAMPLING | {"rl__overlap": overlap}
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    train(tiny(tmp_path / "whole", **changes))
    whole = tmp_path / "whole" / "run"
    rows = [row for row in metric_rows(whole) if row["phase"] == "rl"]
    assert all(row["updates/skipped"] == 0 for row in rows)
    assert max(row["sampling/rounds"] for row in rows) > 1
    assert all((row["sampling/prompts"] > 2) == (row["sampling/rounds"] > 1) for row in rows)
    assert [(row["rollout/max_tokens"], row["rollout/block_size"]) for row in rows] == [(8, 4), (12, 4), (12, 8)]
    samples = list(intact_rows(whole / "samples.jsonl"))
    assert {(row["step"], row["block_size"]) for row in samples} == {(1, 4), (2, 4), (3, 8)}
    assert max(len(row["ids"]) for row in samples if row["step"] == 1) <= 8
    state = saved_state(whole)[1]["data"]
    assert 0 < len(state["rates"]) <= 24
    ahead = state["draws"] - sum(row["sampling/rounds"] for row in rows)
    assert ahead == 0 if overlap == "none" else 1 <= ahead <= 3

    assert run_and_die(tmp_path / "killed", compiled, moment, **changes)
    train(tiny(tmp_path / "killed", **changes))
    assert_same_run(tmp_path / "killed" / "run", whole)


def test_lengths_are_checked_against_the_longest_stage(tmp_path):
    with pytest.raises(ConfigError, match=r"rollout\.max_tokens is 400000: behind the longest prompt"):
        run_module.Run(tiny(tmp_path, rollout__max_tokens_schedule={"50": 400000}))


def test_training_rows_must_be_named(tmp_path):
    with pytest.raises(ConfigError, match=r"task gsm8k needs training rows: set task.path .*hub:openai/gsm8k:train"):
        run_module.Run(tiny(tmp_path, task__name="gsm8k", task__options={}))


def test_what_responses_begin_with_is_judged_with_them(tmp_path):
    """With the digits 99 in front every response has at least two high digits of eight."""
    changes = {"sft__steps": 0, "rl__steps": 1, "eval__strategies": [], "task__prefix": "99"}
    train(tiny(tmp_path, **changes))
    samples = list(intact_rows(tmp_path / "run" / "samples.jsonl"))
    for sample in samples:
        assert sample["prompt"].endswith("=99") and sample["text"].startswith("99") and sample["reward"] >= 0.25
