"""An evaluation that is killed twice (SIGKILL) and started again ends with the results of an undisturbed one."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from eval_results import assert_same_results, rows_of

from tracerl_jax.launch.cli import main

GSM8K = Path(__file__).parents[1] / "data" / "gsm8k_sample.jsonl"

DIE = """
import os, signal, sys
from tracerl_jax.evals import items
from tracerl_jax.launch.cli import main

behind, words = int(sys.argv[1]), sys.argv[2:]
append, calls = items.append_jsonl, []

def append_and_die(path, rows):
    calls.append(path)
    if len(calls) > behind:  # half of a line
        with open(path, "a") as file:
            file.write('{"index": 0, "prompt": "')
        os.kill(os.getpid(), signal.SIGKILL)
    append(path, rows)

items.append_jsonl = append_and_die
sys.exit(main(words))
"""


@pytest.mark.slow
def test_a_run_that_is_killed_twice(model_folder, tmp_path):
    assert main(["convert", "--from", str(model_folder), "--to", str(tmp_path / "native")]) == 0
    assert main(["convert", "--from", str(tmp_path / "native"), "--to", str(tmp_path / "model")]) == 0
    words = [
        "eval", "--model", str(tmp_path / "model"), "--tasks", "gsm8k,arithmetic", "--path", f"gsm8k={GSM8K}",
        "--limit", "gsm8k=8", "--options", "arithmetic=test_count=20", "--samples", "2", "--max_tokens", "16",
        "--slots", "8",
    ]  # fmt: skip

    def start(output, behind):
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        command = [sys.executable, "-c", DIE, str(behind), *words, "--output", str(output)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    never, answers = 10**6, 8 * (2 + 1) + 20 * (2 + 1)
    assert (done := start(whole, never)).returncode == 0, done.stderr[-2000:]
    counts = []
    for behind in (1, 2):
        assert start(killed, behind).returncode == -signal.SIGKILL
        assert any(not path.read_bytes().endswith(b"\n") for path in (killed / "items").iterdir())  # a torn line
        counts.append(len(rows_of(killed)))
    assert 0 < counts[0] < counts[1] < answers
    assert (done := start(killed, never)).returncode == 0, done.stderr[-2000:]
    assert "going on behind" in done.stderr
    assert_same_results(killed, whole)
    assert len(rows_of(killed)) == answers
    results = json.loads((killed / "results.json").read_text())
    assert sum(r["starts"] for by in results.values() for r in by.values()) == 6  # four evaluations, two of them twice
