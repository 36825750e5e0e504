import logging
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from tracerl_jax.plan.chips import CHIPS, chip_of
from tracerl_jax.report.flops import Work
from tracerl_jax.report.run_dir import RunDir, intact_rows
from tracerl_jax.report.speed import Speed, device_memory
from tracerl_jax.units import GIB

PHASES = ("rollout", "reward", "update_policy")
SECONDS = {"seconds/rollout": 4.0, "seconds/reward": 1.0, "seconds/update_policy": 2.0, "seconds/total": 8.0}
WORK = {"rollout": Work(4000, 4e12, seconds=5.0), "update_policy": Work(16_000, 6e12)}


def speed_of(folder, gather=None, chips=2) -> Speed:
    gather = {} if gather is None else {"gather": gather}
    return Speed(folder, "rl", phases=PHASES, chips=chips, product="rollout", **gather)


@pytest.fixture
def folder(tmp_path):
    with RunDir(tmp_path / "run") as run:
        yield run


def test_rates_are_per_chip_and_of_the_seconds_the_work_took(folder):
    speed = speed_of(folder)
    row = speed.row(1, SECONDS, WORK)
    assert row == SECONDS | {
        "chips/rollout/tokens_per_second": 400.0, "chips/rollout/flops_per_second": 4e11,
        "chips/update_policy/tokens_per_second": 4000.0, "chips/update_policy/flops_per_second": 1.5e12,
        "chips/total/tokens_per_second": 250.0, "chips/total/flops_per_second": 1e13 / 16,
    }  # fmt: skip
    assert not (folder.path / "hosts.jsonl").exists()


def test_only_a_known_chip_has_a_utilisation(folder):
    speed = speed_of(folder)
    assert speed.peak is None or jax.default_backend() != "cpu"
    speed.peak = 1e13
    row = speed.row(1, SECONDS, WORK)
    assert (row["chips/update_policy/mfu"], row["chips/total/mfu"]) == (0.15, 1 / 16)


def test_what_is_not_known_is_left_out_of_the_row(folder):
    row = speed_of(folder).row(1, SECONDS, {**WORK, "rollout": Work(4000, None)})
    assert [name for name in row if name.endswith("flops_per_second")] == ["chips/update_policy/flops_per_second"]
    assert speed_of(folder).row(2, {"seconds/total": 1.0}, {}) == {"seconds/total": 1.0}  # nothing was kept


def test_of_several_processes_work_is_added_and_the_slowest_sets_the_time(folder, caplog):
    def gather(mine):  # a second process with the same work, twice as slow in everything
        names = speed.names
        other = [2 * x if name.startswith(("seconds/", "working/")) else x for name, x in zip(names, mine, strict=True)]
        return np.stack([mine, other])

    speed = speed_of(folder, gather, chips=4)
    with caplog.at_level(logging.WARNING, "tracerl_jax"):
        rows = [speed.row(step, SECONDS, WORK) for step in (1, 2, 3)]
    assert {name: value for name, value in rows[0].items() if not name.startswith("chips")} == {
        **{name: 2 * value for name, value in SECONDS.items()},
        "hosts/rollout/slowest": 1.0, "hosts/rollout/ratio": 2.0,
        "hosts/reward/slowest": 1.0, "hosts/reward/ratio": 2.0,
    }  # fmt: skip
    assert rows[0]["chips/rollout/tokens_per_second"] == 8000 / (4 * 10)
    stored = list(intact_rows(folder.path / "hosts.jsonl"))
    assert [row["step"] for row in stored] == [1, 2, 3]
    assert stored[0] == {
        "step": 1, "phase": "rl",
        "seconds": {"rollout": [4.0, 8.0], "reward": [1.0, 2.0], "update_policy": [2.0, 4.0], "total": [8.0, 16.0]},
    }  # fmt: skip
    assert [record.getMessage() for record in caplog.records] == [
        f"rl step 3: process 1 is 2.0x slower than the median in {phase} for 3 steps in a row"
        for phase in ("rollout", "reward")
    ]
    folder.truncate_after(2, "rl")
    assert [row["step"] for row in intact_rows(folder.path / "hosts.jsonl")] == [1, 2]


def test_memory_is_that_of_the_fullest_device():
    def device(**stats):
        return SimpleNamespace(memory_stats=lambda: stats or None)

    full = device(bytes_in_use=3 * GIB, peak_bytes_in_use=4 * GIB)
    devices = [full, device(bytes_in_use=GIB, peak_bytes_in_use=6 * GIB)]
    assert device_memory(devices) == {"chips/hbm_gib": 3.0, "chips/hbm_peak_gib": 6.0}
    assert device_memory([device()]) == {} and device_memory([device(bytes_in_use=GIB)]) == {"chips/hbm_gib": 1.0}


@pytest.mark.parametrize(
    ("kind", "name"),
    [("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v6 lite", "v6e"), ("NVIDIA H200", "h200"),
     ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-40GB", "a100-40g"), ("NVIDIA A100-SXM4-80GB", "a100")],
)  # fmt: skip
def test_chips_by_what_jax_calls_them(kind, name):
    assert chip_of(kind) is CHIPS[name]


def test_other_devices_are_no_chips_of_the_table():
    assert chip_of("cpu") is chip_of("NVIDIA H100 PCIe") is chip_of("") is None
