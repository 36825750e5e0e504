"""Whole jobs that take minutes: layouts of processes and devices agree, and nothing is lost when one dies."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import jobs
import numpy as np
import pytest
from jobs import Job, succeed, tracerl
from reward_model_utils import make_folder
from test_jobs import PEER, same_metrics, same_samples
from tiny_runs import assert_same_run, config_file, metric_rows, saved_state

from tracerl_jax.interop.hf_load import Safetensors
from tracerl_jax.parallel.distributed import STATUS_PEER_LOST
from tracerl_jax.report.run_dir import intact_rows

pytestmark = pytest.mark.slow

WHOLE = {
    "model__preset": "one_layer", "sft__steps": 2, "rl__steps": 3, "value__enabled": True, "rl__kl_to": "reference",
    "rl__minibatches": 2, "eval__every": 1, "checkpoint__every": 1, "faults__heartbeat": 30.0,
}  # fmt: skip

OF_DEVICES = ("replay/packing_efficiency",)  # metrics that depend on their number: rows are filled up


def command(folder: Path, name: str, *flags: str) -> list[str]:
    folder.mkdir(exist_ok=True)
    config = config_file(folder / f"{name}.py", **WHOLE)
    return ["rl", "--config", config, f"--config.name={name}", *flags]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run of 2 processes with 2 devices each."""
    folder = tmp_path_factory.mktemp("undisturbed")
    succeed(tracerl(folder / "out", 2, 2, command(folder, "run")))
    return folder / "run"


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    succeed(tracerl(folder / "out", 1, 8, command(folder, "run")))
    return folder / "run"


@pytest.mark.parametrize(("processes", "devices"), [(2, 4), (4, 2)])
def test_layouts_agree(tmp_path, one_process, processes, devices):
    """Warm-up, RL, value model, reference, evaluation: losses to 1e-5, ids and steps of the traces the same."""
    succeed(tracerl(tmp_path / "out", processes, devices, command(tmp_path, "run")))
    same_samples(tmp_path / "run", one_process)
    same_metrics(tmp_path / "run", one_process)
    mine, others = saved_state(tmp_path / "run")[0], saved_state(one_process)[0]
    assert mine.keys() == others.keys()
    exported = [Safetensors(run / "hf") for run in (tmp_path / "run", one_process)]
    assert exported[0].shapes == exported[1].shapes
    for name in exported[0].shapes:
        np.testing.assert_allclose(exported[0].read(name), exported[1].read(name), atol=1e-4, err_msg=name)


@pytest.mark.parametrize("mesh", [
    {"fsdp": 4, "data": 1}, {"fsdp": 2, "tensor": 2, "data": 1}, {"tensor": 2}, {"fsdp": 2, "expert": 2, "data": 1},
])
def test_meshes_over_processes_agree(tmp_path, one_process, mesh):
    """Parameters split over both processes; a copy for decoding is then split over the devices of one."""
    flags = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()] + ["--config.rollout.tensor=1"]
    succeed(tracerl(tmp_path / "out", 2, 2, command(tmp_path, "run", *flags)))
    same_samples(tmp_path / "run", one_process)
    same_metrics(tmp_path / "run", one_process, 1e-4, OF_DEVICES)


def test_decoding_shares_a_copy_inside_a_process_only(tmp_path, one_process):
    succeed(tracerl(tmp_path / "out", 2, 2, command(tmp_path, "run", "--config.rollout.tensor=2")))
    same_samples(tmp_path / "run", one_process)
    ended = tracerl(tmp_path / "out", 2, 1, command(tmp_path, "other", "--config.rollout.tensor=2"))
    assert [process.status for process in ended] == [2, 2]
    assert "a copy of the weights cannot be shared by processes" in ended[0].output


def test_a_checkpoint_goes_on_with_other_meshes_and_other_numbers_of_processes(tmp_path, one_process):
    layouts = [
        (2, 2, ["--config.rl.steps=1"]),
        (1, 2, ["--config.rl.steps=2", "--config.mesh.fsdp=2"]),
        (4, 1, ["--config.rl.steps=3", "--config.mesh.fsdp=2"]),
    ]
    for processes, devices, flags in layouts:
        succeed(tracerl(tmp_path / "out", processes, devices, command(tmp_path, "run", *flags)))
    same_samples(tmp_path / "run", one_process)
    same_metrics(tmp_path / "run", one_process, 1e-4, OF_DEVICES)


def test_a_reward_model_scores_the_samples_of_each_process(tmp_path):
    """With a copy of it on the devices of each."""
    model = make_folder(tmp_path / "judge", "qwen3")
    flags = ["--config.task.rewards.reward_model=0.5", f"--config.reward.model.path={model}", "--config.rl.steps=2"]
    for processes, devices, name in ((2, 2, "two"), (1, 4, "one")):
        succeed(tracerl(tmp_path / name / "out", processes, devices, command(tmp_path / name, "run", *flags)))
    same_samples(tmp_path / "two" / "run", tmp_path / "one" / "run")
    same_metrics(tmp_path / "two" / "run", tmp_path / "one" / "run", 1e-4)
    scores = [row["rewards"]["reward_model"] for row in intact_rows(tmp_path / "two" / "run" / "samples.jsonl")]
    assert len(set(scores)) > 3


