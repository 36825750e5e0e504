"""Every known-bad combination is recognised from the facts, with its fix; and this machine is judged sound."""

import dataclasses
import json
import sys

import pytest

from tracerl_jax import doctor
from tracerl_jax.doctor import Device, Facts, Finding, Report, diagnose
from tracerl_jax.launch import cli
from tracerl_jax.launch import doctor as command
from tracerl_jax.units import GIB

VERSIONS = {
    "tracerl_jax": "0.1.0",
    "jax": "0.12.0.1",
    "jaxlib": "0.12.0.1",
    "flax": "0.12.12",
    "optax": "0.2.8",
    "orbax-checkpoint": "0.12.8",
    "transformers": "5.23.0",
    "datasets": "5.2.0",
    "ml-collections": "1.1.0",
}
CPU, GPU = Device("cpu", "cpu", None), Device("gpu", "NVIDIA H100", 80 * GIB)
SOUND = Facts(python=(3, 12, 1), versions=VERSIONS, devices=(CPU,), disk_free=100 * GIB, memory=16 * GIB)
CUDA13 = {"jax-cuda13-plugin": "0.12.0.1"}
CUDA12 = {"jax-cuda12-plugin": "0.12.0.1"}
LIBTPU = {"libtpu": "0.0.52"}


def facts(versions=None, without=(), **changes) -> Facts:
    """SOUND with changes; `versions` are added, `without` are taken out."""
    merged = {name: version for name, version in (VERSIONS | (versions or {})).items() if name not in without}
    return dataclasses.replace(SOUND, versions=merged, **changes)


@pytest.mark.parametrize(
    "found",
    [
        SOUND,
        facts({"jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.12.8"}, python=(3, 11, 7)),
        facts(CUDA13, nvidia=True, nvidia_driver=580, devices=(GPU,)),
        facts(CUDA12, nvidia=True, nvidia_driver=535, devices=(GPU,)),
        facts(LIBTPU, tpu=True, devices=(Device("tpu", "TPU v5p", 95 * GIB),)),
        facts(CUDA13 | LIBTPU, jax_platforms="cpu"),  # compiling for TPUs and GPUs without one
        facts(jax_platforms=""),
    ],
)
def test_sound_installations(found):
    assert diagnose(found) == []


@pytest.mark.parametrize(
    "found, level, problem, fix",
    [
        (facts(without=["flax"]), "broken", "flax is not installed", "pip install"),
        (facts(python=(3, 10, 13)), "broken", "Python 3.10.13 is too old", "3.11"),
        (facts({"jax": "0.9.2", "jaxlib": "0.9.2"}), "broken", "jax 0.9.2 is too old", "jax>=0.10.0"),
        (facts(python=(3, 11, 7)), "broken", "does not support Python 3.11", "jax<0.11"),
        (facts({"jaxlib": "0.11.2"}), "broken", "different releases", "jaxlib==0.12.0.1"),
        (facts({"flax": "0.12.8"}), "warning", "`import flax.nnx` fails", "flax>=0.12.10"),
        (facts(nvidia=True), "warning", "no CUDA plugin", "tracerl_jax[cuda]"),
        (facts(nvidia=True, nvidia_driver=535), "warning", "no CUDA plugin", "jax[cuda12]"),
        (facts(tpu=True), "warning", "libtpu is not installed", "tracerl_jax[tpu]"),
        (facts(CUDA13 | LIBTPU, devices=(GPU,)), "warning", "both installed", "pip uninstall libtpu"),
        (facts(CUDA13 | LIBTPU, tpu=True), "warning", "both installed", "JAX_PLATFORMS=tpu,cpu, or pip uninstall"),
        (facts(CUDA12 | CUDA13), "warning", "two CUDA plugins", "uninstall jax-cuda12-plugin"),
        (facts({"jax-cuda13-plugin": "0.11.2"}), "broken", "does not fit jaxlib 0.12.0.1", "jax[cuda13]==0.12.0.1"),
        (facts(CUDA13, nvidia=True, nvidia_driver=550, devices=(GPU,)), "broken", "driver 580", "jax[cuda12]"),
        (facts(CUDA13, nvidia=True, nvidia_driver=580), "warning", "a GPU and its plugin are here", "nvidia-smi"),
        (facts(CUDA13, nvidia=True, jax_platforms="cpu"), "warning", "runs on the CPU", "unset JAX_PLATFORMS"),
        (facts(LIBTPU, tpu=True), "warning", "a TPU and its plugin are here", "lsof"),
        (facts(jax_platforms="gpus", devices=(), device_error="no gpus"), "broken", "no gpus", "it names 'gpus'"),
        (facts(jax_platforms="tpu", devices=(), device_error="no tpu"), "broken", "no tpu", "unset JAX_PLATFORMS"),
        (facts(devices=(), device_error="Illegal instruction"), "broken", "Illegal instruction", "jaxlib"),
        (facts(shadow="/src/kernels"), "warning", "/src/kernels hides", "/src/kernels/__init__.py"),
        (facts(disk_free=5 * GIB), "warning", "5.0 GiB of disk free", "runs_dir"),
        (facts(disk_free=GIB // 2), "broken", "0.5 GiB of disk free", "runs_dir"),
    ],
)
def test_known_bad_combinations(found, level, problem, fix):
    matching = [finding for finding in diagnose(found) if problem in finding.problem]
    assert [finding.level for finding in matching] == [level]
    assert fix in matching[0].fix


def test_broken_comes_first():
    findings = diagnose(facts({"flax": "0.12.8", "jaxlib": "0.11.2"}))
    assert [finding.level for finding in findings] == ["broken", "warning"]


@pytest.mark.parametrize(
    "line, driver",
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023", 535),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (builder)", 580),
        ("unreadable", None),
    ],
)
def test_nvidia_driver(tmp_path, line, driver):
    file = tmp_path / "version"
    assert doctor._probe_nvidia_driver(file) is None
    file.write_text(line + "\nGCC version:  gcc version 12.2.0\n")
    assert doctor._probe_nvidia_driver(file) == driver


