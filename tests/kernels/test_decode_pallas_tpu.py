"""The TPU kernel of block decode attention: interpreted, with race detection and poisoned memory, and compiled."""

import math
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_cases import Case, check, random_intervals
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding

from tracerl_jax.kernels.decode import KVCache, decode_attention
from tracerl_jax.kernels.decode.pallas_tpu import _schedule, pallas_tpu_decode_attention
from tracerl_jax.parallel.mesh import make_mesh
from tracerl_jax.plan.topology import compile_devices, missing_compiler

TILE = 16
CASES = {  # -> cores
    Case(2, 4, 40, 4, 2, 64): 2,
    Case(3, 8, 24, 3, 3, 80, page=8): 1,
    Case(3, 4, 33, 4, 1, 64, store="int8"): 1,
    Case(2, 8, 32, 4, 2, 128, "bfloat16", page=16, store="int8"): 2,
}
# Memory that nobody wrote reads as NaN: an element of the result that is left out shows, and so does a key.
INTERPRET = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2)


@cache
def interpreted(case):
    return jax.jit(partial(pallas_tpu_decode_attention, tile=TILE, cores=CASES[case], interpret=INTERPRET))


@pytest.mark.parametrize("case", CASES, ids=str)
@settings(max_examples=2)
@given(seed=st.integers(0, 2**32 - 1))
def test_matches_float64_maths_without_races(case, seed):
    rng = np.random.default_rng(seed)
    cache_len = rng.choice([0, 1, TILE - 1, TILE, TILE + 1, case.S - 1, case.S], case.N)
    check(interpreted(case), case, cache_len, random_intervals(case, rng), seed, rng.choice([np.nan, np.inf, 1e30]))
    assert not interpreter.races.races_found


@pytest.mark.parametrize("N, W, tiles, J, cores", [(7, 3, 1, 2, 2), (4, 1, 5, 1, 1), (5, 1, 3, 1, 3), (2, 5, 1, 8, 1)])
@settings(max_examples=30)
@given(data=st.data())
def test_the_schedule_visits_every_live_tile_once_and_copies_nothing_else(data, N, W, tiles, J, cores):
    tile = 4
    pages = np.random.default_rng(N).permutation(N * W).reshape(N, W)
    cache_len = np.array(data.draw(st.lists(st.integers(0, W * tiles * tile), min_size=N, max_size=N)), np.int32)
    schedule = jax.tree.map(np.asarray, scheduled(cache_len, pages, tile, tiles, J, cores))
    slot = schedule.slot.reshape(cores, -1)
    source = schedule.source.reshape(*slot.shape, J)
    ends = []
    for core in range(cores):
        held = np.full(J, -1)  # tiles that the pipeline holds: it copies one when its number changes
        step = 0
        for n in range(core, N, cores):
            count = -(-cache_len[n] // tile)
            assert schedule.first[n] == step
            for own in range(max(1, -(-count // J))):
                assert slot[core, step] == n
                for j in range(J):
                    number = own * J + j
                    if number < count:
                        held[j] = pages[n, number // tiles] * tiles + number % tiles
                    assert source[core, step, j] == held[j] or held[j] < 0
                step += 1
        ends.append(step)
        assert (slot[core, step:] == slot[core, step - 1]).all()
        assert (source[core, step:] == source[core, step - 1]).all()
    assert schedule.bound == max(ends) <= slot.shape[1]


scheduled = jax.jit(_schedule, static_argnums=(2, 3, 4, 5))


B16, INT8 = jnp.bfloat16, jnp.int8


def arguments(device, N, Q, S, H, K, D, dtype, page=None, store=None):
    def spec(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    C = page or S
    kv = spec((2, N * S // C, K, C, D), store or dtype)
    scale = spec(kv.shape[:-1], jnp.float32) if store else None
    kv_cache = KVCache(kv, kv, scale, scale, spec((N, S // C), jnp.int32) if page else None)
    new = spec((N, Q, K, D), dtype)
    return spec((N, Q, H, D), dtype), kv_cache, spec((), jnp.int32), new, new, spec((N,), jnp.int32)


@pytest.mark.parametrize("topology", ["v4:1x1x1", "v5e:1x1", "v5p:1x1x1", "v6e:1x1"])
def test_compiles_and_copies_nothing_of_the_cache(topology):
    if missing := missing_compiler("tpu"):
        pytest.skip(missing)
    mesh = make_mesh(devices=compile_devices(topology))
    for shape in [(64, 4, 4096, 32, 8, 128, B16), (64, 8, 4096, 8, 2, 128, B16, 128, INT8)]:
        args = arguments(mesh.devices.item(), *shape)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            compiled = jax.jit(decode_attention).trace(*args).lower(lowering_platforms=("tpu",)).compile()
        text, memory = compiled.as_text(), compiled.memory_analysis()
        assert 'custom_call_target="tpu_custom_call"' in text
        assert not re.search(rf"\[{','.join(map(str, args[1].k.shape))}\]\S* (?:copy|copy-start|fusion)\(", text)
        assert memory.temp_size_in_bytes < math.prod(args[1].k.shape) / 8


@pytest.mark.parametrize("topology, kernel", [("v4:1x1x1", False), ("v5e:1x1", True), ("v5p:1x1x1", True)])
def test_a_window_of_many_heads_takes_the_kernel_where_there_is_the_vector_memory(topology, kernel):
    """160 new tokens of 32 key/value heads (LLaDA-8B with the published horizon) hold more than 16 MiB."""
    if missing := missing_compiler("tpu"):
        pytest.skip(missing)
    mesh = make_mesh(devices=compile_devices(topology))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        args = arguments(mesh.devices.item(), 16, 160, 1024, 32, 32, 128, B16, 64)
        text = jax.jit(decode_attention).trace(*args).lower(lowering_platforms=("tpu",)).compile().as_text()
    assert ("tpu_custom_call" in text) == kernel


@pytest.mark.parametrize("shape", [
    (3, 4, 1000, 8, 2, 64, B16), (3, 4, 1000, 8, 2, 80, jnp.float32), (3, 8, 1000, 4, 2, 96, B16, None, INT8),
    (3, 4, 1000, 8, 8, 256, B16), (3, 8, 1024, 7, 1, 128, jnp.float32, 8), (64, 8, 4096, 4, 1, 128, B16, 16),
], ids=str)  # fmt: skip
def test_odd_shapes_compile(shape):
    if missing := missing_compiler("tpu"):
        pytest.skip(missing)
    mesh = make_mesh(devices=compile_devices("v5e:1x1"))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(decode_attention).trace(*arguments(mesh.devices.item(), *shape))
        assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).compile().as_text()


def test_what_the_kernel_cannot_run_is_refused():
    def refused(message, *shape):
        args = arguments(jax.devices()[0], *shape)
        with pytest.raises(ValueError, match=message) as error:
            jax.eval_shape(
                partial(pallas_tpu_decode_attention, interpret=True),
                *args,
                jax.ShapeDtypeStruct((*args[0].shape[:2], 2), jnp.int32),
            )
        assert "\n" not in str(error.value)

    refused(r"made for head_dim \(64, 80, 96, 128, 256\), not 32", 2, 4, 64, 2, 2, 32, B16)
    refused("pages of up to 256 tokens of 32 heads, not 512", 2, 4, 1024, 32, 32, 128, B16, 512)
    refused("would need .* use larger pages", 256, 4, 32768, 4, 1, 128, B16, 16)
