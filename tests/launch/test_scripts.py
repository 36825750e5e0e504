"""The scripts for clusters, as far as they can be tested without one: with `srun`, `scontrol` and `gcloud` played by
stubs that note what they are asked for, and the JobSet against the fields that the API has."""

import os
import re
import string
import subprocess
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[2] / "launch"

# What JobSet v1alpha2 and batch/v1 know, of what we use; a misspelt field would be refused, or ignored.
JOBSET_FIELDS = {"failurePolicy", "network", "replicatedJobs", "successPolicy", "startupPolicy", "suspend"}
RULE_FIELDS = {"name", "action", "onJobFailureReasons", "targetReplicatedJobs"}
JOB_FIELDS = {"parallelism", "completions", "completionMode", "backoffLimit", "podFailurePolicy", "template"}
JOBSET_VALUES = {
    "NAME": "first", "SLICES": "2", "HOSTS": "16", "CHIPS": "4", "ACCELERATOR": "tpu-v5p-slice", "TOPOLOGY": "4x4x4",
    "MAX_RESTARTS": "20", "IMAGE": "registry/tracerl:1", "CLAIM": "shared", "COMMAND": "rl --config demo",
}  # fmt: skip


def stub(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f'#!/bin/bash\necho "{name} $*" >> {folder}/calls\n{body}\n')
    path.chmod(0o755)


def calls_in(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize("script", ["slurm.sbatch", "tpu_vm.sh"])
def test_the_shell_takes_it(script):
    subprocess.run(["bash", "-n", LAUNCH / script], check=True)


# SLURM


def sbatch(folder: Path, statuses: str, **environment: str) -> subprocess.CompletedProcess:
    """The batch script on two nodes, where the processes of each start end with one of `statuses`."""
    stub(folder, "scontrol", 'if [ "$1" = show ]; then printf "node07\\nnode08\\n"; fi')
    stub(folder, "srun", f"env | grep ^TRACERL_ >> {folder}/job; set -- {statuses}; "
         f'n=$(grep -c ^srun {folder}/calls); exit "${{!n}}"')  # fmt: skip
    slurm = {"SLURM_JOB_ID": "41", "SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node0[7-8]"}
    command = ["bash", LAUNCH / "slurm.sbatch", "rl", "--config", "demo", "--config.name=a b"]
    return subprocess.run(
        command, capture_output=True, text=True,
        env={"PATH": f"{folder}:{os.environ['PATH']}", "RESTART_SECONDS": "0", **slurm, **environment},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("statuses", "expected", "starts", "queued"),
    [
        ("0", 0, 1, False),
        ("2", 2, 1, False),
        ("76 137 0", 0, 3, False),
        ("76 76 1 76", 76, 4, False),
        ("76 130", 0, 2, True),
        ("143", 0, 1, True),
    ],
)
def test_slurm_starts_again_what_is_worth_it(tmp_path, statuses, expected, starts, queued):
    assert sbatch(tmp_path, statuses).returncode == expected
    calls = calls_in(tmp_path)
    assert sum(call.startswith("srun") for call in calls) == starts
    assert ("scontrol requeue 41" in calls) == queued


def test_slurm_names_the_job_when_a_process_has_a_node(tmp_path):
    sbatch(tmp_path, "0")
    assert sorted((tmp_path / "job").read_text().splitlines()) == [
        "TRACERL_COORDINATOR=node07:20041",
        "TRACERL_PROCESSES=2",
    ]
    (call,) = (call for call in calls_in(tmp_path) if call.startswith("srun"))
    assert "TRACERL_PROCESS_ID=$SLURM_PROCID exec" in call and call.endswith(
        "tracerl rl --config demo --config.name=a b"
    )


def test_slurm_leaves_a_process_a_gpu_to_jax(tmp_path):
    sbatch(tmp_path, "0", SLURM_NTASKS="16")
    assert (tmp_path / "job").read_text() == ""
    assert calls_in(tmp_path)[-1].endswith("--wait=180 tracerl rl --config demo --config.name=a b")


# GKE


def test_the_jobset_has_known_fields_and_its_values():
    text = string.Template((LAUNCH / "gke_jobset.yaml").read_text()).substitute(JOBSET_VALUES)
    jobset = yaml.safe_load(text)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    spec = jobset["spec"]
    assert set(spec) <= JOBSET_FIELDS and spec["failurePolicy"]["maxRestarts"] == 20
    for rule in spec["failurePolicy"]["rules"]:
        assert {"name", "action"} <= set(rule) <= RULE_FIELDS
        assert re.fullmatch("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
    (slices,) = spec["replicatedJobs"]
    job = slices["template"]["spec"]
    assert slices["replicas"] == 2 and set(job) <= JOB_FIELDS and job["parallelism"] == job["completions"] == 16
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy needs it
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]
    assert container["args"] == ["exec tracerl rl --config demo"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_the_jobset_says_which_values_it_takes():
    text = (LAUNCH / "gke_jobset.yaml").read_text()
    head, _, body = text.partition("\napiVersion")
    assert {name for name in JOBSET_VALUES if f"{name}=" in head} == set(re.findall(r"\$\{(\w+)\}", body))


# TPU VM


@pytest.fixture
def tpu_vm(tmp_path):
    """Calls the script, where a slice of one host is a folder of this machine."""
    home = tmp_path / "home"
    (home / "venv" / "bin").mkdir(parents=True)
    stub(
        home / "venv" / "bin",
        "tracerl",
        'trap "echo saved; exit 130" TERM; echo begun; while true; do sleep 0.05; done',
    )
    stub(tmp_path, "gcloud", f"""
        for word; do case $word in --command=*) cd {home}; bash -c "${{word#--command=}}" || exit ;; esac; done
        [ "$5" = describe ] && echo ACTIVE || true""")  # fmt: skip
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NAME": "first", "ZONE": "us-east5-a"}

    def call(*argv: str, **more: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [LAUNCH / "tpu_vm.sh", *argv], env=environment | more, capture_output=True, text=True, timeout=60
        )

    yield call
    call("stop")


def test_a_run_on_a_slice_starts_is_seen_and_stops(tpu_vm, tmp_path):
    assert "not running" in tpu_vm("status").stdout
    started = tpu_vm("run", "rl", "--config", "demo", "--config.name=a b", MAX_RESTARTS="7")
    assert started.returncode == 0, started.stderr
    assert "ACTIVE" in (seen := tpu_vm("status").stdout) and ": running" in seen
    again = tpu_vm("run", "rl", "--config", "demo")
    assert "already running" in again.stdout and again.returncode
    assert "saved" in tpu_vm("stop").stdout
    assert "not running: saved" in tpu_vm("status").stdout
    assert calls_in(tmp_path / "home/venv/bin") == [
        "tracerl launch --max_restarts=7 -- rl --config demo --config.name=a b"
    ]
    ssh = [call for call in calls_in(tmp_path) if " ssh " in call]
    assert all(
        call.startswith("gcloud alpha compute tpus queued-resources ssh first --zone=us-east5-a") for call in ssh
    )
    assert all("--node=all --worker=all" in call for call in ssh)


def test_what_a_slice_needs_is_asked_for(tpu_vm):
    assert "set TYPE" in tpu_vm("create").stderr
    assert "set NAME" in tpu_vm("create", NAME="").stderr
    usage = tpu_vm("crate")
    assert usage.returncode == 2 and "launch/tpu_vm.sh create" in usage.stdout
