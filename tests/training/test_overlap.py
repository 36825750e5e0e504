"""Whole runs with rl.overlap=one_step_off: what samples are drawn with, and going on after every kind of stop."""

import os
import signal
import threading
import time

import numpy as np
import pytest
import tiny_runs
from tiny_runs import FULL, assert_same_run, config_file, metric_rows, run_and_die, saved_state, tiny

from tracerl_jax.diffusion.trace import Trace
from tracerl_jax.errors import ConfigError
from tracerl_jax.launch.cli import main
from tracerl_jax.report.run_dir import intact_rows, read_json
from tracerl_jax.rl import loop, rollouts
from tracerl_jax.rl.logprobs import score_traces
from tracerl_jax.training import run as run_module
from tracerl_jax.training.interrupt import StopSignal
from tracerl_jax.training.pipeline import train

pytestmark = pytest.mark.usefixtures("quick")

AHEAD = FULL | {
    "rl__overlap": "one_step_off", "rl__old_logprobs": "recompute", "rl__importance_sampling": "token",
    "rl__importance_cap": 1.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def whole_ahead(compiled, tmp_path_factory):
    """The folder of an uninterrupted run of AHEAD."""
    runs_dir = tmp_path_factory.mktemp("whole_ahead")
    with tiny_runs.quick(compiled):
        train(tiny(runs_dir, **AHEAD))
    return runs_dir / "run"


def rl_rows(run):
    return [row for row in metric_rows(run) if row["phase"] == "rl"]


def test_metrics_say_how_old_the_samples_are_and_how_they_are_weighted(whole_ahead):
    rows = rl_rows(whole_ahead)
    assert [row["overlap/staleness"] for row in rows] == [0, 4, 4, 4, 4, 4]  # two mini-batches, two epochs
    assert [row["step"] for row in rows if "replay/logprob_gap_max" in row] == [1]
    assert all(row["updates/skipped"] == 0 and row["policy/grad_norm"] > 0 for row in rows)
    for row in rows:
        assert 0 < row["importance/effective_sample_size"] <= 1
        assert row["importance/ratio_mean"] <= row["importance/ratio_max"]
    assert any(row["importance/truncated_fraction"] > 0 for row in rows)


def test_step_two_is_sampled_by_the_policy_before_the_first_update_whatever_is_slow(tmp_path, monkeypatch):
    """Its samples have the log-probs of the initial weights; updates and rollouts that dawdle change nothing."""
    changes = AHEAD | {"sft__steps": 0, "rl__steps": 2, "rl__minibatches": 1, "rl__epochs": 1, "eval__every": 0}
    config = tiny(tmp_path, **changes | {"name": "plain"})
    train(config)
    rows = [row for row in intact_rows(tmp_path / "plain" / "samples.jsonl")]
    with run_module.Run(config) as run:
        traces = [Trace.from_row(row | {"block_size": run.model.config.block_size}) for row in rows]
        initial = score_traces(run.model, run.initial_params(), traces)
    assert {row["step"] for row in rows} == {1, 2}
    for trace, logprobs in zip(traces, initial, strict=True):
        np.testing.assert_allclose(trace.logprobs, logprobs, atol=1e-4)

    for name, module, function in (("slow update", loop, "update"), ("slow rollout", rollouts, "judge_traces")):
        with pytest.MonkeyPatch.context() as patch:
            original = getattr(module, function)
            patch.setattr(
                module, function, lambda *a, original=original, **k: (time.sleep(0.5), original(*a, **k))[1]
            )
            train(tiny(tmp_path, **changes | {"name": name}))
        assert_same_run(tmp_path / name, tmp_path / "plain")


@pytest.mark.slow
def test_more_steps_continue_a_finished_run(whole_ahead, tmp_path):
    """Three steps, then six: the same as six at once. What is ahead of the third step is kept."""
    changes = AHEAD | {"eval__every": 3}
    train(tiny(tmp_path, **changes, rl__steps=3))
    assert (tmp_path / "run" / "checkpoints" / "7" / "ahead").exists()
    train(tiny(tmp_path, **changes))
    rows = [row for row in metric_rows(tmp_path / "run") if row["phase"] != "eval"]
    assert rows == [row for row in metric_rows(whole_ahead) if row["phase"] != "eval"]
    ends = [saved_state(run)[0] for run in (tmp_path / "run", whole_ahead)]
    assert all(leaf.tobytes() == ends[1][name].tobytes() for name, leaf in ends[0].items())


def in_the_thread(patch, step, action):
    """Do something in the rollout's thread while the step before `step` updates."""
    original = rollouts.OneStepOff._make

    def make(self, number, *rest):
        if number == step:
            action()
        return original(self, number, *rest)

    patch.setattr(rollouts.OneStepOff, "_make", make)


@pytest.mark.slow
def test_signals_wait_for_the_rollout_and_the_same_command_goes_on_to_the_same_bits(whole_ahead, tmp_path, capsys):
    command = ["rl", "--config", config_file(tmp_path / "config.py", **AHEAD)]
    run = tmp_path / "run"
    for step, number in ((2, signal.SIGINT), (4, signal.SIGTERM)):
        with pytest.MonkeyPatch.context() as patch:
            in_the_thread(patch, step, lambda number=number: os.kill(os.getpid(), number))
            assert main(command) == 130
        # The update beside the rollout was given up, or had come to its end.
        assert saved_state(run)[1]["rl_step"] in (step - 2, step - 1)
        assert read_json(run / "summary.json")["status"] == "interrupted"
        assert "Traceback" not in capsys.readouterr().err
    assert main(command) == 0
    assert_same_run(run, whole_ahead)


@pytest.mark.slow
def test_a_second_signal_gives_the_rollout_up(whole_ahead, tmp_path, capsys):
    command = ["rl", "--config", config_file(tmp_path / "config.py", **AHEAD)]
    seen, original = threading.Semaphore(0), StopSignal._handle

    def handle(self, *args):
        seen.release()
        original(self, *args)

    def twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            assert seen.acquire(timeout=60)  # two that come together are one

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopSignal, "_handle", handle)
        in_the_thread(patch, 4, twice)
        assert main(command) == 130
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rollout")]
    assert saved_state(tmp_path / "run")[1]["rl_step"] == 2  # the last checkpoint; step 3 is done again
    assert "Traceback" not in capsys.readouterr().err
    assert main(command) == 0
    assert_same_run(tmp_path / "run", whole_ahead)


