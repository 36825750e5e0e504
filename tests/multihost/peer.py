"""A process that joins a job and does what its first argument says, without model or training."""

import os
import re
import sys
import time
from pathlib import Path

from tracerl_jax.errors import ConfigError, UserError
from tracerl_jax.parallel import distributed, job, peers, watchdog
from tracerl_jax.parallel.job import in_job, join
from tracerl_jax.training.interrupt import StopSignal


def talk() -> None:
    """Everything that processes say to each other."""
    join()
    me, n = distributed.process_index(), distributed.process_count()
    assert peers.from_lead(lambda: ("from", me)) == ("from", 0)
    big = {"text": "x" * (3 << 20)}  # several pieces of the store
    assert peers.from_lead(lambda: big) == big
    assert peers._told == [] or me == 0
    assert peers.gather("y" * (me * 5000)) == ["y" * (i * 5000) for i in range(n)]
    assert peers._told == []  # everybody has read it
    peers._TOGETHER = 4096  # as if it were too much for the devices
    assert peers.gather("y" * (me * 5000)) == ["y" * (i * 5000) for i in range(n)]
    items = list(range(7))
    shares = peers.gather(peers.own_share(items))
    assert peers.interleave(shares) == items and [len(share) for share in shares] == [4, 3]

    def refuse() -> None:
        raise ConfigError("no, thanks")

    try:
        peers.from_lead(refuse)
    except ConfigError as error:
        assert str(error) == "no, thanks"
    else:
        raise AssertionError("the lead's error is everybody's")
    stop = StopSignal()
    if me == 1:
        stop.requested = "SIGTERM"
    stop.check_together()
    try:
        stop.check_together()
    except KeyboardInterrupt:
        print("agreed")


def lose(heartbeat: str, victim: str, folder: str) -> None:
    """One process dies while the others wait for it."""
    join()
    watchdog.configure(float(heartbeat), 600.0, {}, Path(folder))
    peers.gather(0)
    if distributed.process_index() == int(victim):
        os.kill(os.getpid(), 9)
    peers.gather(0)


def hang(folder: str) -> None:
    """Process 1 lives but never comes: the phase of process 0 is too long."""
    join()
    watchdog.configure(60.0, 600.0, {"update_policy": 2.0}, Path(folder))
    peers.gather(0)
    if distributed.process_index() == 1:
        while True:
            time.sleep(1)
    with watchdog.phase("update_policy"):
        peers.gather(0)


def differ() -> None:
    """One process fails alone."""
    join()
    if distributed.process_index() == 1:
        raise ValueError("only here")
    peers.gather(0)


def refuse() -> None:
    """Process 2 finds a mistake of the user."""
    join()
    job.LEAD_SECONDS = 1.0
    if distributed.process_index() == 2:
        raise ConfigError("set it right")
    peers.gather(0)


def stick(heartbeat: str, folder: str) -> None:
    """Process 1 keeps Python's lock: its watchdog cannot run either."""
    join()
    watchdog.configure(float(heartbeat), 600.0, {}, Path(folder))
    peers.gather(0)
    if distributed.process_index() == 1:
        re.match("(a+)+$", "a" * 64 + "b")  # for centuries
    peers.gather(0)


def idle(folder: str) -> None:
    """Process 1 does something that is part of no phase, for ever."""
    join()
    watchdog.configure(60.0, 3.0, {"update_policy": 600.0}, Path(folder))
    with watchdog.phase("update_policy"):
        peers.gather(0)
        time.sleep(4)
    peers.gather(0)
    print("the time of a phase is not between phases", flush=True)
    if distributed.process_index() == 1:
        while True:
            time.sleep(1)
    peers.gather(0)


def run(name: str, *arguments: str) -> tuple[int, BaseException | None]:
    try:
        globals()[name](*arguments)
    except UserError as error:
        return error.status, error
    return 0, None


if __name__ == "__main__":
    sys.exit(in_job(lambda: run(*sys.argv[1:])))
