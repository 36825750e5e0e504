"""Two-interval attention against float64 maths: every mask the project uses, gradients, tiles, transformations."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_utils import PATTERNS, RESULTS, causal, check, draw_arrays, replay, value_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from tracerl_jax.kernels.attention import attention
from tracerl_jax.kernels.attention.chunked import Plan, chunked_attention
from tracerl_jax.kernels.attention.masks import nth_tile, tile_ranges
from tracerl_jax.kernels.attention.reference import reference_attention

SMALL_TILES = [Plan(rows=16, keys=8, one_by_one=True), Plan(rows=32, keys=16, one_by_one=False)]
UNDER_TEST = [
    pytest.param(reference_attention, id="reference"),
    pytest.param(chunked_attention, id="chunked"),
    *(pytest.param(partial(chunked_attention, plan=plan), id=f"tiles-{plan.rows}x{plan.keys}") for plan in SMALL_TILES),
]

SHAPES = [(2, 64, 4, 2, 8), (3, 45, 3, 3, 4), (1, 50, 4, 1, 16)]  # (N, T, H, K, D)


@pytest.mark.parametrize("run", UNDER_TEST)
@settings(max_examples=25, deadline=None)
@given(shape=st.sampled_from(SHAPES), patterns=st.lists(st.sampled_from(PATTERNS), min_size=3, max_size=3),
       seed=st.integers(0, 2**32 - 1))
def test_values_and_gradients_match_dense_maths(run, shape, patterns, seed):
    N, T, H, K, D = shape
    rng = np.random.default_rng(seed)
    intervals = np.stack([pattern(T, rng) for pattern in patterns[:N]])
    check(run, draw_arrays(N, T, T, H, K, D, seed), intervals)


@pytest.mark.parametrize("run", UNDER_TEST)
def test_keys_of_another_length(run):
    rng = np.random.default_rng(1)
    check(run, draw_arrays(2, 19, 37, 2, 1, 8), rng.integers(0, 38, size=(2, 19, 4)))


@pytest.mark.parametrize("run", UNDER_TEST)
def test_queries_without_keys_give_zeros_and_no_gradient(run):
    intervals = np.zeros((2, 24, 4), np.int32)
    intervals[0, :, :] = [9, 3, 24, 24]  # inverted, and empty behind the keys
    intervals[1, 5] = [2, 6, 0, 0]
    out, _, d_q, d_k, _ = check(run, draw_arrays(2, 24, 24, 2, 1, 8), intervals)
    blind = np.ones((2, 24), bool)
    blind[1, 5] = False
    assert not np.any(np.asarray(out)[blind]) and not np.any(np.asarray(d_q)[blind])
    assert not np.any(np.asarray(d_k)[0])


@pytest.mark.parametrize("run", UNDER_TEST)
def test_large_scores_neither_overflow_nor_lose_the_maximum(run):
    q, k, v, d_out, d_lse = draw_arrays(1, 40, 40, 2, 2, 8)
    check(run, (q * 60, k * 60, v, d_out * 1e-3, d_lse * 1e-3), causal(40, None)[None], atol=1e-4)


@pytest.mark.parametrize("run", UNDER_TEST)
def test_bfloat16_keeps_its_dtype_and_accumulates_in_float32(run):
    arrays = draw_arrays(2, 64, 64, 4, 2, 16, dtype=jnp.bfloat16)
    intervals = np.stack([replay(64, np.random.default_rng(s)) for s in range(2)])
    # The weights and the results are rounded to bf16 (2**-9 relative), the sums over up to 64 keys are not.
    check(run, arrays, intervals, atol=2**-7)


@pytest.mark.parametrize("plan", SMALL_TILES)
def test_tiles_outside_the_intervals_are_never_read(plan):
    arrays = draw_arrays(2, 32, 64, 2, 1, 8)
    intervals = np.tile([33, 47, 3, 10], (2, 32, 1))
    compute = value_and_gradients(partial(chunked_attention, plan=plan))
    clean = compute(*arrays[:3], jnp.asarray(intervals), *arrays[3:])
    unread = np.ones(64, bool)
    unread[:16] = unread[32:48] = False
    q, k, v, *cotangents = arrays
    k, v = (x.at[:, unread].set(jnp.nan) for x in (k, v))
    for a, e in zip(compute(q, k, v, jnp.asarray(intervals), *cotangents), clean, strict=True):
        np.testing.assert_array_equal(a, e)
    assert not np.any(np.asarray(clean[RESULTS.index("d_k")])[:, unread])


@partial(jax.jit, static_argnums=1)
def first_visits(intervals, size):
    ranges = tile_ranges(intervals, size)
    return jax.vmap(lambda j: nth_tile(ranges, j))(jnp.arange(70))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_tile_visits_are_the_touched_tiles_each_once(data):
    S, size = data.draw(st.integers(1, 60)), data.draw(st.sampled_from([1, 4, 7, 16]))
    bound = st.integers(0, S)
    intervals = np.array(data.draw(st.lists(st.tuples(bound, bound, bound, bound), min_size=3, max_size=3)), np.int32)
    wanted = set()
    for start, end in ((intervals[:, 0], intervals[:, 1]), (intervals[:, 2], intervals[:, 3])):
        some = end > start
        if some.any():  # one range of tiles per interval: from the first to the last key that a query of the tile sees
            wanted |= set(range(start[some].min() // size, -(-end[some].max() // size)))
    tiles, live = (np.asarray(x) for x in first_visits(intervals, size))
    assert tiles[live].tolist() == sorted(wanted)
    assert live.tolist() == sorted(live, reverse=True)


def test_replay_layout_visits_a_small_part_of_the_tiles():
    """One response of 128 blocks of 4, a group each: a clean query sees the clean stream so far, a group its prefix."""
    clean, B = 512, 4
    rows = [(0, (t // B + 1) * B, 0, 0) for t in range(clean)]
    rows += [(0, t // B * B, clean + t // B * B, clean + t // B * B + B) for t in range(clean)]
    ranges = np.asarray(tile_ranges(jnp.asarray(rows).reshape(-1, 64, 4), 64))
    np.testing.assert_array_equal(ranges[:, 1] + ranges[:, 3], [1, 2, 3, 4, 5, 6, 7, 8, 2, 3, 4, 5, 6, 7, 8, 9])


def test_memory_grows_with_the_tokens_not_with_their_square():
    T = 4096
    run = value_and_gradients(chunked_attention)
    q = jax.ShapeDtypeStruct((1, T, 2, 8), jnp.float32)
    k = jax.ShapeDtypeStruct((1, T, 1, 8), jnp.float32)
    lse = jax.ShapeDtypeStruct((1, T, 2), jnp.float32)
    compiled = run.lower(q, k, k, jax.ShapeDtypeStruct((1, T, 4), jnp.int32), q, lse).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < T * T // 8  # a boolean mask alone takes T * T


def test_scan_over_rematerialised_layers():
    q, k, v, d_out, _ = draw_arrays(2, 40, 40, 4, 2, 8)
    intervals = jnp.asarray(np.stack([replay(40, np.random.default_rng(s)) for s in range(2)]), jnp.int32)

    def stacked(run):
        def layer(x, scale):
            return x + run(x * scale, k, v, intervals)[0], None

        def loss(q, scales):
            return jnp.sum(jax.lax.scan(jax.checkpoint(layer), q, scales)[0] * d_out)

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(q, jnp.array([1.0, 0.5, 2.0]))

    expected = stacked(reference_attention)
    actual = stacked(partial(chunked_attention, plan=SMALL_TILES[0]))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), actual, expected)


@pytest.mark.parametrize("name", ["reference", "chunked"])
def test_shard_map_over_rows_and_heads(name):
    arrays = draw_arrays(4, 140, 140, 4, 2, 8)
    intervals = np.stack([replay(140, np.random.default_rng(s)) for s in range(4)])
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    heads, rows = PartitionSpec("data", None, "tensor"), PartitionSpec("data")
    run = partial(attention, implementation=name, return_lse=True)
    check(jax.shard_map(run, mesh=mesh, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False),
          arrays, intervals)  # fmt: skip


def test_default_choice_agrees_on_both_sides_of_its_threshold():
    for T in (16, 160):
        check(partial(attention, return_lse=True), draw_arrays(1, T, T, 2, 1, 8), causal(T, None)[None])


def test_intervals_are_clipped_to_the_keys():
    q, k, v, *_ = draw_arrays(1, 12, 12, 2, 1, 8)
    beyond = jnp.array([-7, 5, 9, 400]) * jnp.ones((1, 12, 1), jnp.int32)
    inside = jnp.array([0, 5, 9, 12]) * jnp.ones((1, 12, 1), jnp.int32)
    np.testing.assert_array_equal(attention(q, k, v, beyond), attention(q, k, v, inside))


def test_bad_calls_are_refused():
    q, k, v, *_ = draw_arrays(1, 8, 8, 4, 2, 4)
    intervals = jnp.zeros((1, 8, 4), jnp.int32)
    with pytest.raises(ValueError, match=r"unknown implementation 'flash'; known: chunked, .*reference"):
        attention(q, k, v, intervals, implementation="flash")
    with pytest.raises(ValueError, match="K dividing H"):
        attention(q[:, :, :3], k, v, intervals)
    with pytest.raises(ValueError, match="not one of bfloat16, float32"):
        attention(q, k.astype(jnp.bfloat16), v, intervals)
    with pytest.raises(ValueError, match="intervals"):
        attention(q, k, v, intervals[:, :4])
    with pytest.raises(ValueError, match="intervals float32"):
        attention(q, k, v, intervals.astype(jnp.float32))
