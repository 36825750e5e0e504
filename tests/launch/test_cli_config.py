"""`--config`, `--config.KEY=VALUE` and `--print_config`."""

import json
from dataclasses import dataclass, field

import pytest

from tracerl_jax.errors import ConfigError, UserError
from tracerl_jax.launch import cli
from tracerl_jax.launch.common import CommandParser, add_config_arguments, command_again, resolve, split_overrides
from tracerl_jax.parallel import job

FILE = """
from ml_collections import ConfigDict


def get_config(arg=None):
    return ConfigDict(dict(steps=int(arg or 10)))
"""


@dataclass(frozen=True)
class Optimizer:
    rate: float = field(default=1e-3, metadata={"doc": "peak learning rate"})


@dataclass(frozen=True)
class Run:
    steps: int = 1
    offset: int = 0
    optimizer: Optimizer = field(default=Optimizer(), metadata={"doc": "AdamW"})


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "example.py"
    path.write_text(FILE)
    return str(path)


def make_parser(default=None) -> CommandParser:
    parser = CommandParser(prog="tracerl rl", epilog="examples:\n  tracerl rl --config demo")
    parser.add_argument("--output")
    add_config_arguments(parser, Run, default)
    return parser


def test_both_spellings_of_an_override(file):
    argv = ["--config", file, "--config.optimizer.rate=0.5", "--output", "x", "--config.offset", "-3"]
    args = make_parser().parse(argv)
    assert resolve(args, Run) == Run(steps=10, offset=-3, optimizer=Optimizer(rate=0.5))
    assert args.output == "x"


def test_argument_and_default(file):
    assert resolve(make_parser().parse([f"--config={file}:7"]), Run).steps == 7
    assert resolve(make_parser(default=file).parse(["--config.offset=2"]), Run) == Run(steps=10, offset=2)


def test_config_is_required_without_a_default():
    with pytest.raises(UserError, match="--config"):
        make_parser().parse([])


@pytest.mark.parametrize("argv", [["--config.steps"], ["--config.steps", "--output", "x"]])
def test_override_without_value(argv):
    with pytest.raises(UserError, match=r"--config\.steps: needs a value"):
        make_parser().parse(argv)


@pytest.mark.parametrize(
    "flag, suggestion",
    [
        ("--optimizer.rate=3", "--config.optimizer.rate"),
        ("--rate=3", "--config.optimizer.rate"),
        ("--outptu=x", "--output"),
    ],
)
def test_unknown_flags_suggest_config_keys(file, flag, suggestion):
    with pytest.raises(UserError, match=f"did you mean {suggestion}?"):
        make_parser().parse(["--config", file, flag])


def test_a_mistyped_config_flag_is_named_rather_than_missed():
    with pytest.raises(UserError, match=r"unknown flag --confg; did you mean --config\?"):
        make_parser().parse(["--confg", "demo"])


def test_the_command_line_that_goes_on_keeps_what_was_asked():
    argv = ["--config=demo", "--config.steps=3", "--config.optimizer.rate=0.5", "--config.name=second run"]
    args = make_parser().parse(argv)
    assert command_again("demo", args, steps=6) == (
        "tracerl demo --config demo --config.optimizer.rate=0.5 '--config.name=second run' --config.steps=6"
    )
    assert "--config.optimizer.rate=1" in command_again("demo", args, optimizer__rate=1)
    assert "rate=0.5" not in command_again("demo", args, optimizer__rate=1)


def test_unknown_key(file):
    args = make_parser().parse(["--config", file, "--config.optimizer.rat=3"])
    with pytest.raises(ConfigError, match=r"did you mean --config\.optimizer\.rate\?"):
        resolve(args, Run)


def test_a_config_is_printed_without_the_other_processes_of_a_job(monkeypatch, capsys):
    monkeypatch.setattr(job, "join", lambda: pytest.fail("waits for them"))
    with pytest.raises(SystemExit):
        cli.main(["rl", "--config", "demo", "--print_config"])
    assert json.loads(capsys.readouterr().out)["name"] == "demo"


def test_print_config(file, capsys):
    with pytest.raises(SystemExit) as caught:
        resolve(make_parser().parse(["--config", file, "--print_config", "--config.offset=2"]), Run)
    assert caught.value.code == 0
    assert json.loads(capsys.readouterr().out) == {"steps": 10, "offset": 2, "optimizer": {"rate": 1e-3}}


def test_help_lists_the_keys(file):
    text = make_parser().format_help()
    assert "tracerl rl --config demo" in text  # the command's own examples stay
    assert "optimizer.rate = 0.001  [float]\n      peak learning rate" in text


def test_split_overrides_keeps_the_rest_in_order():
    argv = ["a", "--config.x", "1", "b", "--config=f", "--config.y=2", "--z"]
    assert split_overrides(argv) == (["a", "b", "--config=f", "--z"], ["--config.x=1", "--config.y=2"])
