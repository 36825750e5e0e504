"""Is this installation sound? Facts of the machine first (`probe`), then what they mean (`diagnose`), with each fix.

`diagnose` is a pure function of the facts, so every known-bad combination can be tested without having one.
"""

import importlib.machinery
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tracerl_jax.units import GIB

PACKAGES = (
    "tracerl_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "ml-collections",
    "safetensors", "numpy", "kernels", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin",
)  # fmt: skip
REQUIRED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "datasets", "ml-collections")
CUDA_PLUGINS = {"jax-cuda12-plugin": 525, "jax-cuda13-plugin": 580}  # -> oldest driver (CUDA 12.0, 13.0 release notes)
PLATFORMS = ("cpu", "gpu", "cuda", "rocm", "tpu")
GOOGLE_VENDOR = "0x1ae0"
TPU_DEVICE_IDS = ("0x0027", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")  # v2/v3, v4, v5p, v5e, v6e, 7x
DEVICE_TIMEOUT = 120  # seconds; a TPU that another process holds never answers

# Run in a process of its own: a broken jax may raise, hang or abort, and doctor must survive to say so.
DEVICE_SCRIPT = """
import json, jax
devices = [
    {"platform": d.platform, "kind": d.device_kind, "memory": (d.memory_stats() or {}).get("bytes_limit")}
    for d in jax.local_devices()
]
print(json.dumps(devices))
"""


@dataclass(frozen=True)
class Device:
    platform: str  # cpu, gpu, tpu
    kind: str
    memory: int | None  # bytes; None where the backend does not say


@dataclass(frozen=True)
class Facts:
    """What `probe` found."""

    python: tuple[int, ...]
    versions: dict[str, str]  # of PACKAGES, those installed
    devices: tuple[Device, ...] = ()
    device_error: str | None = None  # why jax shows no devices
    jax_platforms: str | None = None  # the environment variable
    nvidia: bool = False  # an NVIDIA GPU is visible to the kernel
    nvidia_driver: int | None = None  # major version
    tpu: bool = False  # a TPU is visible to the kernel
    shadow: str | None = None  # regular package `kernels` that is not the Hugging Face one
    disk_free: int = 0  # bytes, of the working directory
    memory: int = 0  # bytes of the host


@dataclass(frozen=True)
class Finding:
    level: Literal["broken", "warning"]
    problem: str
    fix: str


@dataclass(frozen=True)
class Report:
    facts: Facts
    findings: list[Finding]

    @property
    def broken(self) -> bool:
        return any(finding.level == "broken" for finding in self.findings)


def collect() -> Report:
    """Probe this machine and judge it. Takes the seconds jax needs to start its devices."""
    facts = probe()
    return Report(facts, diagnose(facts))


# ---------------------------------------------------------------------------------------------------------------------
# Judging


def diagnose(facts: Facts) -> list[Finding]:
    """Findings, broken ones first."""
    findings = [
        *_diagnose_versions(facts),
        *_diagnose_accelerators(facts),
        *_diagnose_devices(facts),
        *_diagnose_surroundings(facts),
    ]
    return sorted(findings, key=lambda finding: finding.level != "broken")


def _diagnose_versions(facts: Facts) -> Iterator[Finding]:
    versions = facts.versions
    for name in REQUIRED:
        if name not in versions:
            yield Finding("broken", f"{name} is not installed", "pip install tracerl_jax (or, in a checkout, -e .)")
    if facts.python < (3, 11):
        yield Finding("broken", f"Python {_dots(facts.python)} is too old", "use Python 3.11 or newer")
    jax, flax = _version(facts, "jax"), _version(facts, "flax")
    if jax is None:
        return
    if jax < (0, 10):
        yield Finding("broken", f"jax {versions['jax']} is too old", 'pip install -U "jax>=0.10.0"')
    if jax >= (0, 11) and facts.python < (3, 12):
        yield Finding(
            "broken",
            f"jax {versions['jax']} does not support Python {_dots(facts.python)}",
            'use Python 3.12, or pip install "jax<0.11" "flax<0.12.9"',
        )
    if versions.get("jaxlib", versions["jax"]).split(".")[:3] != versions["jax"].split(".")[:3]:
        yield Finding(
            "broken",
            f"jax {versions['jax']} and jaxlib {versions['jaxlib']} are different releases",
            f"pip install -U jax=={versions['jax']} jaxlib=={versions['jax']}",
        )
    if jax >= (0, 11, 1) and flax is not None and flax < (0, 12, 9):
        yield Finding(
            "warning",
            f"flax {versions['flax']} with jax {versions['jax']}: `import flax.nnx` fails. tracerl_jax itself does not "
            "use it",
            'pip install -U "flax>=0.12.10"',
        )


def _diagnose_accelerators(facts: Facts) -> Iterator[Finding]:
    versions, plugins = facts.versions, [name for name in CUDA_PLUGINS if name in facts.versions]
    old_driver = facts.nvidia_driver is not None and facts.nvidia_driver < CUDA_PLUGINS["jax-cuda13-plugin"]
    install = 'pip install -U "jax[cuda12]"' if old_driver else 'pip install -U "tracerl_jax[cuda]"'
    if facts.nvidia and not plugins:
        yield Finding("warning", "an NVIDIA GPU is here, but jax has no CUDA plugin and will not use it", install)
    if facts.tpu and "libtpu" not in versions:
        yield Finding(
            "warning",
            "a TPU is here, but libtpu is not installed and jax will not use it",
            'pip install -U "tracerl_jax[tpu]"',
        )
    if plugins and "libtpu" in versions and not facts.jax_platforms:  # as they are where programs are only planned
        used, unused = ("tpu", plugins) if facts.tpu and not facts.nvidia else ("cuda", ["libtpu"])
        yield Finding(
            "warning",
            f"libtpu and {plugins[0]} are both installed, and each may keep the other's devices from starting",
            f"export JAX_PLATFORMS={used},cpu, or pip uninstall {' '.join(unused)}",
        )
    if len(plugins) > 1:
        yield Finding(
            "warning",
            "two CUDA plugins are installed; jax may load either",
            "pip uninstall jax-cuda12-plugin jax-cuda12-pjrt",
        )
    for name in plugins:
        if "jaxlib" in versions and versions[name] != versions["jaxlib"]:
            yield Finding(
                "broken",
                f"{name} {versions[name]} does not fit jaxlib {versions['jaxlib']}, and jax ignores it",
                f'pip install -U "jax[{name.split("-")[1]}]=={versions["jaxlib"]}"',
            )
        if facts.nvidia_driver is not None and facts.nvidia_driver < CUDA_PLUGINS[name]:
            yield Finding(
                "broken",
                f"{name} needs NVIDIA driver {CUDA_PLUGINS[name]} or newer, this is {facts.nvidia_driver}",
                f"update the driver, or: pip uninstall {name}; {install}",
            )


def _diagnose_devices(facts: Facts) -> Iterator[Finding]:
    chosen = [name for name in (facts.jax_platforms or "").lower().split(",") if name]
    unknown = [name for name in chosen if name not in PLATFORMS]
    if facts.device_error and "jax" in facts.versions:
        fix = 'pip install --force-reinstall --no-deps "jax=={jax}" "jaxlib=={jax}"'.format(**facts.versions)
        if unknown:
            fix = f"unset JAX_PLATFORMS: it names {unknown[0]!r}, which is none of {', '.join(PLATFORMS)}"
        elif chosen:
            fix = f"unset JAX_PLATFORMS (it is {facts.jax_platforms!r})"
        yield Finding("broken", f"jax does not start: {facts.device_error}", fix)
    if not facts.devices or any(device.platform != "cpu" for device in facts.devices):
        return
    present = [
        name
        for name, visible, plugins in (("GPU", facts.nvidia, CUDA_PLUGINS), ("TPU", facts.tpu, ("libtpu",)))
        if visible and any(plugin in facts.versions for plugin in plugins)
    ]
    for name in present:
        if chosen:
            fix = f"unset JAX_PLATFORMS (it is {facts.jax_platforms!r})"
        elif name == "GPU":
            fix = "python -c 'import jax; jax.devices()' says why; nvidia-smi shows whether the driver works here"
        else:
            fix = "end the process that holds the TPU (sudo lsof -w /dev/accel* /dev/vfio/*)"
        yield Finding("warning", f"a {name} and its plugin are here, but jax runs on the CPU", fix)


def _diagnose_surroundings(facts: Facts) -> Iterator[Finding]:
    if facts.shadow:
        yield Finding(
            "warning",
            f"{facts.shadow} hides the Hugging Face package `kernels`, which breaks transformers and pip",
            f"remove {facts.shadow}/__init__.py, or work in another directory",
        )
    if facts.disk_free < 10 * GIB:
        level = "broken" if facts.disk_free < GIB else "warning"
        problem = f"{facts.disk_free / GIB:.1f} GiB of disk free here: checkpoints may not fit"
        yield Finding(level, problem, "free some space, or set --config.runs_dir to another disk")


def _version(facts: Facts, name: str) -> tuple[int, ...] | None:
    """Leading numbers: ``"0.12.0.1"`` -> ``(0, 12, 0, 1)``."""
    match = re.match(r"\d+(\.\d+)*", facts.versions.get(name, ""))
    return tuple(int(part) for part in match[0].split(".")) if match else None


def _dots(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


# ---------------------------------------------------------------------------------------------------------------------
# Probing


def probe() -> Facts:
    """Facts of this machine, interpreter and working directory."""
    devices, device_error = _probe_devices()
    return Facts(
        python=sys.version_info[:3],
        versions=_probe_versions(),
        devices=devices,
        device_error=device_error,
        jax_platforms=os.environ.get("JAX_PLATFORMS"),
        nvidia=any(Path(device).exists() for device in ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")),
        nvidia_driver=_probe_nvidia_driver(Path("/proc/driver/nvidia/version")),
        tpu=_probe_tpu(Path("/sys/bus/pci/devices")),
        shadow=find_shadow([str(Path.cwd()), *sys.path]),
        disk_free=shutil.disk_usage(Path.cwd()).free,
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )


def find_shadow(path: list[str]) -> str | None:
    """Folder of the first regular package `kernels` on `path`, unless the Hugging Face distribution put it there."""
    spec = importlib.machinery.PathFinder.find_spec("kernels", path)
    if spec is None or spec.origin is None:  # not there, or a folder without __init__.py, which hides nothing
        return None
    folder = Path(spec.origin).parent
    owners = importlib.metadata.distributions(name="kernels", path=[str(folder.parent)])
    return None if any(owners) else str(folder)


def _probe_versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _probe_devices() -> tuple[tuple[Device, ...], str | None]:
    """Devices jax starts, or the last line of why it does not."""
    command = [sys.executable, "-c", DEVICE_SCRIPT]
    environment = os.environ | {"JAX_TRACEBACK_FILTERING": "off"}  # or a note about it is the last line of an error
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=DEVICE_TIMEOUT)
    except subprocess.TimeoutExpired:
        return (), f"no answer in {DEVICE_TIMEOUT} seconds; another process may hold the accelerator"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"python exited with status {done.returncode}"]
        return (), lines[-1]
    return tuple(Device(**device) for device in json.loads(done.stdout.splitlines()[-1])), None


def _probe_nvidia_driver(file: Path) -> int | None:
    """Major version from a line like ``NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  ...``."""
    match = re.search(r"Module\D*(?:for \S+\s+)?(\d+)\.\d+", file.read_text()) if file.exists() else None
    return int(match[1]) if match else None


def _probe_tpu(pci: Path) -> bool:
    """Whether a PCI device is one of the TPUs. (Google's network and disk devices have the same vendor.)"""
    for device in pci.glob("*"):
        vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "device"))
        if vendor == GOOGLE_VENDOR and kind in TPU_DEVICE_IDS:
            return True
    return False
