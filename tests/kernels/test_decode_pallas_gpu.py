"""The GPU kernel of block decode attention: interpreted, against float64 maths, and compiled for H100 and A100.

The interpreter hands out memory full of NaN: an element of a result that no program writes shows.
"""

import itertools
import math
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_cases import Case, check, dense, lengths, operands, random_intervals
from gpu_compile import compile_for, lower_for
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tracerl_jax.kernels.decode import KVCache, decode_attention
from tracerl_jax.kernels.decode.pallas_gpu import Plan, default_plan, pallas_gpu_decode_attention, tiles_of_split

TILE = 16
SMALL = Plan(TILE, rows=16, splits=3, interpret=True)
CASES = {
    "three splits of up to three tiles": (SMALL, Case(2, 4, 136, 4, 2, 64)),
    "one split of more tiles than stages": (SMALL._replace(splits=1), Case(3, 4, 133, 4, 1, 64, store="int8")),
    "more splits than tiles, two pages a tile": (SMALL, Case(3, 8, 24, 3, 3, 80, page=8)),
    "several tiles of rows and of new tokens": (SMALL._replace(splits=2), Case(2, 20, 70, 3, 1, 96, page=14)),
    "two tiles a page": (SMALL._replace(rows=32), Case(2, 8, 128, 6, 2, 128, "bfloat16", page=32, store="int8")),
    "default plan": (None, Case(2, 4, 1024, 8, 2, 128, "bfloat16")),
}


@cache
def interpreted(name):
    plan, _ = CASES[name]

    def run(q, cache, *rest, **others):
        return pallas_gpu_decode_attention(
            q, cache, *rest, plan=plan or default_plan(q, cache)._replace(interpret=True), **others
        )

    return jax.jit(run)


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=5)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1), poison=st.sampled_from([np.nan, np.inf, -np.inf]))
def test_matches_float64_maths_whatever_lies_beyond_the_cache_length(name, data, seed, poison):
    plan, case = CASES[name]
    cache_len = data.draw(lengths(case, plan.tile if plan else 64))
    check(interpreted(name), case, cache_len, random_intervals(case, np.random.default_rng(seed)), seed, poison)


def test_queries_without_keys_give_zeros():
    _, case = CASES["three splits of up to three tiles"]
    intervals = np.zeros((2, 4, 2), np.int32)
    intervals[0], intervals[1, 2] = [3, 1], [1, 2]
    for name in list(CASES)[:2]:
        case = CASES[name][1]
        given = operands(case, [0] * case.N, np.resize(intervals, (case.N, 4, 2)))
        out = np.asarray(interpreted(name)(**given))
        np.testing.assert_array_equal(out[0], 0)
        np.testing.assert_array_equal(out[1, [0, 1, 3]], 0)
        assert out[1, 2].any()