@pytest.mark.parametrize("vendor, kind, tpu", [("0x1ae0", "0x0062", True), ("0x1ae0", "0x0042", False)])
def test_tpu(tmp_path, vendor, kind, tpu):
    assert not doctor._probe_tpu(tmp_path)
    device = tmp_path / "0000:00:04.0"
    device.mkdir()
    (device / "vendor").write_text(vendor + "\n")
    (device / "device").write_text(kind + "\n")
    assert doctor._probe_tpu(tmp_path) is tpu


def test_shadowed_kernels(tmp_path):
    installed, checkout, shadow = (tmp_path / name for name in ("site", "checkout", "shadow"))
    for folder in (installed, checkout, shadow):
        (folder / "kernels").mkdir(parents=True)
    for folder in (installed, shadow):
        (folder / "kernels" / "__init__.py").touch()
    info = installed / "kernels-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.1\n")
    assert doctor.find_shadow([str(tmp_path)]) is None
    assert doctor.find_shadow([str(checkout), str(installed)]) is None  # a folder without __init__.py hides nothing
    assert doctor.find_shadow([str(installed), str(shadow)]) is None
    assert doctor.find_shadow([str(shadow), str(installed)]) == str(shadow / "kernels")


def test_devices_that_do_not_start(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "nonsense")
    devices, error = doctor._probe_devices()
    assert devices == () and "nonsense" in error


def test_devices_that_never_answer(monkeypatch):
    monkeypatch.setattr(doctor, "DEVICE_SCRIPT", "import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "DEVICE_TIMEOUT", 0.2)
    assert "no answer" in doctor._probe_devices()[1]


def test_this_machine_is_sound(capsys):
    report = doctor.collect()
    assert report.facts.python == sys.version_info[:3]
    assert {"jax", "flax"} <= set(report.facts.versions)
    assert report.facts.devices and report.facts.device_error is None
    broken = [finding for finding in report.findings if finding.level == "broken" and "disk" not in finding.problem]
    assert broken == []


OLD_JAX, SHADOW = Finding("broken", "jax is too old", "pip install -U jax"), Finding("warning", "shadow", "remove it")
BROKEN = Report(facts(devices=(CPU, CPU, GPU)), [OLD_JAX, SHADOW])


@pytest.mark.parametrize("findings, status", [([OLD_JAX, SHADOW], 1), ([SHADOW], 0), ([], 0)])
def test_command_exit_status(monkeypatch, findings, status):
    monkeypatch.setattr(doctor, "collect", lambda: Report(SOUND, findings))
    monkeypatch.setattr(cli, "set_up_logging", lambda: None)
    assert cli.main(["doctor"]) == status


def test_command_output(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "collect", lambda: BROKEN)
    monkeypatch.setattr(cli, "set_up_logging", lambda: None)
    cli.main(["doctor", "--json"])
    parsed = json.loads(capsys.readouterr().out)
    assert parsed["findings"][0] == {"level": "broken", "problem": "jax is too old", "fix": "pip install -U jax"}
    assert parsed["facts"]["versions"]["jax"] == "0.12.0.1"
    text = command.format_report(BROKEN)
    for line in (
        "python 3.12.1",
        "jax 0.12.0.1",
        "devices: 2 x cpu (cpu, 16.0 GiB)",
        "devices: 1 x gpu (NVIDIA H100, 80.0 GiB)",
        "broken: jax is too old",
        "    fix: pip install -U jax",
    ):
        assert line in text.splitlines()
    assert "no known problem" in command.format_report(Report(SOUND, []))
