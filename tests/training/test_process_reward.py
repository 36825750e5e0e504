"""Whole runs with rewards of steps, and with a judge that fails."""

import numpy as np
import pytest
from judge_utils import serving
from tiny_runs import FULL, high_digits, metric_rows, newest_checkpoint, saved_state, tiny

from tracerl_jax.errors import ConfigError, UnavailableError
from tracerl_jax.report.run_dir import intact_rows
from tracerl_jax.rewards import register_reward, step_verdict
from tracerl_jax.training.pipeline import train
from tracerl_jax.training.run import Run

pytestmark = pytest.mark.usefixtures("quick")


def high(text: str) -> float:
    return high_digits([""], [text])[0]


@register_reward("tiny_shy_steps", steps=True)
def shy_steps(prompts, completions, *, step_ends, **columns):
    """`tiny_shy`, each step for itself."""
    verdicts = []
    for text, ends in zip(completions, step_ends, strict=True):
        steps = [(end, text[begin:end]) for begin, end in zip([0, *ends], ends, strict=False)]
        verdicts.append(step_verdict((end, None if "7" in step else high(step)) for end, step in steps))
    return verdicts


ONE_STEP = FULL | {"sft__steps": 0, "rl__steps": 1, "eval__strategies": [], "report__samples_per_step": 8}
STEPS = {"task__rewards": {"tiny_shy_steps": 1.0}, "reward__process": {"tokens": 3}, "value__gamma": 0.9}


def judged_samples(run) -> tuple[dict, list[dict]]:
    """The metrics of a run of one step, and its samples with a verdict; those without are the ones with a 7."""
    (row,) = metric_rows(run)
    samples = list(intact_rows(run / "samples.jsonl"))
    silent = [sample for sample in samples if "7" in sample["text"]]
    assert 0 < len(silent) == row["no_verdict"] < len(samples) == 8
    for sample in silent:
        assert sample["reward"] is None and "steps" not in sample
    judged = [sample for sample in samples if sample not in silent]
    assert row["reward"] == pytest.approx(np.mean([sample["reward"] for sample in judged]))
    assert row["updates/skipped"] == 0 and row["policy/grad_norm"] > 0 and row["value/grad_norm"] > 0
    return row, judged


def test_steps_without_a_value_model_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"tiny_shy_steps judges the steps .* set value\.enabled=true"):
        Run(tiny(tmp_path, task__rewards={"tiny_shy_steps": 1.0}))


def test_rewards_of_steps_reach_the_update_and_samples_without_verdict_do_not(tmp_path):
    train(tiny(tmp_path, **ONE_STEP | STEPS))
    row, judged = judged_samples(tmp_path / "run")
    for sample in judged:
        assert sample["reward"] == pytest.approx(high(sample["text"]))
        length = len(sample["ids"])
        assert len(sample["text"]) < length or [end for end, _ in sample["steps"]] == [*range(3, length, 3), length]
        assert sum(reward for _, reward in sample["steps"]) == pytest.approx(sample["reward"])
    assert row["process/steps_per_response"] == np.mean([len(s["steps"]) for s in judged])


def test_with_one_step_a_run_is_that_of_the_whole(tmp_path):
    """The same up to rounding: the reward of a step is scaled, and the baseline taken off, apart."""
    runs = {}
    for name, reward in (("whole", "tiny_shy"), ("steps", "tiny_shy_steps")):
        train(tiny(tmp_path, **ONE_STEP, name=name, task__rewards={reward: 1.0}, reward__process={"tokens": 99}))
        runs[name] = metric_rows(tmp_path / name)[0], saved_state(tmp_path / name)[0]
    whole, steps = runs["whole"][0], runs["steps"][0]
    assert steps.pop("process/steps_per_response") == 1
    assert steps.keys() == whole.keys()
    for name in whole.keys() - {"phase"}:
        assert steps[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-6), name
    for name, leaf in runs["whole"][1].items():
        np.testing.assert_allclose(runs["steps"][1][name], leaf, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_an_overlapped_run_with_rewards_of_steps_goes_on_where_it_stopped(tmp_path):
    """The samples that are decoded ahead are judged once more."""
    changes = FULL | STEPS | {"sft__steps": 0, "eval__strategies": [], "rl__overlap": "one_step_off"}
    train(tiny(tmp_path, **changes, name="at once", rl__steps=2))
    train(tiny(tmp_path, **changes, name="twice", rl__steps=1))
    train(tiny(tmp_path, **changes, name="twice", rl__steps=2))
    assert newest_checkpoint(tmp_path / "twice") == 2
    assert metric_rows(tmp_path / "twice") == metric_rows(tmp_path / "at once")


def referee(question: str, headers) -> str | int:
    return 500 if "7" in question else "yes" if high(question) > 0.25 else "no"


def test_a_judge_that_fails_on_some_samples_costs_the_run_only_those(tmp_path):
    judge = {
        "model": "m", "prompt": "whole {completion}", "step_prompt": "step {step}", "cache": str(tmp_path / "cache"),
        "concurrency": 99, "retries": 1, "backoff_seconds": 0.0,
    }  # fmt: skip
    changes = ONE_STEP | {"task__rewards": {"judge": 1.0, "judge_steps": 0.5}, "reward__process": {"tokens": 4}}
    with serving(referee) as server:
        train(tiny(tmp_path, **changes, name="asking", reward__judge=judge | {"url": server.url}))
    row, judged = judged_samples(tmp_path / "asking")
    for sample in judged:
        characters = [token if len(token) == 1 else "" for token in sample["tokens"]]  # control tokens have no text
        parts = ["".join(characters[:4]), "".join(characters[4:])]
        steps = [float(referee(part, None) == "yes") for part in parts if part]
        assert [2 * reward for _, reward in sample["steps"]] == steps
        assert sample["rewards"]["judge"] == float(referee(sample["text"], None) == "yes")
        assert sample["reward"] == sample["rewards"]["judge"] + sum(steps) / 2
    train(tiny(tmp_path, **changes, name="offline", reward__judge=judge | {"offline": True}))
    assert metric_rows(tmp_path / "offline") == [row]


def test_a_judge_that_is_down_is_said_before_anything_is_decoded(tmp_path):
    judge = {"url": "http://127.0.0.1:9/v1", "model": "m", "retries": 0, "cache": None}
    with pytest.raises(UnavailableError, match=r"reward\.judge\.url=http://127\.0\.0\.1:9/v1 gave no answer"):
        Run(tiny(tmp_path, task__rewards={"judge": 1.0}, reward__judge=judge))
