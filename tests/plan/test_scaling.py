"""Weak scaling on paper: layouts, what a chip sends on other meshes, and what the table says. Compiles nothing."""

from collections import Counter
from dataclasses import replace

import pytest

from tracerl_jax.plan.decoding import Forwards
from tracerl_jax.plan.estimate import Estimate, Plan
from tracerl_jax.plan.hlo_cost import SLICES, Cost
from tracerl_jax.plan.scaling import format_scaling, layout, scaling_dicts, sent_there, weak_scaling
from tracerl_jax.plan.topology import missing_compiler, parse_topology


def plan_of(topology, mesh, **sent):
    """Of one gradient and one apply program; `sent`: GB of the gradient by "kind_axes"."""
    cost = Cost()
    for name, gigabytes in sent.items():
        kind, _, axes = name.rpartition("_")
        key = kind.replace("_", "-"), axes.replace("And", "+")
        cost.collective_bytes[key], cost.collective_calls[key] = gigabytes * 1e9, 10
    gradient = Estimate("policy gradient", 4, 1.0, 0, 0, 0, None, cost, 2.0, 1.0)
    apply = Estimate("policy apply", 1, 1.0, 0, 0, 0, None, Cost(), 0.0, 0.8)
    found, mesh = parse_topology(topology), {**mesh, "tensor": mesh.get("tensor", 1)}
    forwards = Forwards(500.0, 50.0, 7.0)
    return Plan(found, mesh, mesh, 1e11, {"policy": 32e9 / mesh["fsdp"]}, [gradient, apply], 8000.0, forwards, [])


LAYOUTS = [
    ("v5p:4x4x4", (1, 64, 1), 8, ("v5p:2x2x2", (1, 8, 1))),
    ("v5p:4x4x4", (1, 64, 1), 64, ("v5p:4x4x4", (1, 64, 1))),
    ("v5p:4x4x4", (1, 64, 1), 1024, ("16xv5p:4x4x4", (16, 64, 1))),
    ("2xv5p:4x4x4", (2, 64, 1), 64, ("v5p:4x4x4", (1, 64, 1))),
    ("2xv5p:4x4x4", (4, 16, 2), 256, ("4xv5p:4x4x4", (8, 16, 2))),
    ("v5p:4x4x4", (4, 4, 4), 8, ("v5p:2x2x2", (2, 1, 4))),  # fsdp goes first, then data
    ("v5p:4x4x4", (1, 8, 8), 4, None),  # less than what tensor alone takes
    ("v5e:4x4", (1, 16, 1), 8, ("v5e:2x4", (1, 8, 1))),
    ("h100:64", (1, 64, 1), 8, ("h100:8", (1, 8, 1))),
    ("h100:64", (1, 64, 1), 512, ("h100:512", (8, 64, 1))),
    ("h100:64", (1, 64, 1), 96, None),
]


@pytest.mark.parametrize(("topology", "mesh", "chips", "expected"), LAYOUTS)
def test_layouts(topology, mesh, chips, expected):
    found = layout(parse_topology(topology), dict(zip(("data", "fsdp", "tensor"), mesh, strict=True)), chips)
    if expected is None:
        assert found is None
        return
    name, sizes = expected
    assert (found[0].name, tuple(found[1].values())) == (name, sizes)
    assert found[0] == parse_topology(name) and found[0].chips == chips


def sent_on(plan, chips):
    topology, mesh = layout(plan.topology, plan.mesh, chips)
    return {key: sent for key, (sent, _) in sent_there(plan.programs[0], plan, topology, mesh).items()}


def test_collectives_change_by_the_ring_factor_only():
    plan = plan_of("v5p:4x4x4", {"data": 1, "fsdp": 64}, all_gather_fsdp=63.0)
    assert sent_on(plan, 64) == {("all-gather", "fsdp"): pytest.approx(63e9)}
    assert sent_on(plan, 8) == {("all-gather", "fsdp"): pytest.approx(64e9 * 7 / 8)}
    # Between slices, new: float32 gradients of the 1/64 of the weights that a chip holds.
    several = sent_on(plan, 1024)
    assert several == {("all-gather", "fsdp"): pytest.approx(63e9),
                       ("all-reduce", SLICES): pytest.approx(2 * 15 / 16 * 32e9 / 64)}  # fmt: skip


