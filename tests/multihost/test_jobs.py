"""Several processes train as one does, and refuse what cannot work; a dead one is noticed. (Longer ones: test_pods.)"""

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import jobs
import pytest
from jobs import Job, succeed, tracerl
from tiny_runs import config_file, metric_rows, newest_checkpoint

from tracerl_jax.errors import ConfigError, PeerError
from tracerl_jax.parallel import distributed, facts
from tracerl_jax.report.run_dir import intact_rows
from tracerl_jax.training.interrupt import StopSignal

PEER = str(Path(jobs.__file__).with_name("peer.py"))
SMALL = {
    "model__preset": "one_layer", "sft__steps": 0, "eval__strategies": [], "checkpoint__every": 1,
    "rollout__max_tokens": 4,
}  # fmt: skip


def same_samples(run: Path, other: Path) -> None:
    keys = ("step", "ids", "step_map", "tail_ids", "tail_step_map", "sample_index", "prompt")
    mine, others = ([{k: row[k] for k in keys} for row in intact_rows(p / "samples.jsonl")] for p in (run, other))
    assert mine == others and mine


def same_metrics(run: Path, other: Path, tolerance: float = 1e-5, without: tuple[str, ...] = ()) -> None:
    mine, others = metric_rows(run), metric_rows(other)
    assert [(row["phase"], row["step"]) for row in mine] == [(row["phase"], row["step"]) for row in others]
    for row, expected in zip(mine, others, strict=True):
        numbers = {name: value for name, value in expected.items() if name not in ("phase", "step", *without)}
        close = pytest.approx(numbers, rel=tolerance, abs=tolerance, nan_ok=True)
        assert {name: row[name] for name in numbers} == close


def test_two_processes_train_as_one_and_one_goes_on_from_their_checkpoint(tmp_path):
    """2 x 2 (processes x devices), then 1 x 4 from its checkpoint, are 1 x 4 from the start."""
    config = config_file(tmp_path / "config.py", **SMALL)
    command = ["rl", "--config", config]
    together = [jobs.__file__, *command, "--config.name=two", "--config.rl.steps=2"]
    alone = [jobs.__file__, *command, "--config.name=one", "--config.rl.steps=3"]
    with Job(tmp_path / "2x2", 2, 2, together) as two, Job(tmp_path / "1x4", 1, 4, alone) as one:
        ended = two.wait()
        succeed(ended)
        assert "rl 2/2" in ended[0].output and "rl 2/2" not in ended[1].output
        succeed(tracerl(tmp_path / "resume", 1, 4, [*command, "--config.name=two", "--config.rl.steps=3"]))
        succeed(one.wait())
    assert newest_checkpoint(tmp_path / "two") == 3
    assert [row["step"] for row in metric_rows(tmp_path / "two") if row["phase"] == "rl"] == [1, 2, 3]
    same_samples(tmp_path / "two", tmp_path / "one")
    same_metrics(tmp_path / "two", tmp_path / "one")
    assert any(row["policy/grad_norm"] > 0 for row in metric_rows(tmp_path / "two"))
    assert json.loads((tmp_path / "two" / "checksums" / "2.json").read_text())  # sealed by the job's lead


def test_processes_with_different_configs_refuse_and_name_both(tmp_path):
    config = config_file(tmp_path / "config.py", **SMALL)
    ended = tracerl(tmp_path, 2, 1, ["rl", "--config", config], own={1: ["--config.seed=7"]})
    assert [process.status for process in ended] == [2, 2]
    for process in ended:
        assert "config.seed: process 0 has 0, process 1 has 7" in process.output
        assert "Traceback" not in process.output
    assert not (tmp_path / "run").exists()


def test_what_processes_tell_each_other(tmp_path):
    with Job(tmp_path, 2, 1, [PEER, "talk"]) as job:
        ended = job.wait()
    succeed(ended)
    assert all("agreed" in process.output for process in ended)


