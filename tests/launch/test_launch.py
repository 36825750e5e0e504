"""`tracerl launch` with processes that are shell commands: who is started, told, killed and started again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tracerl_jax.launch import cli, launch
from tracerl_jax.parallel import distributed

SCRIPT = """
import logging, sys
from tracerl_jax.launch import launch
logging.basicConfig(format="%(message)s")
launch.LONGEST_DELAY = 0.0
options = {{{options}}}
sys.exit(launch.run_job(["sh", "-c", sys.argv[1]], **options))
"""


def start(shell: str, environment=os.environ, **options) -> subprocess.Popen:
    """A launcher in a process of its own: it takes signals, and adopts what its processes leave behind."""
    script = SCRIPT.format(options=", ".join(f"{name!r}: {value!r}" for name, value in options.items()))
    return subprocess.Popen(
        [sys.executable, "-c", script, shell], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={name: value for name, value in environment.items() if name not in launch.VARIABLES},
    )  # fmt: skip


def finish(shell: str, **options) -> tuple[int, list[str], str]:
    """(status, sorted lines of standard output, standard error)"""
    process = start(shell, **options)
    output, errors = process.communicate(timeout=60)
    return process.returncode, sorted(output.splitlines()), errors


def wait_for(condition, seconds: float = 30.0):
    until = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < until
        time.sleep(0.02)
    return value


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def pids_in(folder: Path, count: int) -> list[int]:
    """The processes whose shells began with `write_pid(folder)`, once there are `count`."""
    wait_for(lambda: len(list(folder.glob("*.pid"))) == count)
    return [int(path.read_text()) for path in folder.glob("*.pid")]


def write_pid(folder: Path, name: str = "$TRACERL_PROCESS_ID") -> str:
    return f"echo $$ > {folder}/{name}.new; mv {folder}/{name}.new {folder}/{name}.pid; "


def test_every_process_knows_its_place_and_all_the_same_coordinator():
    shell = 'echo "$TRACERL_PROCESS_ID of $TRACERL_PROCESSES at $TRACERL_COORDINATOR, $JAX_PLATFORMS $XLA_FLAGS"'
    environment = os.environ | {"XLA_FLAGS": f"--xla_a=1 {launch.DEVICE_COUNT}=8", "JAX_PLATFORMS": "cuda"}
    process = start(shell, environment, processes=3, devices_per_process=4)
    output, _ = process.communicate(timeout=60)
    lines = sorted(output.splitlines())
    assert process.returncode == 0
    (address,) = {line.split(" at ")[1].split(",")[0] for line in lines}
    assert address.startswith("127.0.0.1:")
    assert lines == [f"[{i}] {i} of 3 at {address}, cpu --xla_a=1 {launch.DEVICE_COUNT}=4" for i in range(3)]


def test_one_process_keeps_its_environment_and_its_output():
    assert finish('echo "<$TRACERL_COORDINATOR$TRACERL_PROCESSES>"') == (0, ["<>"], "")


def test_lines_stay_whole_and_on_their_stream():
    shell = 'printf "a"; sleep 0.2; printf "b\\nc"; printf "error" >&2; head -c 200000 /dev/zero | tr "\\0" x'
    status, output, errors = finish(shell, processes=2)
    assert status == 0
    assert [line for line in output if "a" in line] == ["[0] ab", "[1] ab"]
    assert sorted(errors.splitlines()) == ["[0] error", "[1] error"]
    assert sum(line.count("x") for line in output) == 400_000 and output[-1][:4] in ("[0] ", "[1] ")


def test_when_one_fails_the_others_get_their_grace_and_are_killed(tmp_path):
    shell = f'{write_pid(tmp_path)} [ $TRACERL_PROCESS_ID = 1 ] && exit 76; trap "" TERM; sleep 60'
    status, _, errors = finish(shell, processes=2, grace=0.5)
    assert status == 76
    assert "process 1 ended with status 76" in errors and "killing process 0" in errors
    assert not any(map(is_alive, pids_in(tmp_path, 2)))


def test_a_process_that_ends_within_the_grace_is_not_killed():
    shell = "[ $TRACERL_PROCESS_ID = 1 ] && kill -9 $$; sleep 0.5; echo stack; exit 76"
    status, output, errors = finish(shell, processes=2, grace=60.0)
    assert (status, output) == (137, ["[0] stack"])
    assert "process 1 ended by SIGKILL" in errors and "killing" not in errors


@pytest.mark.parametrize(
    ("exits", "restarts", "expected", "starts"),
    [
        ("76 0", 3, 0, 2),
        ("1 76 1", 2, 1, 3),
        ("76", 0, 76, 1),
        ("2 0", 3, 2, 1),  # a wrong config is as wrong the second time
        ("130 0", 3, 130, 1),
    ],
)
def test_a_failure_is_worth_as_many_restarts_as_allowed(tmp_path, exits, restarts, expected, starts):
    shell = f"cd {tmp_path}; echo >> starts; set -- {exits}; shift $(($(wc -l < starts) - 1)); exit $1"
    status, _, errors = finish(shell, max_restarts=restarts)
    assert status == expected
    assert len((tmp_path / "starts").read_text().splitlines()) == starts
    assert errors.count("restart ") == starts - 1


def test_a_mistake_counts_though_another_process_failed_before():
    shell = "[ $TRACERL_PROCESS_ID = 1 ] && exit 76; sleep 0.5; exit 2"
    assert finish(shell, processes=2, max_restarts=1)[0] == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_every_process_and_nothing_is_restarted(tmp_path, number):
    name = signal.Signals(number).name.removeprefix("SIG")
    shell = f'trap "echo saved; exit 130" {name}; {write_pid(tmp_path)} while true; do sleep 0.05; done'
    process = start(shell, processes=2, max_restarts=3)
    pids_in(tmp_path, 2)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and sorted(output.splitlines()) == ["[0] saved", "[1] saved"]


def test_a_signal_that_comes_while_processes_are_started_is_passed_on():
    script = """