def test_what_is_already_sent_between_slices_is_not_counted_twice():
    plan = plan_of("2xv5p:4x4x4", {"data": 2, "fsdp": 64}, all_gather_fsdp=63.0, all_reduce_slices=1.0)
    assert sent_on(plan, 1024)["all-reduce", SLICES] == pytest.approx(1e9 * (15 / 16) / (1 / 2))
    assert list(sent_on(plan, 64)) == [("all-gather", "fsdp")]  # one slice: nothing to send


def test_gpus_reduce_shards_between_replicas():
    plan = plan_of("h100:64", {"data": 1, "fsdp": 64}, reduce_scatter_fsdp=63.0)
    assert sent_on(plan, 256)["all-reduce", "data"] == pytest.approx(2 * 3 / 4 * 32e9 / 64)
    replicas = plan_of("h100:64", {"data": 8, "fsdp": 8}, reduce_scatter_fsdp=7.0, all_reduce_data=7.0)
    assert sent_on(replicas, 128)["all-reduce", "data"] == pytest.approx(8e9 * 15 / 16)
    # On one host fsdp shrinks: no replica is left, and shards are as before.
    assert list(sent_on(replicas, 8)) == [("all-reduce", "data")]


@pytest.mark.parametrize(("topology", "platform"), [("v5p:4x4x4", "tpu"), ("h100:64", "cuda")])
def test_the_table(topology, platform):
    if missing := missing_compiler(platform):
        pytest.skip(missing)
    plan = plan_of(topology, {"data": 1, "fsdp": 64}, all_gather_fsdp=20.0, reduce_scatter_fsdp=10.0)
    rows = weak_scaling(plan)
    assert [row.topology.chips for row in rows] == [8, 16, 32, 64, 128, 256, 512, 1024]
    assert {row.terms["compute"] for row in rows} == {8.0}  # the same work for each chip
    apply = [row.terms["HBM"] - 4 for row in rows]
    assert apply[:4] == pytest.approx([6.4, 3.2, 1.6, 0.8]) and set(apply[3:]) == {apply[3]}  # shards of the weights
    network = [row.terms["network"] for row in rows]
    assert network[0] == 0 and network[-1] > 0  # eight chips are one slice, or one host
    hops = [row.terms["hops"] for row in rows]
    assert hops[0] > 0 and hops[3:] == sorted(hops[3:])  # a torus closed to rings has fewer than a smaller open one
    dicts = scaling_dicts(rows)
    assert dicts[0]["efficiency"] == 1 and Counter(map(str, dicts[0]["terms"])) == Counter(map(str, rows[0].terms))
    text = format_scaling(plan, rows)
    assert "grows most from 8 to 1,024 chips: " in text and "stops scaling: " in text
    assert len({len(line) for line in text.splitlines()[1:10]}) == 1  # columns


def test_decoding_sends_as_much_on_any_number_of_chips():
    if missing := missing_compiler("tpu"):
        pytest.skip(missing)
    plan = plan_of("v5p:4x4x4", {"data": 1, "fsdp": 64})
    cost = Cost()
    cost.collective_calls["all-reduce", "tensor"] = 1000
    decode = Estimate("decode", 1, 1.0, 0, 0, 0, None, cost, 0.0, 1.0, link_seconds=0.5)
    plan = replace(plan, programs=[decode], rollout_mesh={"data": 16, "fsdp": 1, "tensor": 4})
    rows = weak_scaling(plan, (8, 64, 1024))
    assert all(row.terms == {**rows[0].terms, "links": 0.5, "network": 0.0} for row in rows)
    assert rows[0].terms["hops"] == pytest.approx(1000 * 3 * 1e-6) and rows[0].seconds == 1.0


def test_a_mesh_that_fits_no_other_number_of_chips():
    assert "cannot be cut or repeated" in format_scaling(plan_of("v5e:1x1", {"data": 1, "fsdp": 1}), [])
