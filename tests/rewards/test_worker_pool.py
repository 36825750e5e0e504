"""The pool: replies in order, clocks, deaths and what is left behind."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tracerl_jax.errors import ConfigError
from tracerl_jax.rewards.worker_pool import WorkerPool

MODULE = "pool_test_worker"


@pytest.fixture
def pool():
    pools = []

    def make(**kwargs):
        pools.append(WorkerPool(MODULE, **{"workers": 2, "cpu_seconds": 0.3, **kwargs}))
        return pools[-1]

    yield make
    for made in pools:
        made.close()


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def statuses(replies):
    return [(reply.status, reply.value if reply.status == "ok" else None) for reply in replies]


HARD = {"spin": "overtime", "die": "died", "eat": "error", "what": "error"}  # item and the status of its reply
MIXED = [item for number, verb in enumerate([*HARD, *HARD]) for item in (["double", number], [verb], ["double", "ü\n"])]
EXPECTED = [("ok", 2 * item[1]) if item[0] == "double" else (HARD[item[0]], None) for item in MIXED]


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_replies_do_not_depend_on_the_number_of_workers(pool, workers):
    assert statuses(pool(workers=workers).map(MIXED)) == EXPECTED


def test_replies_do_not_depend_on_load(pool):
    """More busy processes than CPUs; items that need half of their CPU time."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * os.cpu_count())]
    try:
        replies = pool(workers=4, cpu_seconds=0.5).map([["work", 0.25], ["spin"]] * 3)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert statuses(replies) == [("ok", 0.25), ("overtime", None)] * 3


def test_the_clock_counts_cpu_time_of_one_item(pool):
    one = pool(workers=1)
    assert [reply.status for reply in one.map([["sleep", 0.6], *[["work", 0.15]] * 6])] == ["ok"] * 7


def test_a_worker_that_hangs_is_replaced(pool):
    replies = pool(workers=1, wall_seconds=1.0).map([["sleep", 1000], ["double", 1]])
    assert [reply.status for reply in replies] == ["hung", "ok"]


def test_a_worker_killed_amid_an_item_is_replaced_and_the_item_repeated(pool):
    two = pool(wall_seconds=60)
    before = two.pids()
    results = []
    thread = threading.Thread(target=lambda: results.extend(two.map([["sleep", 1.5]] * 2 + [["double", 1]] * 10)))
    thread.start()
    time.sleep(0.5)
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    thread.join()
    assert statuses(results) == [("ok", "awake")] * 2 + [("ok", 2)] * 10
    assert not set(before) & set(two.pids())


def test_an_idle_worker_that_died_is_replaced(pool, tmp_path):
    one = pool(workers=1)
    os.kill(one.pids()[0], signal.SIGKILL)
    assert statuses(one.map([["double", 1], ["die_once", str(tmp_path / "done")]])) == [("ok", 2), ("ok", "alive")]


def test_maps_of_several_threads_share_the_workers(pool):
    two = pool()
    results = {}
    threads = [
        threading.Thread(target=lambda n=n: results.update({n: two.map([["double", n]] * 50)})) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {n: {reply.value for reply in replies} for n, replies in results.items()} == {n: {2 * n} for n in range(4)}


def test_workers_that_cannot_work_say_why(pool, monkeypatch):
    monkeypatch.setenv("POOL_TEST_BROKEN", "1")
    with pytest.raises(ConfigError, match=r"^the backend is broken; mend it$"):
        pool()
    with pytest.raises(ConfigError, match=r"no_such_module .* did not start: .*No module named"):
        WorkerPool("no_such_module", workers=1)


def test_close_ends_the_workers(pool):
    two = pool()
    pids = two.pids()
    two.close()
    assert len(pids) == 2 and not any(map(is_running, pids)) and two.pids() == []


OWNER = f"""
import atexit, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
from tracerl_jax.rewards.worker_pool import WorkerPool
if __name__ == "__main__":
    pool = WorkerPool({MODULE!r}, workers=2, cpu_seconds=1.0)
    atexit.register(pool.close)
    print(*pool.pids(), flush=True)
    print(pool.map([["sleep", 3], ["spin"]]))
"""


@pytest.mark.parametrize("ending", [None, signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_its_owner(ending):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    pids = [int(pid) for pid in owner.stdout.readline().split()]
    assert len(pids) == 2 and all(map(is_running, pids))
    if ending is not None:
        time.sleep(0.3)  # amid the items
        owner.send_signal(ending)
    errors = owner.communicate(timeout=60)[1]
    assert owner.returncode == (-ending if ending else 0), errors
    assert wait_until(lambda: not any(map(is_running, pids)))