def test_a_dead_process_ends_the_others(tmp_path):
    with Job(tmp_path, 2, 1, [PEER, "lose", "3", "1", str(tmp_path)]) as job:
        ended = job.wait()
    assert [process.status for process in ended] == [distributed.STATUS_PEER_LOST, -9], ended[0].output
    assert "process 1 has given no sign of life for 3 s" in ended[0].output
    stacks = (tmp_path / "stacks-process-0.txt").read_text()
    assert "no sign of life" in stacks and "peer.py" in stacks


def test_a_coordinator_that_cannot_be_reached_is_named():
    address = f"127.0.0.1:{jobs.free_port()}"
    environment = {
        "TRACERL_COORDINATOR": address, "TRACERL_PROCESSES": "2", "TRACERL_PROCESS_ID": "1",
        "TRACERL_CONNECT_TIMEOUT": "0.5",
    }  # fmt: skip
    start = time.monotonic()
    with pytest.raises(PeerError, match=rf"coordinator {address}: cannot be reached within 0\.5 s .*process 0"):
        distributed.start(environment)
    assert time.monotonic() - start < 60


GOOD = {"TRACERL_COORDINATOR": "host:1", "TRACERL_PROCESSES": "2", "TRACERL_PROCESS_ID": "1"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"TRACERL_PROCESS_ID": ""}, "TRACERL_COORDINATOR is set, but TRACERL_PROCESS_ID is not"),
        ({"TRACERL_COORDINATOR": "", "TRACERL_PROCESS_ID": ""}, "TRACERL_COORDINATOR and TRACERL_PROCESS_ID are not"),
        ({"TRACERL_COORDINATOR": "host"}, "TRACERL_COORDINATOR is 'host', must be HOST:PORT"),
        ({"TRACERL_PROCESSES": "many"}, "TRACERL_PROCESSES is 'many', must be a whole number"),
        ({"TRACERL_PROCESS_ID": "0.5"}, "TRACERL_PROCESS_ID is '0.5', must be a whole number"),
        ({"TRACERL_PROCESS_ID": "2"}, "TRACERL_PROCESS_ID is 2, must be from 0 to TRACERL_PROCESSES - 1 = 1"),
        ({"TRACERL_CONNECT_TIMEOUT": "soon"}, "TRACERL_CONNECT_TIMEOUT is 'soon'"),
    ],
)
def test_variables_that_make_no_job_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        distributed.start(GOOD | changes)


def test_one_process_is_no_job(monkeypatch):
    shell = {"JOB_ID": "7", "STEP_NODELIST": "n1", "STEP_NUM_TASKS": "1", "LOCALID": "0", "NTASKS": "8", "PROCID": "0"}
    slurm = {f"SLURM_{name}": value for name, value in shell.items()} | {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)  # where JAX looks: the shell of a job of 8 tasks, in a pod
    for environment in (slurm, {"TRACERL_PROCESSES": "1"}, GOOD | {"TRACERL_PROCESSES": "1"}):
        distributed.start(environment)
        assert not distributed.is_job() and distributed.is_lead()


def test_a_first_signal_behind_that_of_another_process_is_no_second_one():
    with StopSignal() as stop:
        stop.request("SIGTERM")  # of another process, told by the watchdog
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested == "SIGTERM"
        with pytest.raises(KeyboardInterrupt, match="second SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)


def test_all_of_the_code_counts_in_a_checkout_and_in_an_installed_package(tmp_path, monkeypatch):
    def digest(package: Path, *path: Path) -> str:
        place = SimpleNamespace(__file__=str(package / "__init__.py"), __path__=[str(package), *map(str, path)])
        monkeypatch.setattr(facts, "tracerl_jax", place)
        return facts.source_digest()

    package = tmp_path / "tracerl_jax"
    for folder in (package / "models", tmp_path / "kernels"):
        folder.mkdir(parents=True)
        (folder / "code.py").write_text("1")
    before = digest(package, tmp_path)
    (tmp_path / "kernels" / "code.py").write_text("2")
    changed = digest(package, tmp_path)
    assert changed != before
    (tmp_path / "kernels").rename(package / "kernels")
    installed = digest(package)
    (package / "kernels" / "code.py").write_text("1")
    assert digest(package) != installed