def test_killed_with_a_rollout_in_flight_a_run_ends_with_the_same_bits(whole_ahead, compiled, tmp_path):
    assert run_and_die(tmp_path, compiled, "tracerl_jax.rl.rollouts:OneStepOff.before_update:4", **AHEAD)
    assert saved_state(tmp_path / "run")[1]["rl_step"] in (0, 2)  # 0: that of step 2 was still being written
    train(tiny(tmp_path, **AHEAD))
    assert_same_run(tmp_path / "run", whole_ahead)


@pytest.mark.parametrize("where", ["rollout", "update"])
def test_what_fails_beside_the_other_ends_the_run(tmp_path, where):
    def fail(*_, **__):
        raise ConfigError("it broke")

    with pytest.MonkeyPatch.context() as patch:
        if where == "rollout":
            in_the_thread(patch, 2, fail)
        else:
            patch.setattr(loop, "update", fail)
        with pytest.raises(ConfigError, match="it broke"):
            train(tiny(tmp_path, **AHEAD))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rollout")]
    assert read_json(tmp_path / "run" / "summary.json")["status"] == "failed"


@pytest.mark.slow
def test_ppo_alone_and_whole_responses(tmp_path):
    """Without weights the sampler's log-probs are the centre of PPO's ratio, which then leaves 1 at once."""
    changes = {"rl__steps": 2, "eval__every": 0, "rl__overlap": "one_step_off"}
    train(tiny(tmp_path, **changes, name="ppo"))
    first, second = rl_rows(tmp_path / "ppo")
    assert abs(first["policy/ratio_mean"] - 1) < 1e-5 < abs(second["policy/ratio_mean"] - 1)
    assert not any(name.startswith("importance/") for name in second)
    train(tiny(tmp_path, **AHEAD | changes | {"rl__importance_sampling": "sequence"}, name="sequence"))
    assert rl_rows(tmp_path / "sequence")[1]["importance/ratio_mean"] != 1


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module.jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"set rl\.overlap=none"):
        run_module.Run(tiny(tmp_path, **AHEAD))
