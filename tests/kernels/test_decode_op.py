"""Block decode attention in plain XLA against float64 maths; independence from neighbours and from garbage."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_cases import LAYER, Case, all_new, check, dense, fused, lengths, operands
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tracerl_jax.kernels.attention import attention
from tracerl_jax.kernels.decode import KVCache, decode_attention, quantize_kv
from tracerl_jax.kernels.decode.chunked import chunked_decode_attention

CASES = [
    Case(3, 4, 20, 4, 2, 8),
    Case(2, 8, 24, 3, 3, 4, page=4),
    Case(4, 2, 33, 4, 1, 16, store="int8"),
    Case(2, 4, 32, 4, 2, 16, "bfloat16", page=8, store="int8"),
    Case(2, 4, 40, 4, 2, 16, "bfloat16"),
]
CHUNK = 8


@cache
def compiled(name):
    if name == "chunked":
        return jax.jit(partial(chunked_decode_attention, chunk=CHUNK))
    return jax.jit(partial(decode_attention, implementation=name))


@pytest.mark.parametrize("name", ["reference", "chunked"])
@settings(max_examples=40)
@given(data=st.data(), case=st.sampled_from(CASES), seed=st.integers(0, 2**32 - 1),
       poison=st.sampled_from([np.nan, np.inf, -np.inf, 1e30]))
def test_matches_float64_maths_whatever_lies_beyond_the_cache_length(name, data, case, seed, poison):
    cache_len = data.draw(lengths(case, CHUNK))
    ends = st.integers(0, case.Q)
    intervals = data.draw(st.lists(st.tuples(ends, ends), min_size=case.N * case.Q, max_size=case.N * case.Q))
    check(compiled(name), case, cache_len, np.array(intervals).reshape(case.N, case.Q, 2), seed, poison)


def test_fused_commit_agrees_with_attention_over_the_same_keys():
    case = Case(2, 8, 16, 4, 2, 8)
    given = operands(case, [16, 7], fused(case, [True, False]), poison=1.0)
    k, v = (
        np.concatenate([np.swapaxes(x[LAYER], 1, 2), given[new]], 1)
        for x, new in ((given["cache"].k, "k_new"), (given["cache"].v, "v_new"))
    )
    intervals = [[[0, n, *(case.S + np.asarray(new))] for new in row]
                 for n, row in zip([16, 7], given["new_intervals"], strict=True)]
    expected = attention(given["q"], k, v, np.array(intervals, np.int32), implementation="reference")
    np.testing.assert_allclose(decode_attention(**given), expected, atol=2e-6, rtol=0)


def test_intervals_default_to_all_new_tokens():
    case = CASES[0]
    given = operands(case, [20, 0, 9])
    expected = decode_attention(**given)
    del given["new_intervals"]
    np.testing.assert_array_equal(decode_attention(**given), expected)
    np.testing.assert_array_equal(decode_attention(**given, new_intervals=all_new(case)), expected)


@pytest.mark.parametrize("name", ["reference", "chunked"])
def test_a_row_is_the_same_to_the_bit_alone_or_beside_any_neighbours(name):
    case, run = Case(4, 4, 32, 4, 2, 8), compiled(name)
    cache_len = np.array([5, 32, 0, 17], np.int32)
    own, other = (operands(case, n, seed=i, poison=1.0) for i, n in enumerate((cache_len, 32 - cache_len)))
    together = np.asarray(run(**own))

    def rows(pick):
        """`pick` of (own, other) arrays, with slots in front."""
        def leaf(x, y, axis):
            return jnp.moveaxis(pick(jnp.moveaxis(x, axis, 0), jnp.moveaxis(y, axis, 0)), 0, axis)

        kv = [leaf(x, y, 1) for x, y in zip(own["cache"][:2], other["cache"][:2], strict=True)]
        rest = {key: leaf(own[key], other[key], 0) for key in own if key not in ("cache", "layer")}
        return {**rest, "cache": KVCache(*kv), "layer": own["layer"]}

    for n in range(4):
        np.testing.assert_array_equal(run(**rows(lambda x, y, n=n: x[n : n + 1]))[0], together[n])
        mixed = run(**rows(lambda x, y, n=n: y.at[n].set(x[n])))
        np.testing.assert_array_equal(mixed[n], together[n])


@pytest.mark.parametrize("name", ["reference", "chunked"])
def test_large_scores_do_not_overflow(name):
    given = operands(Case(2, 4, 16, 2, 2, 8), [16, 3], scale=60.0)
    np.testing.assert_allclose(compiled(name)(**given), dense(**given), atol=60 * 1e-3, rtol=0)


@pytest.mark.parametrize("case", [Case(4, 4, 24, 4, 2, 8), Case(4, 4, 24, 4, 2, 8, page=4, store="int8")], ids=str)
def test_shard_map_over_rows_and_heads(case):
    """Every shard of rows owns a share of the pages and numbers them from 0."""
    cache_len = np.array([24, 0, 9, 13], np.int32)
    parts = [operands(case._replace(N=1), cache_len[n : n + 1], seed=n) for n in range(4)]

    def join(path, *leaves):
        axis = 1 if path[0].key == "cache" and path[1].name != "pages" else 0
        return np.concatenate(leaves, axis) if leaves[0].ndim else leaves[0]

    whole = jax.tree_util.tree_map_with_path(join, *parts)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    heads, rows, stored = P("data", None, "tensor"), P("data"), P(None, "data", "tensor")
    scale = None if case.store is None else stored
    specs = {"q": heads, "cache": KVCache(stored, stored, scale, scale, rows if case.page else None), "layer": P(),
             "k_new": heads, "v_new": heads, "cache_len": rows, "new_intervals": rows}  # fmt: skip
    run = jax.shard_map(lambda x: decode_attention(**x), mesh=mesh, in_specs=(specs,), out_specs=heads, check_vma=False)
    expected = np.concatenate([dense(**part) for part in parts])
    np.testing.assert_allclose(jax.jit(run)(whole), expected, atol=1e-5, rtol=0)


def test_memory_does_not_grow_with_the_allocated_cache():
    """In a scan over layers, which is where a slice of the cache would be a copy of it."""
    def temporaries(S):
        cache = KVCache(*[jax.ShapeDtypeStruct((4, 2, 2, S, 16), jnp.float32)] * 2)
        q, new = (jax.ShapeDtypeStruct((2, 4, h, 16), jnp.float32) for h in (4, 2))

        def layers(q, cache, k_new, v_new, cache_len):
            def layer(x, i):
                return decode_attention(x, cache, i, k_new, v_new, cache_len), None

            return jax.lax.scan(layer, q, jnp.arange(4))[0]

        program = jax.jit(layers).lower(q, cache, new, new, jax.ShapeDtypeStruct((2,), jnp.int32)).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporaries(16384) == temporaries(1024)


@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-30, 30))
def test_quantized_values_are_within_half_a_step(seed, exponent):
    x = (np.random.default_rng(seed).normal(size=(3, 2, 16)) * 2.0**exponent).astype(np.float32)
    x[0, 0] = 0
    values, scale = quantize_kv(jnp.asarray(x))
    assert values.dtype == jnp.int8 and scale.shape == (3, 2)
    error = np.abs(np.asarray(values, np.float64) * np.asarray(scale, np.float64)[..., None] - x)
    assert (error <= np.abs(x).max(-1, keepdims=True) / 254 * (1 + 1e-5)).all()


def test_bad_calls_are_refused():
    good = operands(Case(2, 4, 16, 4, 2, 8), [16, 7])
    paged = operands(Case(2, 4, 16, 4, 2, 8, page=4, store="int8"), [16, 7])
    kv = good["cache"]

    def refused(message, base=good, **changes):
        with pytest.raises(ValueError, match=message) as error:
            decode_attention(**{**base, **changes})
        assert "\n" not in str(error.value)

    refused("unknown implementation 'paged'; known: chunked, pallas_gpu, pallas_tpu, reference", implementation="paged")
    refused("'pallas_tpu' runs on a TPU, and this program is for cpu", implementation="pallas_tpu")
    refused("cache_len", cache_len=good["cache_len"][:1])
    refused("cache_len", cache_len=good["cache_len"].astype(jnp.float32))
    refused("K dividing H", k_new=good["k_new"][:, :2])
    refused("K dividing H", q=good["q"][:, :, :3])
    refused("are not one of bfloat16, float32", v_new=good["v_new"].astype(jnp.bfloat16))
    refused("new_intervals", new_intervals=good["new_intervals"][:, :2])
    refused(r"twice \[L,P,K,C,D\]", cache=KVCache(kv.k, kv.v[..., :4]))
    refused(r"not \[N,Q,H,D\], \[N,Q,K,D\], \[L,P,K,C,D\]", cache=KVCache(kv.k[0], kv.v[0]))
    refused("neither float32 like q nor int8", cache=KVCache(kv.k.astype(jnp.bfloat16), kv.v.astype(jnp.bfloat16)))
    refused("one page per slot, not 1 for 2 slots", cache=KVCache(kv.k[:, :1], kv.v[:, :1]))
    refused("a cache of int8 needs v_scale", paged, cache=paged["cache"]._replace(v_scale=None))
    refused("a cache of float32 has no k_scale", cache=kv._replace(k_scale=kv.k[..., 0]))
    refused("k_scale", paged, cache=paged["cache"]._replace(k_scale=paged["cache"].k_scale[:, :, :1]))
    refused("cache.pages", paged, cache=paged["cache"]._replace(pages=paged["cache"].pages[:1]))
