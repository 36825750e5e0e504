"""Rules of the repository that no single module can keep."""

import ast
import importlib
import re
import subprocess
from pathlib import Path

import pytest

from tracerl_jax.config import RunConfig
from tracerl_jax.config_io import installed_configs, load_config
from tracerl_jax.launch.cli import COMMANDS
from tracerl_jax.launch.common import CommandParser

ROOT = Path(__file__).parents[1]
TOP_LEVEL = {"tracerl_jax", "kernels", "configs", "launch", "tests", "docs", "benchmarks", ".ci"}
NAMESPACES = ("kernels", "configs", "launch")
PACKAGED = ("tracerl_jax", *NAMESPACES)
README = ROOT / "README.md"


def python_files(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def imported_packages(file: Path) -> set[str]:
    """First names of everything a file imports absolutely, at any depth of the code."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.partition(".")[0])
    return names


def test_the_top_level_folders_are_fixed():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert {line.partition("/")[0] for line in listed.stdout.splitlines() if "/" in line} <= TOP_LEVEL


def test_no_folder_hides_an_installed_package():
    assert [folder for folder in NAMESPACES if (ROOT / folder / "__init__.py").exists()] == []


def test_no_torch_no_tensorflow_and_our_folders_by_their_full_name():
    forbidden = {"torch", "tensorflow", *NAMESPACES}
    found = {
        str(file.relative_to(ROOT)): sorted(forbidden & imported_packages(file))
        for file in [ROOT / "setup.py", *python_files(*PACKAGED, "tests", "benchmarks")]
    }
    assert {file: names for file, names in found.items() if names} == {}


def test_modules_stay_readable():
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in python_files(*PACKAGED)}
    assert {file: length for file, length in lengths.items() if length > 600} == {}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name):
    module = importlib.import_module(f"tracerl_jax.launch.{name}")
    parser = CommandParser(prog=f"tracerl {name}", description=module.HELP, epilog=getattr(module, "EPILOG", None))
    module.add_arguments(parser)
    assert " ".join(module.HELP.split()) in " ".join(parser.format_help().split()) and callable(module.run)
    undocumented = [action.option_strings or action.dest for action in parser._actions if not action.help]
    assert undocumented == []


@pytest.mark.parametrize("name", installed_configs())
def test_every_config_fits_the_schema_and_says_what_it_is_for(name):
    load_config(RunConfig, name)
    assert ast.get_docstring(ast.parse(installed_configs()[name].read_text()))


def test_every_module_of_launch_is_a_command():
    assert {file.stem for file in python_files("launch")} - {"cli", "common"} == set(COMMANDS)


@pytest.mark.skipif(not README.exists(), reason="no README.md")
def test_readme_names_only_what_exists():
    text = README.read_text()
    code = re.findall(r"```.*?```|`[^`\n]+`", text, flags=re.DOTALL)
    commands = {name for part in code for name in re.findall(r"(?<![\w./-])tracerl ([a-z]+)", part)}
    targets = {name for part in code for name in re.findall(r"(?<![\w./-])make ([a-z]+)", part)}
    paths = {path for path in re.findall(r"\b(?:configs|launch|docs|kernels|benchmarks|tests)/[\w./-]*\w", text)}
    assert commands and commands <= set(COMMANDS)
    assert targets <= set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert sorted(path for path in paths if not (ROOT / path).exists()) == []
