"""The sandbox: hostile programs get no reward, harm nothing and leave nothing behind; levels keep their promises."""

import logging
import os
import shlex
import socket
import sys
import threading

import pytest
from hostile_programs import ANSWER, HOSTILE_PROGRAMS, NEEDS, hostile_program
from sandbox_utils import FAST, as_another_user, left_behind, open_sandbox, without_namespaces

from tracerl_jax.config import RewardSection
from tracerl_jax.errors import ConfigError
from tracerl_jax.rewards.sandbox import Job, Sandbox, pool, system_calls

SECONDS = 0.25  # CPU time of an attack
TEST = {"test": f"assert f(3) == {ANSWER}", "given": "", "subjects": [], "own_equality": False}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Where ANSWER can be had by those who get out: a file, two sockets, this process's environment."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "secret").write_text(str(ANSWER))
    os.environ["ANSWER"] = str(ANSWER)
    stop = threading.Event()
    tcp = socket.create_server(("127.0.0.1", 0))
    port = tcp.getsockname()[1]
    local = socket.socket(socket.AF_UNIX)
    local.bind(f"\0sandbox-test-{port}")
    local.listen()

    def tell(server: socket.socket) -> None:
        server.settimeout(0.1)
        while not stop.is_set():
            try:
                with server.accept()[0] as connection:
                    connection.sendall(str(ANSWER).encode())
            except TimeoutError:
                pass

    threads = [threading.Thread(target=tell, args=(server,)) for server in (tcp, local)]
    for thread in threads:
        thread.start()
    yield {"secret": str(folder / "secret"), "port": port, "outside": str(folder)}
    stop.set()
    for thread in threads:
        thread.join()
    tcp.close()
    local.close()
    del os.environ["ANSWER"]


@pytest.fixture(scope="module")
def strict():
    sandbox = open_sandbox()
    yield sandbox
    sandbox.close()


@pytest.fixture(scope="module", params=[without_namespaces, as_another_user], ids=lambda change: change.__name__)
def weaker(request):
    with pytest.MonkeyPatch.context() as monkeypatch:
        request.param(monkeypatch)
        sandbox = open_sandbox(sandbox="best_effort")
        yield sandbox
        sandbox.close()


def attack(sandbox: Sandbox, name: str, places: dict) -> None:
    if name in NEEDS and not NEEDS[name] & {*sandbox.held}:
        pytest.skip(f"needs {' or '.join(sorted(NEEDS[name]))}, and this sandbox has: {sandbox.description}")
    program = hostile_program(name, **places)
    before = left_behind()
    script, function = sandbox.run([Job(program, SECONDS), Job(program, SECONDS, test=TEST)])
    assert not (script.status == "done" and script.exit == 0 and script.output.split() == [str(ANSWER)]), script
    assert function.status in ("failed", "overtime"), function
    assert left_behind() == {**before, "processes": [], "folders": [], "files": []}
    assert os.listdir(places["outside"]) == ["secret"]


def test_there_are_enough_hostile_programs():
    assert len(HOSTILE_PROGRAMS) >= 40


@pytest.mark.parametrize("name", HOSTILE_PROGRAMS)
def test_hostile_program_in_the_strict_sandbox(strict, places, name):
    attack(strict, name, places)


@pytest.mark.parametrize("name", [
    "fork_bomb", "daemon_that_writes", "memory_bomb", "fills_the_disk", "kills_the_parent", "writes_outside",
    "writes_verdicts_everywhere", "reads_the_password_file", "looks_at_frames", "reads_memory_of_the_judge",
])  # fmt: skip
def test_hostile_program_in_a_weaker_sandbox(weaker, places, name):
    attack(weaker, name, places)


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE_PROGRAMS)
def test_every_hostile_program_in_a_weaker_sandbox(weaker, places, name):
    attack(weaker, name, places)


def test_sandbox_still_works_after_attacks(strict):
    test = {**TEST, "test": "assert f('ab') == 2"}
    jobs = [Job("print(input()[::-1])", 1.0, input="abc\n"), Job("f = len", 1.0, test=test)]
    script, function = strict.run(jobs)
    assert (script.status, script.exit, script.output) == ("done", 0, "cba\n")
    assert function.status == "passed"


def test_what_a_program_sees(strict):
    program = """
import os, sys, tempfile
assert sorted(os.listdir("/dev")) == ["null", "urandom", "zero"], os.listdir("/dev")
assert os.getcwd() == tempfile.gettempdir() and os.listdir() == []
assert not {"etc", "proc", "sys", "home", "bin", "var"} & {*os.listdir("/")}
assert not {*os.environ} - {"HOME", "LANG", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"}, os.environ
import threading, heapq, decimal, sqlite3
with open("scratch", "w") as file:
    file.write("mine")
thread = threading.Thread(target=lambda: print("thread"))
thread.start()
"""
    assert [reply.output for reply in strict.run([Job(program, 2.0)])] == ["thread\n"]


def test_packages_that_a_program_may_import(strict):
    """Not all: some hold data sets with the solutions."""
    program = """
for name in ("numpy", "packaging", "jax", "pip"):
    try:
        __import__(name)
        print(name)
    except ImportError:
        pass
"""
    (default,) = strict.run([Job(program, 5.0)])
    assert default.output == "numpy\n"
    sandbox = open_sandbox(code_packages=("packaging",))
    (other,) = sandbox.run([Job(program, 5.0)])
    sandbox.close()
    assert other.output == "packaging\n"


