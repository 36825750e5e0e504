"""The quick start as a user runs it, and that it keeps its promise: SDAR for three seeds, full attention for one."""

import json
import os
import subprocess
import sys

import pytest

from tracerl_jax.config import RunConfig
from tracerl_jax.config_io import load_config
from tracerl_jax.errors import ConfigError


def run_demo(runs_dir, *flags):
    """The run of `tracerl demo` in a process of its own: (what it printed, {before, after: results by strategy})."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # one device, as for users
    flags = (*flags, f"--config.runs_dir={runs_dir}", "--config.name=demo")
    command = [sys.executable, "-m", "tracerl_jax", "demo", *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, json.loads((runs_dir / "demo" / "summary.json").read_text())["eval"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_reinforcement_learning_adds_twenty_points(tmp_path, seed):
    printed, results = run_demo(tmp_path, f"--config.seed={seed}")
    before, after = results["before"]["dynamic"], results["after"]["dynamic"]
    assert after["n"] >= 200
    assert 0.2 <= before["accuracy"] <= 0.7
    assert after["accuracy"] >= before["accuracy"] + 0.2
    assert "tokens per step" in printed and "report.html" in printed
    assert (tmp_path / "demo" / "hf" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("shrink", [1, 4])
@pytest.mark.parametrize("family", ["dream", "llada"])
def test_it_adds_fifteen_points_to_full_attention(tmp_path, family, shrink):
    _, results = run_demo(tmp_path, "--config", f"demo:{family}", f"--config.rl.shrink={shrink}")
    before, after = results["before"]["dynamic"], results["after"]["dynamic"]
    assert after["n"] >= 200
    assert 0.2 <= before["accuracy"] <= 0.7
    assert after["accuracy"] >= before["accuracy"] + 0.15


@pytest.mark.parametrize("family", ["dream", "llada"])
@pytest.mark.parametrize("shrink", [1, 4])
def test_the_argument_chooses_the_family(family, shrink):
    config = load_config(RunConfig, f"demo:{family}", [f"rl.shrink={shrink}"])
    assert config.model.preset == f"{family}_demo" and config.name == f"demo_{family}"
    assert config.sft.max_response_tokens == config.rollout.max_tokens  # the canvas that training and decoding see
    assert config.task == load_config(RunConfig, "demo").task and config.value.enabled


def test_another_argument_is_refused():
    with pytest.raises(ConfigError, match="'dream', 'llada' or nothing, not 'mamba'"):
        load_config(RunConfig, "demo:mamba")
