"""Bandwidths of links, what the compiler says of programs that are too large, and verdicts."""

import dataclasses
import json

import pytest
from compiled import mesh_of

from tracerl_jax.config import RunConfig
from tracerl_jax.config_io import load_config
from tracerl_jax.plan.decoding import Forwards
from tracerl_jax.plan.estimate import Estimate, Plan, bandwidth, overflow_bytes, run_beside, shrink_cost
from tracerl_jax.plan.hlo_cost import Cost
from tracerl_jax.plan.replays import ReplayCount, StepReplay
from tracerl_jax.plan.report import format_plan, knobs, plan_dict
from tracerl_jax.plan.topology import parse_topology
from tracerl_jax.plan.workload import Workload
from tracerl_jax.units import GIB

# (topology, mesh sizes, axes, links of one chip that the group can use)
TPU_LINKS = [
    ("v5p:4x4x4", (1, 64, 1), "fsdp", 6),  # all of a torus
    ("v5p:2x2x2", (1, 8, 1), "fsdp", 3),  # a cube without the links that close it
    ("v5p:2x2x1", (1, 4, 1), "fsdp", 2),
    ("v5p:2x4x4", (1, 32, 1), "fsdp", 3),
    ("v5e:2x4", (1, 8, 1), "fsdp", 2),
    ("v5e:16x16", (1, 256, 1), "fsdp", 4),
    ("v5e:8x16", (1, 128, 1), "fsdp", 3),
    ("v5e:4x4", (4, 4, 1), "fsdp", 1),
    ("v5e:4x4", (4, 4, 1), "data", 1),
    ("v5e:4x4", (4, 4, 1), "data+fsdp", 2),
    ("v4:2x2x4", (4, 2, 2), "data+fsdp+tensor", 3),
]


@pytest.mark.parametrize("name, sizes, axes, links", TPU_LINKS)
def test_links_of_a_torus(name, sizes, axes, links):
    topology, mesh = parse_topology(name), mesh_of(name, *sizes)
    assert bandwidth(topology, mesh, "all-gather", axes) == links * topology.chip.link_bandwidth
    # There and back at most.
    assert bandwidth(topology, mesh, "collective-permute", axes) == min(2, links) * topology.chip.link_bandwidth


@pytest.mark.parametrize(
    "name, sizes, axes, rate",
    [
        ("h100:8", (1, 8, 1), "fsdp", 450e9),
        ("h100:4", (1, 4, 1), "fsdp", 450e9),
        ("h100:16", (2, 8, 1), "fsdp", 450e9),  # within a host
        ("h100:16", (2, 8, 1), "data", 50e9),  # each to its twin, through its own network card
        ("h100:16", (1, 16, 1), "fsdp", 400e9),  # eight cards in parallel
        ("h100:16", (2, 4, 2), "data+tensor", 100e9),
        ("h100:16", (2, 4, 2), "tensor", 450e9),
        ("a100:64", (8, 8, 1), "data+fsdp", 200e9),
    ],
)
def test_links_of_gpus(name, sizes, axes, rate):
    assert bandwidth(parse_topology(name), mesh_of(name, *sizes), "all-gather", axes) == rate


def test_what_the_compiler_says_of_too_large_programs():
    whole = ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 18.25G "
             "of 15.75G hbm. Exceeded hbm capacity by 2.50G.")  # fmt: skip
    besides = ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (33.83G) "
               "exceeds available HBM (15.75G).")  # fmt: skip
    resident, own = 3.0 * GIB, 2.0 * GIB
    assert overflow_bytes(whole, resident, own) == (18.25 + 3 - 2) * GIB
    assert overflow_bytes(besides, resident, own) == (33.83 + 3) * GIB
    assert overflow_bytes(whole.replace("18.25G of", "512.00M of"), 0.0, 0.0) == 0.5 * GIB
    assert overflow_bytes("INTERNAL: Mosaic failed to compile", resident, own) is None


CONFIG = load_config(RunConfig, "rl_sdar_4b_math:value", [])


def plan(*programs, topology="v5e:4x4", resident=None):
    found = parse_topology(topology)
    mesh = {"data": 1, "fsdp": found.chips, "tensor": 1}
    rollout = {"data": found.chips, "fsdp": 1, "tensor": 1}
    resident = resident or {"policy": 1e9, "policy optimizer": 2e9}
    costs = [shrink_cost(list(programs), REPLAY, found.chips), shrink_cost(list(programs), MERGED, found.chips)]
    forwards = Forwards(500.0, 50.0, 7.0)
    return Plan(found, mesh, rollout, 10 * GIB, resident, list(programs), 8000.0, forwards, costs)


