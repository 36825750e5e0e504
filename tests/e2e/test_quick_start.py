"""The quick start as a user runs it, and that it keeps its promise for three seeds."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_reinforcement_learning_adds_twenty_points(tmp_path, seed):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # one device, as for users
    command = [sys.executable, "-m", "tracerl_jax", "demo", f"--config.runs_dir={tmp_path}", f"--config.seed={seed}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "demo" / "summary.json").read_text())["eval"]
    before, after = results["before"]["dynamic"], results["after"]["dynamic"]
    assert after["n"] >= 200
    assert 0.2 <= before["accuracy"] <= 0.7
    assert after["accuracy"] >= before["accuracy"] + 0.2
    assert "tokens per step" in done.stdout and "report.html" in done.stdout
    assert (tmp_path / "demo" / "hf" / "model.safetensors").exists()