MOMENTS = {
    "in the warm-up": "tracerl_jax.training.step:Updater.update:2",
    "while saving": "tracerl_jax.training.checkpoint:Checkpointer.save:3",
    "in an update": "tracerl_jax.rl.update:Learner.update_policy:3",
}


@pytest.mark.parametrize("victim", ["0", "1"])
@pytest.mark.parametrize("moment", ["while saving", "in an update"])
def test_a_killed_process_ends_all_and_the_same_command_ends_with_the_same_bits(
    tmp_path, undisturbed, victim, moment
):
    words = command(tmp_path, "run")
    environment = {"TEST_DIE": MOMENTS[moment], "TEST_PROCESS": victim}
    start = time.monotonic()
    ended = tracerl(tmp_path / "out", 2, 2, words, environment=environment)
    statuses = [process.status for process in ended]
    assert statuses.pop(int(victim)) == -signal.SIGKILL and statuses == [STATUS_PEER_LOST], ended[0].output
    assert (tmp_path / "run" / f"stacks-process-{1 - int(victim)}.txt").exists()
    assert not orphans(tmp_path), time.monotonic() - start
    succeed(tracerl(tmp_path / "out", 2, 2, words))
    assert_same_run(tmp_path / "run", undisturbed)


def test_a_stopped_process_is_noticed(tmp_path):
    environment = {"TEST_FREEZE": MOMENTS["in an update"], "TEST_PROCESS": "1"}
    with Job(tmp_path / "out", 2, 2, [jobs.__file__, *command(tmp_path, "run")], environment=environment) as job:
        assert job.processes[0].wait(1500) == STATUS_PEER_LOST
        output = (tmp_path / "out" / "output-0.txt").read_text()
    assert "process 1 has given no sign of life for 30 s" in output


@pytest.mark.parametrize("moment", ["in the warm-up", "in an update"])
def test_sigterm_to_one_process_saves_and_ends_all(tmp_path, undisturbed, moment):
    words = command(tmp_path, "run")
    ended = tracerl(
        tmp_path / "out", 2, 2, words, environment={"TEST_STOP": MOMENTS[moment], "TEST_PROCESS": "1"}
    )
    assert [process.status for process in ended] == [130, 130], ended[0].output
    assert "to go on: tracerl rl" in ended[0].output and "to go on" not in ended[1].output
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "interrupted"
    succeed(tracerl(tmp_path / "out", 2, 2, words))
    assert_same_run(tmp_path / "run", undisturbed)


