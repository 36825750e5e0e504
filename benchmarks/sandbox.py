"""How many programs a second the sandbox runs, and what each costs.

    python benchmarks/sandbox.py --workers 2

Short programs, so that what is measured is the sandbox: a function with five assertions, and a script with input and
output. CPU time is that of all processes of the launchers, and does not depend on what else the machine does.
"""

import argparse
import os
import time
from pathlib import Path

from tracerl_jax.config import RewardSection
from tracerl_jax.rewards.sandbox import Job, Sandbox

FUNCTION = "def add(a, b):\n    return a + b"
TEST = {
    "test": "def check(f):\n" + "    assert f(1, 2) == 3\n" * 5 + "check(add)",
    "given": "",
    "subjects": [],
    "own_equality": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--programs", type=int, default=400)
    options = parser.parse_args()
    sandbox = Sandbox(RewardSection(workers=options.workers, sandbox="best_effort"))
    print(sandbox.description)
    kinds = {
        "function": Job(FUNCTION, 1.0, test=TEST),
        "stdio": Job("a, b = map(int, input().split())\nprint(a + b)", 1.0, input="1 2\n"),
    }
    for name, job in kinds.items():
        sandbox.run([job] * options.workers)  # starts the launchers
        started, cpu = time.perf_counter(), _cpu_seconds()
        sandbox.run([job] * options.programs)
        wall, used = time.perf_counter() - started, _cpu_seconds() - cpu
        print(f"{name:9} {options.programs / wall:7.1f} programs/s   {used / options.programs * 1e3:5.1f} ms CPU each")
    sandbox.close()


def _cpu_seconds() -> float:
    """CPU time of the launchers and of all they have waited for."""
    children = [pid for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()]
    stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in children]
    return sum(int(ticks) for stat in stats for ticks in stat[11:15]) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
