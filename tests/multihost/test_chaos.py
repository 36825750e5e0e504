"""The fault injection itself: that it would see what it looks for, and (slow) some of its rounds."""

import json
import subprocess
import sys
from pathlib import Path

import chaos
import pytest


class FakeJob:
    def __init__(self, run: Path):
        self.run, self.token = run, f"token of {run}"

    checkpoints = chaos.Job.checkpoints

    def kill_all(self) -> None:
        pass


@pytest.fixture
def finished(tmp_path):
    """Two folders of finished runs that are equal but for their times: (job of the first, reference)."""
    for name, seconds in (("run", 1.0), ("undisturbed", 2.0)):
        run = tmp_path / name
        for folder in ("hf", "checksums", "checkpoints/3"):
            (run / folder).mkdir(parents=True)
        times = ("seconds/total", "chips/total/mfu", "hosts/rollout/ratio", "hosts/rollout/slowest")
        row = {"step": 1, "reward": 0.5, **dict.fromkeys(times, seconds)}
        (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        (run / "samples.jsonl").write_text('{"text": "12"}\n')
        (run / "summary.json").write_text('{"status": "finished", "eval": {"after": 0.25}}')
        (run / "hf/model.safetensors").write_bytes(b"weights")
        (run / "checksums/3.json").touch()
    return FakeJob(tmp_path / "run"), chaos.Reference(tmp_path / "undisturbed", [1.0])


def test_equal_runs_have_no_problems(finished):
    assert chaos.problems_of(*finished) == []


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("metrics.jsonl", '{"step": 1, "reward": 0.5000001}\n', "metrics differ"),
        ("samples.jsonl", '{"text": "13"}\n', "samples differ"),
        ("samples.jsonl", '{"text": "12"}\n{"te', "samples.jsonl has a torn line"),
        ("summary.json", '{"status": "finished", "eval": {"after": 0.5}}', "evaluations differ"),
        ("summary.json", '{"status": "failed", "eval": {"after": 0.25}}', "summary.json does not say finished"),
        ("hf/model.safetensors", "Weights", "weights differ"),
        (".hf.partial/model.safetensors", "", ".hf.partial is left"),
        ("checkpoints/4.orbax-checkpoint-tmp/params", "", "checkpoints/4.orbax-checkpoint-tmp is left"),
        ("checkpoints/4/params", "", "checksums of ['3'] for checkpoints ['3', '4']"),
    ],
)
def test_what_differs_or_is_left_is_seen(finished, file, content, problem):
    job, reference = finished
    path = job.run / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    assert problem in chaos.problems_of(job, reference)


def test_a_process_that_is_left_is_seen(finished, monkeypatch):
    job, reference = finished
    monkeypatch.setattr(chaos, "PATIENCE", 0.2)
    with subprocess.Popen(["sleep", "60"], env={chaos.TOKEN: job.token, "PATH": "/usr/bin:/bin"}) as process:
        try:
            assert chaos.problems_of(job, reference) == [f"processes [{process.pid}] are left"]
        finally:
            process.kill()


@pytest.mark.slow
def test_a_job_survives_three_rounds():
    command = [sys.executable, chaos.__file__, "--rounds", "3", "--seed", "1", "--only", "kill,term,truncate"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": identical (") == 3
