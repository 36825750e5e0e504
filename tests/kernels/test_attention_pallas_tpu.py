"""The TPU kernels of two-interval attention: interpreted, with race detection and poisoned memory, and compiled."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_utils import PATTERNS, RESULTS, check, draw_arrays, replay, value_and_gradients, visible_pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from tracerl_jax.kernels.attention import attention
from tracerl_jax.kernels.attention.pallas_tpu import pallas_tpu_attention
from tracerl_jax.kernels.attention.tpu_tiles import TILE, Plan, fetched_windows, make_plan, tile_lists
from tracerl_jax.models.attention import sequence_attend
from tracerl_jax.parallel.mesh import make_mesh
from tracerl_jax.plan.topology import compile_devices, missing_compiler

# Memory that nobody wrote reads as NaN: an element of a result that is left out shows.
INTERPRET = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
whole_rows = partial(pallas_tpu_attention, interpret=INTERPRET)
single_tiles = partial(pallas_tpu_attention, block=1, window=1, interpret=INTERPRET)
uneven = partial(pallas_tpu_attention, block=2, window=3, interpret=INTERPRET)

CASES = {  # (N, T, S, H, K, D, dtype)
    "whole rows": (whole_rows, (2, 260, 260, 2, 1, 64, "float32")),
    "one tile a step, two heads": (single_tiles, (1, 256, 256, 2, 2, 64, "float32")),
    "padded blocks and windows": (uneven, (1, 385, 500, 1, 1, 80, "float32")),
    "bfloat16, three heads a group": (uneven, (1, 300, 300, 3, 1, 128, "bfloat16")),
}
# bfloat16 rounds the weights and the results (2**-9 relative), not the sums.
TOLERANCE = {"float32": 3e-6, "bfloat16": 2**-7}


def case_intervals(shape, seed):
    """Every row of another kind; the patterns are made for T queries over T keys, so the rest is drawn."""
    N, T, S = shape[:3]
    rng = np.random.default_rng(seed)
    pattern = PATTERNS[seed % len(PATTERNS)] if S == T else lambda T, rng: rng.integers(0, S + 1, size=(T, 4))
    return np.stack([pattern(T, rng), *(replay(T, rng) for _ in range(N - 1))])


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=3)
@given(seed=st.integers(0, 2**32 - 1))
def test_values_and_gradients_match_dense_maths_without_races(name, seed):
    run, shape = CASES[name]
    check(run, draw_arrays(*shape[:6], seed, shape[6]), case_intervals(shape, seed), TOLERANCE[shape[6]])
    assert not interpreter.races.races_found


def test_queries_without_keys_give_zeros_and_no_gradient():
    """The log-sum-exp of such a query is -inf; whatever its cotangent is, NaN too, must not spread."""
    _, shape = CASES["whole rows"]
    intervals = np.zeros((2, 260, 4), np.int32)
    intervals[0, :] = [9, 3, 260, 260]  # inverted, and empty behind the keys
    intervals[1, 133] = [2, 6, 0, 0]
    q, k, v, d_out, d_lse = draw_arrays(*shape[:6])
    blind = np.ones((2, 260), bool)
    blind[1, 133] = False
    d_lse = jnp.where(blind[..., None], jnp.nan, d_lse)
    out, lse, *gradients = value_and_gradients(whole_rows)(q, k, v, jnp.asarray(intervals), d_out, d_lse)
    assert not np.any(np.asarray(out)[blind]) and np.all(np.asarray(lse)[blind] == -np.inf)
    d_q, d_k, d_v = (np.asarray(x) for x in gradients)
    assert not np.any(d_q[blind]) and np.all(np.isfinite(d_q)) and np.any(d_q[1, 133])
    for d in (d_k, d_v):
        assert not np.any(d[0]) and not np.any(d[1, 6:]) and np.all(np.isfinite(d)) and np.any(d[1, 2:6])


@pytest.mark.parametrize("name", ["padded blocks and windows", "bfloat16, three heads a group"])
def test_tiles_outside_the_intervals_are_not_computed(name):
    """A tile that no query of the row needs, inside a window that is fetched, is NaN."""
    run, shape = CASES[name]
    intervals = np.tile([3, 40, 258, 290], (1, shape[1], 1))
    q, k, v, *cotangents = draw_arrays(*shape[:6], dtype=shape[6])
    clean = value_and_gradients(run)(q, k, v, jnp.asarray(intervals), *cotangents)
    unread = np.zeros(shape[2], bool)
    unread[TILE : 2 * TILE] = unread[3 * TILE :] = True
    k, v = (x.at[:, unread].set(jnp.nan) for x in (k, v))
    for a, e in zip(value_and_gradients(run)(q, k, v, jnp.asarray(intervals), *cotangents), clean, strict=True):
        np.testing.assert_array_equal(a, e)
    for name in ("d_k", "d_v"):
        assert not np.any(np.asarray(clean[RESULTS.index(name)])[:, unread])


@partial(jax.jit, static_argnums=1)
def list_tiles(intervals, plan):
    lists = tile_lists(intervals, plan)
    return lists, fetched_windows(lists)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), visit=st.sampled_from([1, 2]))
def test_lists_name_the_tiles_with_a_visible_pair_and_windows_with_such_a_tile(seed, visit):
    plan = Plan(heads=1, blocks=3, block=2, windows=2, window=3, visit=visit)
    T, S = 6 * TILE, 6 * TILE
    rng = np.random.default_rng(seed)
    intervals = np.stack([PATTERNS[seed % len(PATTERNS)](T, rng), replay(T, rng)])
    lists, fetched = (np.asarray(x) for x in list_tiles(jnp.asarray(intervals, jnp.int32), plan))
    live = visible_pairs(intervals, S).reshape(2, 6, TILE, 6, TILE).any((2, 4)).reshape(2, 3, 2, 2, 3)
    for n in range(2):
        held = 0
        for i in range(plan.blocks):
            for w in range(plan.windows):
                for j in range(plan.block):
                    visits, *tiles = lists[n, w, i, j]
                    expected = w * 3 + np.flatnonzero(live[n, i, j, w])
                    assert visits == -(-len(expected) // visit) and visits * visit <= len(tiles)
                    np.testing.assert_array_equal(tiles[: len(expected)], expected)
                    assert all(tile == 6 for tile in tiles[len(expected) :])
                held = w if live[n, i, :, w].any() else held  # the pipeline copies a window when its number changes
                assert fetched[n, i * 2 + w] == held


def test_shard_map_over_rows_and_heads():
    arrays = draw_arrays(2, 140, 140, 4, 2, 64)
    intervals = np.stack([replay(140, np.random.default_rng(s)) for s in range(2)])
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    heads, rows = PartitionSpec("data", None, "tensor"), PartitionSpec("data")
    check(jax.shard_map(whole_rows, mesh=mesh, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False),
          arrays, intervals)  # fmt: skip


def compile_gradients(topology, N, T, H, K, D, dtype):
    """The program of `value_and_gradients` for one chip, with the default implementation."""
    mesh = make_mesh(devices=compile_devices(topology))
    sharding = SingleDeviceSharding(mesh.devices.item())
    shapes = [((N, T, H, D), dtype), ((N, T, K, D), dtype), ((N, T, K, D), dtype), ((N, T, 4), jnp.int32),
              ((N, T, H, D), dtype), ((N, T, H), jnp.float32)]  # fmt: skip
    specs = [jax.ShapeDtypeStruct(*shape, sharding=sharding) for shape in shapes]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        # A new function every time: jit's own cache does not know of the mesh's platform.
        run = value_and_gradients(lambda *args: attention(*args, return_lse=True))
        return run.trace(*specs).lower(lowering_platforms=("tpu",)).compile()


def largest_array(compiled):
    return max(math.prod(map(int, shape.split(","))) for shape in re.findall(r"\w\[([\d,]+)\]", compiled.as_text()))


@pytest.mark.parametrize("topology", ["v4:1x1x1", "v5e:1x1", "v5p:1x1x1", "v6e:1x1"])
def test_compiles_forward_and_backward(topology):
    if missing := missing_compiler("tpu"):
        pytest.skip(missing)
    for K, D, dtype in [(1, 128, jnp.bfloat16), (2, 80, jnp.float32)]:
        text = compile_gradients(topology, 1, 300, 2, K, D, dtype).as_text()
        assert text.count('custom_call_target="tpu_custom_call"') == 2


@pytest.mark.parametrize("D", [64, 96, 256])
def test_other_head_dims_compile(D):
    if missing := missing_compiler("tpu"):
        pytest.skip(missing)
    compile_gradients("v5e:1x1", 1, 300, 2, 1, D, jnp.bfloat16)


@pytest.mark.parametrize("topology", ["v4:1x1x1", "v5p:1x1x1"])
def test_a_long_row_of_the_8b_model_fits_vector_memory_and_has_no_square_buffer(topology):
    """Windows of keys on the v4, whole rows on the v5p."""
    if missing := missing_compiler("tpu"):
        pytest.skip(missing)
    T, H, K, D = 8192, 32, 8, 128
    compiled = compile_gradients(topology, 1, T, H, K, D, jnp.bfloat16)
    assert largest_array(compiled) == T * H * D < T * T
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * T * H * D * 4


def test_the_model_runs_the_kernel_on_its_part_of_a_mesh():
    """Rows over fsdp, heads over tensor: nothing is gathered or exchanged."""
    if missing := missing_compiler("tpu"):
        pytest.skip(missing)
    mesh = make_mesh(data=1, fsdp=2, tensor=2, devices=compile_devices("v5e:2x2"))
    heads = NamedSharding(mesh, PartitionSpec("fsdp", None, "tensor"))
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    q, k = (jax.ShapeDtypeStruct((2, 200, h, 64), jnp.bfloat16, sharding=heads) for h in (4, 2))
    intervals = jax.ShapeDtypeStruct((2, 200, 4), jnp.int32, sharding=rows)

    def gradients(q, k, v, intervals):
        attend = sequence_attend(intervals, None, mesh)
        return jax.grad(lambda *qkv: jnp.sum(attend(*qkv).astype(jnp.float32) ** 2), (0, 1, 2))(q, k, v)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(gradients, out_shardings=heads).trace(q, k, k, intervals)
        text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2
    assert not re.search(r"all-gather|all-reduce|all-to-all|collective-permute", text)


def test_plans_of_real_sizes():
    """Whole rows of 8192 keys in the vector memory of a v5p, windows of them in that of a v4."""
    shape, sizes = (8192, 8192, 8, 4, 128), {"query_bytes": 20, "key_bytes": 24, "itemsize": 2}
    assert make_plan(shape, vmem=64 * 2**20, **sizes) == Plan(1, 16, 4, 1, 64, 2)
    assert make_plan(shape, vmem=16 * 2**20, **sizes) == Plan(1, 32, 2, 4, 16, 2)
    assert make_plan((4096, 4096, 32, 1, 128), vmem=64 * 2**20, **sizes).heads == 4  # without groups: several heads


def test_what_the_kernel_cannot_run_is_refused():
    q, k, v, *_ = draw_arrays(1, 8, 8, 2, 2, 32)
    intervals = jnp.zeros((1, 8, 4), jnp.int32)
    with pytest.raises(ValueError, match=r"^attention: 'pallas_tpu' runs on a TPU, and this program is for cpu\.$"):
        attention(q, k, v, intervals, implementation="pallas_tpu")
    with pytest.raises(ValueError, match=r"^attention: .* head_dim \(64, 80, 96, 128, 256\), not 32\.$"):
        whole_rows(q, k, v, intervals)