import os, signal, sys
from tracerl_jax.launch import launch

class Attempt(launch._Attempt):
    def __init__(self, *args):
        super().__init__(*args)
        os.kill(os.getpid(), signal.SIGTERM)

launch._Attempt = Attempt
sys.exit(launch.run_job(["sleep", "300"], max_restarts=1))
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 128 + signal.SIGTERM


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG")
def test_processes_die_with_a_launcher_that_is_killed(tmp_path):
    process = start(f"{write_pid(tmp_path)} exec sleep 60", processes=2)
    pids = pids_in(tmp_path, 2)
    process.kill()
    process.communicate()
    wait_for(lambda: not any(map(is_alive, pids)))


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_CHILD_SUBREAPER")
def test_what_a_killed_process_started_is_killed_too(tmp_path):
    """A worker of its own session, which no signal to a process group reaches."""
    worker = f"setsid sh -c '{write_pid(tmp_path, 'worker')} exec sleep 60' &"
    shell = f"{worker} while [ ! -e {tmp_path}/worker.pid ]; do sleep 0.02; done; kill -9 $$"
    assert finish(shell)[0] == 137
    assert not is_alive(*pids_in(tmp_path, 1))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--processes 2", "It follows two dashes"),
        ("--processes 2 rl --config demo", "It follows two dashes: tracerl launch .. -- rl"),
        ("--processes 2 --", "nothing is no command that launch can run"),
        ("--processes 0 -- rl", "--processes is 0, must be at least 1"),
        ("--devices_per_process 0 -- rl", "--devices_per_process is 0, must be at least 1"),
        ("--max_restarts -1 -- rl", "--max_restarts is -1, must be at least 0"),
        ("--grace -1 -- rl", "--grace is -1, must be at least 0"),
        ("--process 2 -- rl", "unknown flag --process; did you mean --processes?"),
        ("-- tracerl rl", "it is one of rl, sft, eval, without `tracerl`"),
        ("-- evla", "did you mean eval?"),
    ],
)
def test_wrong_flags_are_named(capsys, argv, message):
    assert cli.main(["launch", *argv.split()]) == 2
    assert message in capsys.readouterr().err


def test_the_variables_are_those_that_a_job_is_joined_by():
    assert launch.VARIABLES == distributed.VARIABLES


def test_a_job_inside_a_job_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("TRACERL_PROCESSES", "4")
    assert cli.main(["launch", "--processes", "2", "--", "rl"]) == 2
    assert "TRACERL_PROCESSES is set" in capsys.readouterr().err


def test_the_command_is_taken_as_it_is(monkeypatch):
    calls = []
    monkeypatch.setattr(launch, "run_job", lambda command, **options: calls.append((command, options)) or 0)
    argv = "--processes 2 --max_restarts 3 -- rl --config demo --config.rl.steps=3 --max_restarts -- 4"
    assert cli.main(["launch", *argv.split()]) == 0
    ((command, options),) = calls
    assert command[3:] == ["rl", "--config", "demo", "--config.rl.steps=3", "--max_restarts", "--", "4"]
    assert options == {"processes": 2, "devices_per_process": None, "max_restarts": 3, "grace": 90.0}