def test_a_damaged_checkpoint_is_skipped_by_all(tmp_path, undisturbed):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run, ignore=shutil.ignore_patterns("hf", "report.html"))
    newest = max((run / "checkpoints").iterdir(), key=lambda path: int(path.name))
    biggest = max(newest.rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    biggest.write_bytes(biggest.read_bytes()[:-7])
    ended = tracerl(tmp_path / "out", 2, 2, command(tmp_path, "run"))
    succeed(ended)
    assert "is damaged" in ended[0].output and "is damaged" not in ended[1].output
    assert_same_run(run, undisturbed)


def test_nan_in_the_shard_of_one_process_skips_the_update_everywhere(tmp_path):
    # Rows so short that each process has some with samples in it, not with padding alone.
    changes = {"sft__steps": 0, "rl__steps": 2, "rl__row_length": 32, "eval__strategies": []}
    words = ["rl", "--config", config_file(tmp_path / "run.py", model__preset="one_layer", **changes)]
    ended = tracerl(tmp_path / "out", 2, 1, words, environment={"TEST_SPOIL": "1"})
    succeed(ended)
    skipped = [row["updates/skipped"] for row in metric_rows(tmp_path / "run") if row["phase"] == "rl"]
    assert skipped == [1, 0]
    assert all("update skipped" in process.output for process in ended)


def test_a_phase_that_hangs_ends_the_job(tmp_path):
    with Job(tmp_path, 2, 1, [PEER, "hang", str(tmp_path)]) as job:
        ended = job.wait()
    assert [process.status for process in ended] == [STATUS_PEER_LOST] * 2
    assert "phase update_policy takes longer than 2 s" in ended[0].output
    assert "process 0: phase update_policy" in ended[1].output
    assert all((tmp_path / f"stacks-process-{i}.txt").exists() for i in range(2))


def test_a_process_that_fails_alone_takes_the_others_with_it(tmp_path):
    with Job(tmp_path, 2, 1, [PEER, "differ"]) as job:
        ended = job.wait()
    assert [process.status for process in ended] == [STATUS_PEER_LOST, 1]
    assert "process 1: ValueError: only here" in ended[0].output and "ValueError: only here" in ended[1].output


def test_a_mistake_of_the_user_ends_all_with_its_status(tmp_path):
    """Also those that have not heard of it when process 0 ends."""
    with Job(tmp_path, 4, 1, [PEER, "refuse"]) as job:
        ended = job.wait()
    assert [process.status for process in ended] == [2] * 4, [process.output for process in ended]
    assert all("set it right" in ended[i].output for i in (0, 1, 3))


def test_a_process_that_holds_pythons_lock_is_ended(tmp_path):
    with Job(tmp_path, 2, 1, [PEER, "stick", "6", str(tmp_path)]) as job:
        ended = job.wait()
    assert [process.status for process in ended] == [STATUS_PEER_LOST, 1]
    assert "process 1 has given no sign of life for 6 s" in ended[0].output
    assert "in stick" in ended[1].output  # where it was


def test_what_hangs_between_phases_ends_the_job(tmp_path):
    with Job(tmp_path, 2, 1, [PEER, "idle", str(tmp_path)]) as job:
        ended = job.wait()
    assert [process.status for process in ended] == [STATUS_PEER_LOST] * 2
    assert any("phase between takes longer than 3 s" in process.output for process in ended)
    assert all("the time of a phase is not between phases" in process.output for process in ended)


def test_a_checkpoint_that_one_process_cannot_read_is_set_aside_by_the_next_start(tmp_path, undisturbed):
    """The others wait for it inside Orbax. Without checksums, so that only reading finds it."""
    words, run = command(tmp_path, "run"), tmp_path / "run"
    shutil.copytree(undisturbed, run, ignore=shutil.ignore_patterns("hf", "report.html"))
    newest = max((run / "checkpoints").iterdir(), key=lambda path: int(path.name))
    (run / "checksums" / f"{newest.name}.json").unlink()
    ended = tracerl(tmp_path / "out", 2, 2, words, environment={"TEST_UNREADABLE": "1"})
    assert [process.status for process in ended] == [STATUS_PEER_LOST, 1], [p.output for p in ended]
    assert "a chunk of my part is missing" in ended[1].output and "the next start sets it aside" in ended[1].output
    ended = tracerl(tmp_path / "out", 2, 2, words)
    succeed(ended)
    assert "is damaged" in ended[0].output and (run / f"damaged-checkpoint-{newest.name}").is_dir()
    assert_same_run(run, undisturbed)


@pytest.mark.parametrize("victim", ["0", "2"])
def test_whichever_process_dies_the_others_end(tmp_path, victim):
    with Job(tmp_path, 3, 1, [PEER, "lose", "3", victim, str(tmp_path)]) as job:
        ended = job.wait()
    statuses = [process.status for process in ended]
    assert statuses.pop(int(victim)) == -9 and statuses == [STATUS_PEER_LOST] * 2, [p.output for p in ended]


def test_eval_of_several_processes_gives_what_one_gives(tmp_path, undisturbed):
    """`tracerl eval` as 2 x 4 and 1 x 8; killed in the middle it goes on behind the answers of both processes."""
    words = ["eval", "--model", str(undisturbed / "hf"), "--tasks", "arithmetic", "--limit", "24", "--samples", "2",
             "--max_tokens", "8", "--slots", "8", "--output"]  # fmt: skip
    succeed(tracerl(tmp_path / "out", 1, 8, [*words, str(tmp_path / "one")]))
    ended = tracerl(tmp_path / "out", 2, 4, [*words, str(tmp_path / "two")])
    succeed(ended)
    assert "arithmetic" in ended[0].output and "tokens/step" not in ended[1].output
    died = tracerl(
        tmp_path / "out", 2, 4, [*words, str(tmp_path / "killed")],
        environment={"TEST_DIE": "tracerl_jax.evals.items:ShareOfItems.add:1", "TEST_PROCESS": "1"},
    )  # fmt: skip
    assert died[1].status == -9
    assert (tmp_path / "killed" / "items" / "arithmetic.dynamic.process-1.jsonl").stat().st_size
    succeed(tracerl(tmp_path / "out", 2, 4, [*words, str(tmp_path / "killed")]))
    expected = answers(tmp_path / "one")
    assert answers(tmp_path / "two") == answers(tmp_path / "killed") == expected and len(expected) == 72
    assert not list(tmp_path.glob("*/items/*process*"))


def answers(folder: Path) -> list[tuple]:
    rows = []
    for path in sorted((folder / "items").iterdir()):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            rows.append((path.name, row["index"], row["sample_index"], row["ids"], row["step_map"], row["correct"]))
    return sorted(rows)


def orphans(folder: Path) -> list[str]:
    """Processes of a job below `folder` that still live, after some time to end."""
    deadline = time.monotonic() + 30
    while True:
        listing = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
        found = [line for line in listing.splitlines() if re.search(re.escape(str(folder)), line)]
        found = [line for line in found if int(line.split()[0]) != os.getpid()]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(1)
