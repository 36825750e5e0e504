"""The GPU kernels of two-interval attention: interpreted, against float64 maths, and compiled for H100 and A100.

The interpreter hands out memory full of NaN: an element of a result that no program writes shows.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_utils import PATTERNS, RESULTS, check, draw_arrays, replay, value_and_gradients, visible_pairs
from gpu_compile import compile_for, lower_for
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from tracerl_jax.kernels.attention import attention
from tracerl_jax.kernels.attention.pallas_gpu import Plan, Tile, default_plan, meetings, pallas_gpu_attention, visits


def interpreted(forward, dq, dkv):
    return partial(pallas_gpu_attention, plan=Plan(forward, dq, dkv, interpret=True))


SMALL = interpreted(Tile(16, 16), Tile(32, 16), Tile(16, 32))
DEFAULT = partial(pallas_gpu_attention, plan=default_plan(64, jnp.bfloat16)._replace(interpret=True))
CASES = {  # (N, T, S, H, K, D, dtype)
    "many small tiles": (SMALL, (2, 128, 128, 4, 2, 64, "float32")),
    "no multiple of a tile, head padded": (SMALL, (2, 90, 90, 3, 3, 80, "float32")),
    "keys of another length": (SMALL, (1, 19, 150, 2, 1, 96, "float32")),
    "bfloat16, default tiles": (DEFAULT, (2, 200, 200, 4, 1, 64, "bfloat16")),
}
# bfloat16 rounds the weights and the results (2**-9 relative), not the sums.
TOLERANCE = {"float32": 3e-6, "bfloat16": 2**-7}


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=12)
@given(patterns=st.lists(st.sampled_from(PATTERNS), min_size=2, max_size=2), seed=st.integers(0, 2**32 - 1))
def test_values_and_gradients_match_dense_maths(name, patterns, seed):
    run, (N, T, S, *heads, dtype) = CASES[name]
    rng = np.random.default_rng(seed)
    intervals = np.stack([pattern(T, rng) for pattern in patterns[:N]])
    if S != T:
        intervals = rng.integers(0, S + 1, size=intervals.shape)
    check(run, draw_arrays(N, T, S, *heads, seed, dtype), intervals, TOLERANCE[dtype])


def test_queries_without_keys_give_zeros_and_no_gradient_whatever_the_cotangent_of_their_lse():
    run, shape = CASES["many small tiles"]
    q, k, v, d_out, d_lse = draw_arrays(*shape[:6])
    intervals = np.zeros((2, 128, 4), np.int32)
    intervals[0] = [9, 3, 128, 128]  # inverted, and empty behind the keys
    intervals[1, 5] = [2, 6, 0, 0]
    blind = np.ones((2, 128), bool)
    blind[1, 5] = False
    arrays = q, k, v, d_out, jnp.where(blind[..., None], jnp.nan, d_lse)
    results = value_and_gradients(run)(*arrays[:3], jnp.asarray(intervals), *arrays[3:])
    results = dict(zip(RESULTS, results, strict=True))
    assert np.isneginf(results["lse"][blind]).all()
    assert not np.any(np.asarray(results["out"])[blind]) and not np.any(np.asarray(results["d_q"])[blind])
    assert not np.any(np.asarray(results["d_k"])[0]) and not np.isnan(results["d_k"]).any()


def test_tiles_outside_the_intervals_are_never_read():
    run, (N, T, S, *heads, dtype) = CASES["many small tiles"]
    q, k, v, *cotangents = draw_arrays(N, T, S, *heads)
    intervals = jnp.tile(jnp.array([65, 95, 3, 10]), (2, 128, 1))
    compute = value_and_gradients(run)
    clean = compute(q, k, v, intervals, *cotangents)
    unread = np.ones(S, bool)
    unread[:16] = unread[64:96] = False
    k, v = (x.at[:, unread].set(jnp.nan) for x in (k, v))
    for name, a, e in zip(RESULTS, compute(q, k, v, intervals, *cotangents), clean, strict=True):
        if name in ("d_k", "d_v"):  # tiles of 32 keys there
            assert not np.any(np.asarray(a)[:, 96:])
        else:
            np.testing.assert_array_equal(a, e)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), pattern=st.sampled_from(PATTERNS), S=st.sampled_from([60, 96, 128]))
def test_worklists_name_the_tiles_with_a_visible_pair_once_and_those_seen_in_full_first(seed, pattern, S):
    intervals = np.clip(np.stack([pattern(128, np.random.default_rng(seed + i)) for i in range(2)]), 0, S)
    touched, full = meetings(jnp.asarray(intervals, jnp.int32).swapaxes(1, 2), Tile(16, 32), S)
    pairs = np.pad(visible_pairs(intervals, S), ((0, 0), (0, 0), (0, -S % 32))).reshape(2, 8, 16, -1, 32)
    np.testing.assert_array_equal(touched, pairs.any((2, 4)))
    assert not np.any(full & ~pairs.all((2, 4)))
    for axes in ((0, 1, 2), (0, 2, 1)):
        order, counts = (np.asarray(x) for x in visits(touched.transpose(axes), full.transpose(axes)))
        for index in np.ndindex(counts.shape[:2]):
            n_full, n = counts[index]
            for tiles, wanted in ((order[index][:n_full], full), (order[index][n_full:n], touched & ~full)):
                assert tiles.tolist() == np.flatnonzero(wanted.transpose(axes)[index]).tolist()


def test_causal_rows_need_masks_on_the_diagonal_only():
    t = np.arange(128)
    causal = jnp.asarray(np.stack([0 * t, t + 1, 0 * t, 0 * t])[None], jnp.int32)
    _, counts = visits(*meetings(causal, Tile(16, 16), 128))
    np.testing.assert_array_equal(counts[0], [[i, i + 1] for i in range(8)])


def test_shard_map_over_rows_and_heads():
    arrays = draw_arrays(4, 40, 40, 4, 2, 64)
    intervals = np.stack([replay(40, np.random.default_rng(s)) for s in range(4)])
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    heads, rows = PartitionSpec("data", None, "tensor"), PartitionSpec("data")
    check(jax.shard_map(SMALL, mesh=mesh, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False),
          arrays, intervals)  # fmt: skip


def test_named_but_unfit_raises_one_sentence():
    q, k, v, *_ = draw_arrays(1, 8, 8, 4, 2, 64)
    intervals = jnp.zeros((1, 8, 4), jnp.int32)
    with pytest.raises(ValueError, match="'pallas_gpu' runs on an NVIDIA GPU, and this program is for cpu"):
        attention(q, k, v, intervals, implementation="pallas_gpu")
    with pytest.raises(ValueError, match=r"made for head_dim .*, not 72"):
        SMALL(*(x[..., :1].repeat(72, -1) for x in (q, k, v)), intervals)


def program(D, dtype, run=attention, T=1000):
    """Forward and backward of a layer with 8 heads over 2 key/value heads."""

    def both(q, k, v, intervals, d_out):
        out, pull = jax.vjp(lambda *qkv: run(*qkv, intervals), q, k, v)
        return out, pull(d_out)

    q, k = (jax.ShapeDtypeStruct((2, T, heads, D), dtype) for heads in (8, 2))
    return both, q, k, k, jax.ShapeDtypeStruct((2, T, 4), jnp.int32), q


@pytest.mark.parametrize("topology,D,dtype", [
    ("h100:1", 128, "bfloat16"),
    ("a100:1", 128, "bfloat16"),
    *(pytest.param(chip, D, dtype, marks=pytest.mark.slow)
      for chip in ("h100:1", "a100:1") for D in (64, 80, 96, 128, 256) for dtype in ("bfloat16", "float32")),
])  # fmt: skip
def test_compiles_without_spills(topology, D, dtype):
    run = partial(attention, implementation="pallas_gpu")
    text = compile_for(topology, *program(D, dtype, run)).as_text()
    for kernel in ("attention_forward", "attention_dq", "attention_dkv"):
        assert kernel in text


def test_the_spill_gate_notices_a_tile_that_is_too_large():
    def run(*args):
        return pallas_gpu_attention(*args, plan=Plan(*[Tile(64, 64, warps=4)] * 3))[0]

    with pytest.raises(jax.errors.JaxRuntimeError, match="register spilling"):
        compile_for("h100:1", *program(128, "bfloat16", run))


def test_gpu_programs_take_the_kernels_by_default_and_no_memory_in_the_square_of_the_tokens():
    T = 8192
    compiled = compile_for("h100:1", *program(64, "bfloat16", T=T))
    assert "attention_dkv" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < T * T  # a boolean mask per row alone takes 2 T * T
    assert "attention_dkv" not in lower_for("h100:1", *program(64, "float32")).as_text()
    assert "attention_dkv" in lower_for("h100:1", *program(64, "bfloat16")).as_text()