def test_input_and_output_larger_than_pipes(strict):
    text = "".join(f"{number}\n" for number in range(300_000))
    (reply,) = strict.run([Job("import sys\nsys.stdout.write(sys.stdin.read())", 2.0, input=text)])
    assert reply.exit == 0 and reply.output == text


def test_time_begins_when_the_program_starts(strict):
    """Sixteen programs that need half their limit, on two workers."""
    program = "import time\nend = time.process_time() + 0.1\nwhile time.process_time() < end: pass\nprint(1)"
    assert {reply.output for reply in strict.run([Job(program, 0.2)] * 16)} == {"1\n"}


def test_program_may_not_wait_longer_than_allowed(strict):
    short, long = strict.run([Job(f"import time\ntime.sleep({seconds})\nprint(1)", 0.4) for seconds in (0.1, 3)])
    assert short.output == "1\n"
    assert long.status == "overtime" and "waiting" in long.detail


def test_results_do_not_depend_on_the_order_of_programs(strict):
    jobs = [Job("print({'a', 'b', 'c', 'd', 'e'})", 1.0), Job("{'x', 'y'}", 1.0)] * 4
    assert len({reply.output for reply in strict.run(jobs)}) == 2


# ---- levels ----


def test_start_says_what_holds(caplog):
    with caplog.at_level(logging.INFO, logger="tracerl_jax"):
        sandbox = open_sandbox(sandbox="best_effort")
    sandbox.close()
    (line,) = [record.message for record in caplog.records if "sandbox" in record.message]
    assert "resource limits" in line and "namespace" in line


def test_strict_refuses_a_machine_without_namespaces(monkeypatch):
    without_namespaces(monkeypatch)
    with pytest.raises(ConfigError, match=r"reward.sandbox=strict cannot be had .* no mount namespace .*best_effort"):
        Sandbox(RewardSection(**FAST))


def test_best_effort_says_what_does_not_hold(monkeypatch):
    without_namespaces(monkeypatch)
    sandbox = open_sandbox(sandbox="best_effort")
    sandbox.close()
    assert "not: " in sandbox.description and "network namespace (Operation not permitted)" in sandbox.description
    assert "limits" in sandbox.held and not {"mount", "pid", "network"} & {*sandbox.held}


def test_best_effort_has_its_limits(monkeypatch):
    """Neither namespaces nor a user of its own nor Landlock, as root: programs could write anywhere."""
    without_namespaces(monkeypatch, "setresuid", "setuid", "landlock_create_ruleset")
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with pytest.raises(ConfigError, match=r"programs would run as root and could write anywhere"):
        Sandbox(RewardSection(**FAST, sandbox="best_effort"))


def test_without_a_library_for_seccomp(monkeypatch):
    def no_library():
        raise ImportError("no module named pyseccomp")

    monkeypatch.setattr(system_calls, "make_filter", no_library)
    sandbox = open_sandbox()
    program = "import os\nif os.fork() == 0:\n    os.setsid()\n    while True: pass\nprint(1)"
    before = left_behind()
    assert sandbox.run([Job(program, 0.5)])[0].output == "1\n"
    assert left_behind() == {**before, "processes": []}
    sandbox.close()
    assert "seccomp (pip install pyseccomp" in sandbox.description


def test_container_hook():
    """A command stands in for `docker run -i ... python`: it must only be a Python with its input and output."""
    sandbox = open_sandbox(sandbox="container-hook", container_command=shlex.join(["env", "-i", sys.executable]))
    jobs = [Job("print(input())", 1.0, input="hello"), Job("f = len", 1.0, test={**TEST, "test": "f(3)"})]
    replies = sandbox.run(jobs)
    sandbox.close()
    assert replies[0].output == "hello\n"
    assert replies[1].status == "failed" and "TypeError" in replies[1].detail


def test_container_hook_that_runs_no_python():
    with pytest.raises(ConfigError, match=r"no program can be run by 'echo hello'"):
        Sandbox(RewardSection(**FAST, sandbox="container-hook", container_command="echo hello"))


def test_only_linux_isolates(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError, match=r"this is darwin: set reward\.sandbox=container-hook"):
        Sandbox(RewardSection(**FAST))


@pytest.mark.skipif(pool.shutil.which("bwrap") is None, reason="bubblewrap is not installed")
def test_bubblewrap_where_only_it_makes_namespaces(monkeypatch):
    monkeypatch.setattr(Sandbox, "_insufficient", _insufficient_without_bubblewrap(Sandbox._insufficient))
    sandbox = open_sandbox()
    jobs = [Job("import os\nprint(os.path.exists('/etc/passwd'))", 1.0), Job("f = len", 1.0, test=TEST)]
    reply, other = sandbox.run(jobs)
    sandbox.close()
    assert "by bubblewrap" in sandbox.description
    assert reply.output == "False\n" and other.status == "failed"


def _insufficient_without_bubblewrap(original):
    return lambda self: original(self) if self._command else ["mount"]