# The run's own shrink, and one with a quarter of the micro-batches.
REPLAY = StepReplay(1, 40.0, ReplayCount(2000.0, 3e6, 400.0, 8192), {"policy gradient": 100.0})
MERGED = StepReplay(4, 40.0, ReplayCount(500.0, 8e5, 100.0, 8192), {"policy gradient": 25.0})
SMALL = Estimate("decode", 8, 1.0, 1e9, 1e8, 5 * GIB, None, Cost(2e12, 3e9), 0.01, 0.02, 0.005)
LARGE = dataclasses.replace(SMALL, name="policy gradient", runs=100.0, peak_bytes=11 * GIB, compute_seconds=0.03)
OVERFLOW = Estimate("prefill", 8, 1.0, 0.0, 0.0, 33 * GIB, "Ran out of memory")


def test_a_step_is_as_long_as_the_slowest_resource_of_every_program():
    assert (SMALL.seconds, SMALL.bound) == (0.02, "HBM")
    assert (LARGE.seconds, LARGE.bound) == (0.03, "compute")
    found = plan(SMALL, LARGE)
    assert found.step_seconds == 8 * 0.02 + 100 * 0.03
    assert (found.peak_bytes, found.fits) == (11 * GIB, False)
    assert plan(SMALL).fits and not plan(SMALL, dataclasses.replace(OVERFLOW, peak_bytes=1.0)).fits


def test_programs_that_run_beside_each_other_need_memory_together():
    resident = 4 * GIB
    sync = dataclasses.replace(SMALL, name="sync", peak_bytes=9 * GIB)
    prefill = dataclasses.replace(SMALL, name="prefill", peak_bytes=6 * GIB)
    found = run_beside([sync, prefill, SMALL, LARGE], ("prefill", "decode"), resident)
    peaks = {p.name: p.peak_bytes / GIB for p in found}
    assert peaks == {"sync": 9, "prefill": 6 + 7, "decode": 5 + 7, "policy gradient": 11 + 2}


def test_knobs_name_what_does_not_fit():
    def keys(*programs, config=CONFIG, **how):
        text = " ".join(knobs(plan(*programs, **how), config))
        return {key for key in (
            "rollout.slots_per_device (64)", "rollout.max_tokens (2000)", "rollout.tensor (1)",
            "rl.rows_per_device (1)", "rl.row_length (8192)", "mesh.fsdp", "mesh.tensor (1)",
            "value.shared_trunk=true", "model.dtype=bfloat16", "model.remat=full", "XLA_PYTHON_CLIENT_MEM_FRACTION",
        ) if key in text}  # fmt: skip

    rollout = {"rollout.slots_per_device (64)", "rollout.max_tokens (2000)", "rollout.tensor (1)"}
    training = {"rl.rows_per_device (1)", "rl.row_length (8192)", "mesh.fsdp", "mesh.tensor (1)"}
    assert keys(SMALL) == set()
    assert keys(SMALL, OVERFLOW) == rollout
    assert keys(SMALL, LARGE) == training
    assert keys(OVERFLOW, LARGE, topology="h100:8") == rollout | training | {"XLA_PYTHON_CLIENT_MEM_FRACTION"}
    full = {"policy": 3 * GIB, "policy optimizer": 3 * GIB, "value": 3 * GIB}
    assert keys(LARGE, resident=full) == training | {"value.shared_trunk=true"}
    slow = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, dtype="float32", remat="none"))
    assert keys(LARGE, config=slow) == training | {"model.dtype=bfloat16", "model.remat=full"}
    overlapped = load_config(RunConfig, "rl_sdar_4b_math", ["--config.rl.overlap=one_step_off"])
    assert knobs(plan(LARGE), overlapped)[0].startswith("rl.overlap=none")


