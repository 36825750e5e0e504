"""Installs the project beside a package called `kernels`, as transformers users have one from Hugging Face.

Nothing here needs a network: wheels are built and installed with what the running environment has, into environments
that see its packages through a .pth file. The Hugging Face package is played by a stub, except in the slow test.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("tracerl_jax", "kernels", "configs", "launch")

CHECK = """
import tracerl_jax.kernels.attention, tracerl_jax.launch.cli
import kernels
print(kernels.MARKER, kernels.__file__)
print(tracerl_jax.launch.cli.__file__)
"""


def run(*command: str | Path, cwd: Path, path: Path | None = None) -> str:
    """Output of a command that must succeed, run without this process's Python path."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "XLA_"))}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(python: Path, *arguments: str | Path, cwd: Path) -> str:
    """pip of the running environment, acting on another one."""
    offline = ("--no-index", "--no-deps", "--quiet")
    return run(sys.executable, "-m", "pip", "--python", python, *arguments, *offline, cwd=cwd)


def make_environment(folder: Path) -> tuple[Path, Path]:
    """(python, site-packages) of an environment that falls back on the running one's packages."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (site / "fallback.pth").write_text(sysconfig.get_path("purelib"))
    return python, site


def add_stub_kernels(site: Path) -> None:
    """A distribution `kernels` that only says it is the one."""
    info = site / "kernels-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.1\n")
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text("MARKER = 'hugging face'\n")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what is packaged, so that no build product lands in this checkout."""
    copy = tmp_path_factory.mktemp("source") / "tracerl"
    copy.mkdir()
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    folder, building = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("building") / "tracerl"
    shutil.copytree(checkout, building)
    pip(Path(sys.executable), "wheel", building, "--no-build-isolation", "--wheel-dir", folder, cwd=folder)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module", params=["wheel", "editable", "not installed"])
def environment(request, checkout, tmp_path_factory):
    """(python, extra import path) with the project installed in one of three ways, and the stub `kernels`."""
    folder = tmp_path_factory.mktemp("environment")
    python, site = make_environment(folder)
    add_stub_kernels(site)
    if request.param == "wheel":
        pip(python, "install", request.getfixturevalue("wheel"), cwd=folder)
    elif request.param == "editable":
        pip(python, "install", "--no-build-isolation", "--editable", checkout, cwd=folder)
    return python, checkout if request.param == "not installed" else None


@pytest.mark.parametrize("place", ["repository", "elsewhere"])
def test_both_packages_called_kernels_work(environment, checkout, tmp_path, place):
    python, path = environment
    cwd = checkout if place == "repository" else tmp_path
    marker, command_line = run(python, "-c", CHECK, cwd=cwd, path=path).splitlines()
    assert marker.startswith("hugging face ")
    assert command_line.endswith(f"launch{os.sep}cli.py")


def test_console_script(wheel, tmp_path):
    python, _ = make_environment(tmp_path / "environment")
    pip(python, "install", wheel, cwd=tmp_path)
    script = python.parent / "tracerl"
    assert run(script, "--version", cwd=tmp_path).startswith("tracerl ")
    assert "doctor" in run(python, "-m", "tracerl_jax", "--help", cwd=tmp_path)


def test_an_installed_package_does_not_look_outside_its_folder(wheel, tmp_path):
    """A stray setup.py and the other `kernels` beside it must not turn site-packages into a source checkout."""
    python, site = make_environment(tmp_path / "environment")
    add_stub_kernels(site)
    (site / "setup.py").touch()
    pip(python, "install", wheel, cwd=tmp_path)
    script = "import tracerl_jax, tracerl_jax.kernels; print(*tracerl_jax.__path__, *tracerl_jax.kernels.__path__)"
    package = site / "tracerl_jax"
    assert run(python, "-c", script, cwd=tmp_path).split() == [str(package), str(package / "kernels")]


def test_wheel_holds_every_file_and_one_top_level_package(wheel, checkout):
    below = {"tracerl_jax": "", "kernels": "tracerl_jax/", "configs": "tracerl_jax/", "launch": "tracerl_jax/"}
    sources = {
        below[folder] + file.relative_to(checkout).as_posix()
        for folder in FOLDERS
        for file in (checkout / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert files == sources


def test_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = Parser().parsestr(archive.read(name).decode())
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert any(line.startswith("jax>=") for line in required)
    bare = [line.partition(";")[0] for line in required]  # without "; sys_platform == .."
    assert not [line for line in bare if "<" in line or "==" in line or "[" in line or "torch" in line]
    assert {"tpu", "cuda", "serve", "eval", "wandb", "tensorboard", "test"} <= set(metadata.get_all("Provides-Extra"))
    assert metadata["License"] == "Apache-2.0" or metadata["License-Expression"] == "Apache-2.0"
    assert [name for name in archive.namelist() if name.endswith("LICENSE")]
    assert metadata["Requires-Python"] == ">=3.11"


@pytest.mark.slow
def test_with_the_real_kernels_package(checkout, tmp_path):
    """Needs a package index. pip itself, with `kernels` installed, builds from the root of the repository."""
    python, _ = make_environment(tmp_path / "environment")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "kernels", cwd=tmp_path)
    building = tmp_path / "tracerl"
    shutil.copytree(checkout, building)
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", ".", cwd=building)
    script = "import tracerl_jax.kernels.attention, transformers, kernels; print(kernels.get_kernel.__module__)"
    for cwd in (building, tmp_path):
        assert run(python, "-c", script, cwd=cwd).startswith("kernels.")
