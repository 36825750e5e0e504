"""What all processes measured in one table, and who is late; the gathering by two real processes."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tracerl_jax.launch.launch import free_port
from tracerl_jax.parallel import peers
from tracerl_jax.report.hosts import Stragglers, by_host, host_table, slowest

NAMES = ("seconds/rollout", "seconds/wait", "seconds/total")


def test_one_process_is_a_table_of_one_row_and_names_nobody_has_are_left_out():
    table = by_host({"seconds/total": 2.5, "seconds/rollout": 0.1}, NAMES, peers.gather)
    assert {name: column.tolist() for name, column in table.items()} == {
        "seconds/rollout": [0.1], "seconds/total": [2.5],
    }  # fmt: skip


def test_processes_may_lack_a_phase_but_not_have_one_of_their_own():
    def gather(mine):
        return np.stack([mine, [np.nan, np.nan, 4.0]])

    table = by_host({"seconds/rollout": 1.0, "seconds/total": 2.0}, NAMES, gather)
    np.testing.assert_array_equal(table["seconds/rollout"], [1.0, np.nan])
    np.testing.assert_array_equal(table["seconds/total"], [2.0, 4.0])
    with pytest.raises(KeyError, match="seconds/own"):
        by_host({"seconds/own": 1.0}, NAMES, gather)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [([1.0, 3.0], (1, 3.0, 2.0)), ([2.0, 1.0, 4.0], (2, 2.0, 2.0)), ([5.0], (0, 1.0, 0.0)),
     ([np.nan, 1.0, 2.0], (2, 2.0, 1.0)), ([0.0, 0.0], (0, 1.0, 0.0))],
)  # fmt: skip
def test_the_slowest_is_compared_with_the_lower_median(seconds, expected):
    assert slowest(np.array(seconds)) == expected


def look(stragglers, rollout, total=10.0):
    return stragglers.look({"rollout": np.array(rollout, float)}, total)


def test_a_process_is_named_after_three_steps_in_a_row_and_when_their_number_has_doubled():
    stragglers = Stragglers()
    said = {step: look(stragglers, [1, 1, 1, 1.8]) for step in range(1, 25)}
    assert [step for step, sentences in said.items() if sentences] == [3, 6, 12, 24]
    assert said[3] == ["process 3 is 1.8x slower than the median in rollout for 3 steps in a row"]


def test_a_step_that_is_even_or_has_another_slowest_process_starts_the_count_anew():
    stragglers = Stragglers()
    rows = [[1, 1, 2], [1, 1, 2], [1, 1, 1.4], [1, 1, 2], [1, 1, 2], [1, 2, 1], [1, 1, 2], [1, 1, 2]]
    assert [look(stragglers, row) for row in rows] == [[]] * 8
    assert len(look(stragglers, [1, 1, 2])) == 1


def test_phases_are_counted_apart_and_what_costs_nothing_is_nobody_s_fault():
    stragglers = Stragglers()
    for _ in range(3):
        said = stragglers.look({"rollout": np.array([1.0, 3.0]), "reward": np.array([0.3, 0.1])}, 10.0)
    assert len(said) == 1 and "process 1" in said[0]  # reward: 0.2 of 10 seconds


def test_the_table_of_the_page_is_of_the_last_steps_of_the_last_phase_with_as_many_processes():
    assert host_table([]) == {}
    rows = [
        {"step": 9, "phase": "sft", "seconds": {"pack": [9.0] * 3, "total": [9.0] * 3}},
        {"step": 1, "phase": "rl", "seconds": {"rollout": [8.0, 8.0], "total": [8.0, 8.0]}},
        {"step": 2, "phase": "rl", "seconds": {"rollout": [1.0, 2.0, 3.0], "total": [4.0] * 3}},
        {"step": 3, "phase": "rl", "seconds": {"rollout": [1.0, None, 1.0], "save": [1.0] * 3, "total": [4.0] * 3}},
    ]
    assert host_table(rows) == {
        "phase": "rl", "steps": 2, "phases": ["rollout", "total", "save"], "processes": 3,
        "rows": [[2, 2.0, 4.0, 0.5], [0, 1.0, 4.0, 0.5], [1, 1.0, 4.0, 0.5]],
    }  # fmt: skip


PROCESS = """
import json, sys
from pathlib import Path
import jax
index, address, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.distributed.initialize(address, 2, index)
from tracerl_jax.parallel import peers
from tracerl_jax.report.hosts import by_host
from tracerl_jax.report.profile import Profiler
profiler = Profiler(range(1, 2), folder)
profiler.at(1)
mine = {"seconds/total": 1.0 + index} | ({"seconds/rollout": 0.5} if index else {})
table = by_host(mine, ["seconds/rollout", "seconds/total"], peers.gather)
profiler.close()
print(json.dumps({name: [None if x != x else x for x in column.tolist()] for name, column in table.items()}))
"""


def test_two_processes_see_the_same_table_and_write_profiles_of_their_own(tmp_path):
    address = f"localhost:{free_port()}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(index), address, str(tmp_path)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    for out, _ in outputs:
        (line,) = [line for line in out.splitlines() if line.startswith("{")]  # Gloo writes there too
        assert json.loads(line) == {"seconds/rollout": [None, 0.5], "seconds/total": [1.0, 2.0]}
    folders = {path.relative_to(tmp_path).parts[0] for path in tmp_path.glob("**/*.xplane.pb")}
    assert folders == {"process0", "process1"}