def test_text_says_what_is_assumed_and_not_counted():
    cost = Cost(2e12, 3e9, unknown_loops={"jit(f)/while"}, unknown_kernels={"mystery"})
    cost.collective_bytes["all-gather", "fsdp"] = 5e9
    found = dataclasses.replace(SMALL, cost=cost, runs=0.5)
    text = format_plan(plan(found, topology="h100:8"), CONFIG, Workload(784, 500, 2.5, 0.5), 0.4)
    for part in (
        "rl_sdar_4b_math_value on h100:8: 8 chips with 10.0 GiB for programs",
        "of 79.1 GiB (XLA_PYTHON_CLIENT_MEM_FRACTION)",
        "mesh: data 1 x fsdp 8 x tensor 1, in decoding data 8 x fsdp 1 x tensor 1",
        "prompts of 784 and responses of 500 tokens", "784 and 2000", "2.5 tokens per denoise step",
        "50% of the responses",
        "policy optimizer 1.9 GiB", "all-gather over fsdp 5.00", "decode: mystery", "decode: loop jit(f)/while",
        "fits: 5.0 GiB of 10.0 GiB (decode)", "800,000 response tokens/s, 100,000 per chip",
    ):  # fmt: skip
        assert part in text, part
    (row,) = [line for line in text.splitlines() if line.startswith("decode ")]
    assert row.split() == "decode 0.5 0.93 0.09 5.00 2.00 3.00 10.0 20.0 5.00 HBM 0.01 1 s".split()


def test_table_by_shrink():
    text = format_plan(plan(SMALL, LARGE), CONFIG, Workload(784, 500), 0.25)
    assert ("a response takes 507 forwards (500 denoise steps, 50.0 of them of the whole canvas, 7.00 commits); 4,096 "
            "responses an RL step") in text  # fmt: skip
    heading, *rows = (line for line in text.splitlines() if line.startswith(("shrink  ", "1* ", "4 ")))
    # 16 chips x (8 decodes + 100 or 25 gradients) x 2 TFLOP.
    assert heading.split() == ("shrink states/response rows Mtokens micro-batches rollout PFLOP policy PFLOP "
                               "step at least at 25%").split()  # fmt: skip
    assert rows[0].split() == "1* 50.0 400 3.00 100 0.26 3.20 3.16 s 12.6 s".split()
    assert rows[1].split() == "4 12.5 100 0.80 25 0.26 0.80 910 ms 3.64 s".split()


def test_table_by_shrink_of_what_does_not_fit():
    """What is replayed is known, what it costs is not."""
    text = format_plan(plan(SMALL, OVERFLOW, LARGE), CONFIG, Workload(784, 500), 0.25)
    (row,) = (line for line in text.splitlines() if line.startswith("1* "))
    assert row.split() == "1* 50.0 400 3.00 100 - -".split()


def test_text_of_what_does_not_fit():
    text = format_plan(plan(SMALL, OVERFLOW, LARGE), CONFIG, Workload(784, 2000), 0.4)
    assert "DOES NOT FIT: at least 33.0 GiB of 10.0 GiB (prefill). Turn one of these:" in text
    assert "> 33.0" in text and "response tokens/s" not in text


def test_a_plan_as_json():
    found = plan(SMALL, OVERFLOW)
    document = json.loads(json.dumps(plan_dict(found, CONFIG, Workload(784, 2000), 0.4)))
    assert document["fits"] is False and document["knobs"] == knobs(found, CONFIG)
    decode, prefill = document["programs"]
    assert (decode["flops"], decode["bound"], decode["seconds"]) == (2e12, "HBM", 0.02)
    assert (prefill["peak_bytes"], prefill["overflow"]) == (33 * GIB, "Ran out of memory")
    assert prefill["flops"] is prefill["seconds"] is prefill["temp_bytes"] is None
    assert document["forwards_per_response"] == {"steps": 500, "whole": 50, "commits": 7}
    assert document["shrink"]["4"]["flops"] is document["shrink"]["4"]["estimated_seconds"] is None
    assert document["shrink"]["4"]["replay"]["rows"] == 100
    document = json.loads(json.dumps(plan_dict(plan(SMALL, LARGE), CONFIG, Workload(784, 2000), 0.5)))
    merged = document["shrink"]["4"]
    assert merged["flops"]["policy"] == 16 * 25 * 2e12 and merged["runs_per_step"] == {"policy gradient": 25}
    assert merged["estimated_seconds"] == 2 * merged["step_seconds"] == pytest.approx(2 * (8 * 0.02 + 25 * 0.03))
    assert document["workload"] == {
        "prompt_tokens": 784, "response_tokens": 2000, "tokens_per_step": 2.6, "kept_fraction": 1
    }  # fmt: skip
