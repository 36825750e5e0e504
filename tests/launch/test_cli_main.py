"""The frame of the console script: dispatch, exit statuses, what goes to stderr."""

import errno
import os
import subprocess
import sys
import types

import pytest

from tracerl_jax.errors import DataError
from tracerl_jax.launch import cli


@pytest.fixture
def command(monkeypatch):
    """Registers a sub-command `fake` whose run() is given."""
    monkeypatch.delenv("TRACERL_DEBUG", raising=False)
    monkeypatch.setattr(cli, "set_up_logging", lambda: None)  # pytest has its own

    def register(run):
        module = types.ModuleType("tracerl_jax.launch.fake")
        module.HELP = "A command of this test."
        module.EPILOG = "examples:\n  tracerl fake --number 3"
        module.add_arguments = lambda parser: parser.add_argument("--number", type=int, help="a number")
        module.run = run
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(cli.COMMANDS, "fake", "a command of this test")

    return register


def raising(error: BaseException):
    def run(args):
        raise error

    return run


def test_status_is_what_run_returns(command):
    command(lambda args: args.number)
    assert cli.main(["fake", "--number", "1"]) == 1
    assert cli.main(["fake", "--number=0"]) == 0


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_lists_every_command(capsys, argv):
    assert cli.main(argv) == 0
    output = capsys.readouterr().out
    for name, summary in cli.COMMANDS.items():
        assert f"  {name:<10}{summary}\n" in output


def test_help_of_a_command_shows_description_flags_and_examples(command, capsys):
    command(lambda args: 0)
    with pytest.raises(SystemExit) as caught:
        cli.main(["fake", "--help"])
    assert caught.value.code == 0
    output = capsys.readouterr().out
    for part in ("usage: tracerl fake", "A command of this test.", "--number", "  tracerl fake --number 3"):
        assert part in output


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["reprot"], ["unknown command reprot", "did you mean report?"]),
        (["xyzzy"], ["unknown command xyzzy", "demo, rl, sft"]),
        (["fake", "--nmber", "3"], ["unknown flag --nmber", "did you mean --number?", "tracerl fake --help"]),
        (["fake", "--numb=3"], ["unknown flag --numb", "--number"]),
        (["fake", "stray"], ["unexpected argument stray"]),
        (["fake", "--number", "x"], ["--number", "invalid int value: 'x'"]),
        (["fake", "--config.a=3"], ["unknown flag --config.a"]),
    ],
)
def test_bad_command_lines(command, capsys, argv, parts):
    command(lambda args: 0)
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("tracerl: error: ")
    for part in parts:
        assert part in captured.err


def test_user_error_is_one_line_without_traceback(command, capsys):
    command(raising(DataError("rows.jsonl, line 3: no prompt")))
    assert cli.main(["fake"]) == 2
    assert capsys.readouterr().err == "tracerl: error: rows.jsonl, line 3: no prompt\n"


def test_debug_shows_the_traceback(command, capsys, caplog, monkeypatch):
    command(raising(DataError("no prompt")))
    monkeypatch.setenv("TRACERL_DEBUG", "1")
    assert cli.main(["fake"]) == 2
    assert "in run" in caplog.text and "DataError: no prompt" in caplog.text
    assert capsys.readouterr().err.endswith("tracerl: error: no prompt\n")


def test_full_disk(command, capsys):
    command(raising(OSError(errno.ENOSPC, "No space left on device", "runs/a/metrics.jsonl")))
    assert cli.main(["fake"]) == 2
    assert "disk full while writing runs/a/metrics.jsonl" in capsys.readouterr().err


def test_other_failures_are_not_hidden(command):
    command(raising(PermissionError(errno.EACCES, "Permission denied")))
    with pytest.raises(PermissionError):
        cli.main(["fake"])


def test_interrupt(command, capsys):
    command(raising(KeyboardInterrupt()))
    assert cli.main(["fake"]) == 130
    assert capsys.readouterr().err == "\ntracerl: interrupted\n"


def test_closed_pipe_is_quiet():
    process = subprocess.Popen(
        [sys.executable, "-m", "tracerl_jax", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()  # long before Python has started
    error = process.stderr.read()
    process.stderr.close()
    assert (process.wait(timeout=60), error) == (141, "")


def test_version_and_help_import_no_heavy_package():
    script = (
        "import sys; from tracerl_jax.launch.cli import main; main(['--help']); main(['--version']);"
        "print(sorted({'jax', 'numpy', 'ml_collections', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "tracerl 0." in done.stdout and done.stdout.endswith("\n[]\n")


@pytest.mark.parametrize(("node", "platforms"), [(None, "cpu"), ("nvidia0", None), ("accel0", None), ("vfio/3", None)])
def test_compilers_without_a_device_leave_jax_on_the_cpu(tmp_path, monkeypatch, node, platforms):
    monkeypatch.setattr(cli, "find_spec", lambda name: name)
    monkeypatch.setattr(cli.os, "environ", {})
    if node:
        (tmp_path / node).parent.mkdir(exist_ok=True)
        (tmp_path / node).touch()
    cli.stay_on_cpu(tmp_path)
    assert cli.os.environ.get("JAX_PLATFORMS") == platforms
    monkeypatch.setattr(cli.os, "environ", {"JAX_PLATFORMS": "cuda"})
    cli.stay_on_cpu(tmp_path)
    assert cli.os.environ["JAX_PLATFORMS"] == "cuda"


def test_logging_shows_our_progress_and_others_warnings():
    script = (
        "import logging; from tracerl_jax.launch.cli import set_up_logging; set_up_logging();"
        "logging.getLogger('tracerl_jax.rl').info('step 1'); logging.getLogger('orbax').info('chatter');"
        "from absl import logging as absl; absl.info('chatter'); logging.getLogger('orbax').warning('careful')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ | {"TZ": "UTC"}
    )
    lines = done.stderr.splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["step 1", "careful"] and done.stdout == ""
    assert len(lines[0].split(" ")[0]) == len("12:34:56")
