"""Training compiled for one and for several TPU slices: what a chip sends to whom, and what offloading saves."""

import functools
import math

import jax
import pytest
from compiled import mesh_of
from test_plan import TINY, TINY_FLAGS

from tracerl_jax.config import RunConfig
from tracerl_jax.config_io import load_config
from tracerl_jax.models import PRESETS
from tracerl_jax.plan.estimate import chip_bytes, estimate_program
from tracerl_jax.plan.hlo_cost import SLICES
from tracerl_jax.plan.programs import plan_run
from tracerl_jax.plan.scaling import ring
from tracerl_jax.plan.topology import parse_topology
from tracerl_jax.plan.workload import assume

pytestmark = pytest.mark.slow  # every program is compiled by the TPU compiler
PARAMETERS = TINY.num_params()


@functools.cache
def planned(topology, sizes, *flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", TINY)
        config = load_config(RunConfig, "rl_sdar_4b_math", [*TINY_FLAGS, *flags])
        return plan_run(config, mesh_of(topology, *sizes), assume(config, 4)), config


@functools.cache
def estimated(topology, sizes, program, *flags):
    run, _ = planned(topology, sizes, *flags)
    resident = sum(map(chip_bytes, run.resident.values()))
    return estimate_program(next(p for p in run.programs if p.name == program), parse_topology(topology), resident)


def sent(topology, sizes):
    return estimated(topology, sizes, "policy gradient").cost.collective_bytes


def inside(found):
    return sum(size for (_, axes), size in found.items() if axes != SLICES)


def test_nothing_in_a_slice_grows_but_by_the_ring_factor():
    """From 8 to 16 chips of a slice, and from one to four slices; ids apart, see docs/scaling.md."""
    eight, sixteen = sent("v5p:2x2x2", (1, 8, 1)), sent("v5p:2x2x4", (1, 16, 1))
    config = planned("v5p:2x2x2", (1, 8, 1))[1]
    ids = 4 * config.rl.rows_per_device * config.rl.row_length * (16 - 8)
    assert inside(sixteen) <= 1.01 * inside(eight) * ring(16) / ring(8) + ids
    for slices in (2, 4):
        several = sent(f"{slices}xv5p:2x2x2", (slices, 8, 1))
        assert inside(several) <= 1.01 * inside(eight) + 8 * PARAMETERS * ring(8)  # all-reduce for reduce-scatter
        assert all("data" not in axes for _, axes in several)


def test_only_shards_of_gradients_go_to_other_slices():
    two, four = (sent(f"{n}xv5p:2x2x2", (n, 8, 1)) for n in (2, 4))
    assert {kind for kind, axes in two if axes == SLICES} == {"all-reduce"}
    shard = PARAMETERS / 8
    assert 2 * shard <= two["all-reduce", SLICES] / (2 * ring(2)) <= 1.05 * 4 * shard  # in bf16 or float32
    assert four["all-reduce", SLICES] / ring(4) == pytest.approx(two["all-reduce", SLICES] / ring(2), rel=0.01)


def test_offloaded_moments_leave_the_chip():
    flag, place = "--config.rl.optimizer.offload=true", ("v5p:2x2x2", (1, 8, 1))
    run, there = (planned(*place, *flags)[0] for flags in ((), (flag,)))
    moments = sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(run.resident["policy optimizer"]) if leaf.ndim
    )  # fmt: skip
    assert chip_bytes(there.resident["policy optimizer"], on_host=True) == moments
    assert chip_bytes(there.resident["policy optimizer"]) == chip_bytes(run.resident["policy optimizer"]) - moments
    here, gone = (estimated(*place, "policy gradient", *flags) for flags in ((), (flag,)))
    assert here.peak_bytes - gone.peak_bytes == pytest.approx(moments, rel=0.01)
    apply, offloaded = (estimated(*place, "policy apply", *flags) for flags in ((), (flag,)))
    # Arguments are padded to tiles: norm scales to several times their size.
    assert apply.argument_bytes - offloaded.argument_bytes == pytest.approx(moments, rel=0.01)
    # They are back while they are used, and the new ones beside the old: nothing is updated in place any more.
    assert offloaded.peak_bytes <= apply.peak_bytes + 2 * moments