@given(length=st.integers(0, 400), tile=st.sampled_from([16, 64]), splits=st.integers(1, 9))
def test_the_splits_of_a_slot_share_its_live_tiles_evenly(length, tile, splits):
    parts = [[int(x) for x in tiles_of_split(Plan(tile, 16, splits), length, s)] for s in range(splits)]
    visited = [list(range(first, last)) for first, last in parts]
    live = -(-length // tile)
    assert list(itertools.chain(*visited)) == list(range(live))
    assert max(map(len, visited)) == -(-live // splits)


def test_slots_are_split_until_the_chip_is_busy_and_no_further():
    def splits(N, S=16384, Q=4, H=32, K=8, D=128):
        q, k = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((N, Q, H, D), (2, N, K, S, D)))
        return default_plan(q, KVCache(k, k)).splits  # where nothing says otherwise: 132 multiprocessors

    assert [splits(n) for n in (1, 4, 16, 64, 256)] == [33, 8, 2, 1, 1]
    assert splits(4, Q=64) == 2  # four tiles of rows
    assert splits(1, S=4096) == 16 and splits(1, S=100) == 1


def test_a_slot_is_the_same_to_the_bit_beside_any_neighbours():
    _, case = CASES["three splits of up to three tiles"]
    run = interpreted("three splits of up to three tiles")
    own, other = operands(case, [77, 136], seed=1), operands(case, [16, 5], seed=2)
    mixed = {key: own[key] if key == "layer" else own[key].at[1].set(other[key][1]) for key in own if key != "cache"}
    kv = [x.at[:, 1].set(y[:, 1]) for x, y in zip(own["cache"][:2], other["cache"][:2], strict=True)]
    np.testing.assert_array_equal(run(**mixed, cache=KVCache(*kv))[0], run(**own)[0])


def test_large_scores_do_not_overflow():
    given = operands(CASES["three splits of up to three tiles"][1], [136, 3], scale=60.0)
    out = interpreted("three splits of up to three tiles")(**given)
    np.testing.assert_allclose(out, dense(**given), atol=60 * 1e-3, rtol=0)


def test_shard_map_over_rows_and_heads():
    case = Case(4, 4, 40, 4, 2, 64)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    heads, rows, stored = P("data", None, "tensor"), P("data"), P(None, "data", "tensor")
    specs = {"q": heads, "cache": KVCache(stored, stored), "layer": P(), "k_new": heads, "v_new": heads,
             "cache_len": rows, "new_intervals": rows}  # fmt: skip

    def run(**given):
        local = partial(pallas_gpu_decode_attention, plan=SMALL)
        return jax.shard_map(lambda x: local(**x), mesh=mesh, in_specs=(specs,), out_specs=heads,
                             check_vma=False)(given)  # fmt: skip

    check(jax.jit(run), case, [40, 0, 9, 17])


B16, F32, INT8 = jnp.bfloat16, jnp.float32, jnp.int8


def arguments(N, Q, S, H, K, D, dtype=B16, page=None, store=None, L=36):
    spec, C = jax.ShapeDtypeStruct, page or S
    kv = spec((L, N * S // C, K, C, D), store or dtype)
    scale = spec(kv.shape[:-1], F32) if store else None
    kv_cache = KVCache(kv, kv, scale, scale, spec((N, S // C), jnp.int32) if page else None)
    new = spec((N, Q, K, D), dtype)
    return spec((N, Q, H, D), dtype), kv_cache, spec((), jnp.int32), new, new, spec((N,), jnp.int32)


CALL = re.compile(r'custom_call_target="__gpu\$xla.gpu.triton".* name = "decode_attention"')


@pytest.mark.parametrize("topology", ["h100:1", "a100:1"])
@pytest.mark.parametrize("shape", [
    (64, 4, 4096, 32, 8, 128), (64, 8, 4096, 32, 8, 128), (64, 8, 4096, 32, 8, 128, B16, 128, INT8),
    (64, 4, 4096, 4, 1, 128, B16, 16),  # a share of 8 chips: few programs, so split
], ids=str)  # fmt: skip
def test_compiles_without_spills_and_copies_nothing_of_the_cache(topology, shape):
    args = arguments(*shape)
    compiled = compile_for(topology, decode_attention, *args)
    text = compiled.as_text()
    assert CALL.search(text)
    assert not re.search(rf"\[{','.join(map(str, args[1].k.shape))}\]\S* (?:copy|copy-start|fusion)\(", text)
    layer = math.prod(args[1].k.shape[1:]) * args[1].k.dtype.itemsize  # its keys
    assert compiled.memory_analysis().temp_size_in_bytes < layer / 16


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["h100:1", "a100:1"])
@pytest.mark.parametrize("D", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("L", [1, 36])  # 32 and 64 bits to count the elements of the cache
@pytest.mark.parametrize("dtype, page, store", [
    (B16, None, None), (B16, 16, INT8), (F32, None, None), (F32, 16, INT8),
])  # fmt: skip
def test_every_head_dim_compiles_without_spills(topology, D, L, dtype, page, store):
    if (D, dtype, store) == (256, F32, INT8):
        pytest.skip("no tile of it fits the registers")
    run = partial(decode_attention, implementation="pallas_gpu")
    for Q in (4, 32):
        compiled = compile_for(topology, run, *arguments(64, Q, 4096, 32, 8, D, dtype, page, store, L))
        assert CALL.search(compiled.as_text())


def test_gpu_programs_take_the_kernel_by_default_where_it_fits():
    def takes_kernel(*shape, **sizes):
        return "decode_attention" in re.findall(r'name = "(\w+)"', lowered_text(*shape, **sizes))

    def lowered_text(*shape, **sizes):
        return lower_for("h100:1", decode_attention, *arguments(*shape, **sizes)).as_text()

    assert takes_kernel(4, 4, 512, 8, 2, 128)
    assert not takes_kernel(4, 4, 512, 8, 2, 128, F32)
    assert not takes_kernel(4, 4, 512, 8, 2, 32)
    assert takes_kernel(32, 4, 2048, 8, 8, 128, B16, None, INT8, L=32)  # 2 GiB of int8
    assert not takes_kernel(32, 4, 2048, 8, 8, 128, B16, None, INT8, L=33)
    assert takes_kernel(32, 4, 2048, 8, 8, 128, B16, None, INT8, L=65)


def test_what_the_kernel_cannot_run_is_refused():
    interpreted = partial(pallas_gpu_decode_attention, plan=SMALL)

    def refused(message, *shape, run=interpreted, **sizes):
        args = arguments(*shape, **sizes)
        with pytest.raises(ValueError, match=message) as error:
            jax.eval_shape(run, *args, new_intervals=jax.ShapeDtypeStruct((*args[0].shape[:2], 2), jnp.int32))
        assert "\n" not in str(error.value)

    refused("'pallas_gpu' runs on an NVIDIA GPU, and this program is for cpu", 2, 4, 64, 2, 2, 64,
            run=partial(decode_attention, implementation="pallas_gpu"))  # fmt: skip
    refused(r"made for head_dim \(64, 80, 96, 128, 256\), not 72", 2, 4, 64, 2, 2, 72)
    refused(r"upper half of an int8 cache of 3.00 GiB", 32, 4, 2048, 8, 8, 128, B16, None, INT8, L=48)
