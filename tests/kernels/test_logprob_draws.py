"""Fused draws against the dense path: the same ids for any window and mesh, float64 probabilities, memory, errors."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tracerl_jax.kernels.logprob import sample_tokens
from tracerl_jax.kernels.logprob.api import SAMPLE_IMPLEMENTATIONS
from tracerl_jax.kernels.logprob.draws import chunked_sample_tokens, gumbel_at

N, Q, E, V = 4, 3, 8, 240
TEMPERATURE = np.array([0.0, 0.5, 1.0, 1.7], np.float32)


def draw_arrays(seed, V=V):
    """(hidden, kernel, keys, banned, temperature); small integers, so that every order of summation is exact."""
    rng = np.random.default_rng(seed)
    hidden = rng.integers(-3, 4, (N, Q, E)).astype(np.float32)
    kernel = rng.integers(-2, 3, (E, V)).astype(np.float32) / 4
    keys = jax.vmap(partial(jax.random.key, impl="threefry2x32"))(rng.integers(0, 2**31, N))
    return hidden, kernel, keys, rng.random(V) < 0.3, TEMPERATURE


def in_windows_of(width, mesh=None):
    return partial(chunked_sample_tokens, width=width, mesh=mesh)


run = jax.jit(lambda how, *args, use_entropy=True: how(*args, use_entropy=use_entropy),
              static_argnums=0, static_argnames="use_entropy")  # fmt: skip
WINDOWED = [in_windows_of(width) for width in (V, 64, 7)]
reference = SAMPLE_IMPLEMENTATIONS["reference"]


def probabilities(hidden, kernel, banned, temperature, ids):
    """float64 (log-prob over everything, over what is allowed, entropy of the latter) of ids [N, Q]."""
    logits = hidden.astype(np.float64) @ kernel / np.where(temperature == 0, 1, temperature)[:, None, None]
    found = []
    for x in (logits, np.where(banned, -np.inf, logits)):
        logp = x - np.logaddexp.reduce(x, axis=-1, keepdims=True)
        found.append(np.take_along_axis(logp, ids[..., None], -1)[..., 0])
    p = np.exp(logp)
    return *found, -np.sum(p * np.where(p > 0, logp, 0), axis=-1)


@given(seed=st.integers(0, 2**32 - 1), sampling=st.booleans())
def test_windows_draw_what_the_dense_path_draws(seed, sampling):
    hidden, kernel, keys, banned, temperature = draw_arrays(seed)
    keys = keys if sampling else None
    want = run(reference, hidden, kernel, keys, banned, temperature)
    expected = probabilities(hidden, kernel, banned, temperature, np.asarray(want.ids))
    for how in (reference, *WINDOWED):
        got = run(how, hidden, kernel, keys, banned, temperature)
        np.testing.assert_array_equal(got.ids, want.ids)
        for name, value, exact in zip(got._fields[1:], got[1:], expected, strict=True):
            np.testing.assert_allclose(value, exact, atol=1e-5, rtol=0, err_msg=name)


def test_the_noise_is_that_of_jax_random():
    key = jax.random.key(5, impl="threefry2x32")
    counter = jnp.arange(7 * 1001, dtype=jnp.uint32)[::-1]  # any order
    noise = gumbel_at(jax.random.key_data(key), counter)[::-1].reshape(7, 1001)
    np.testing.assert_array_equal(noise, jax.random.gumbel(key, (7, 1001), jnp.float32))


def test_greedy_ties_go_to_the_lowest_id_across_windows_and_devices():
    kernel = np.zeros((E, V), np.float32)
    hidden = np.ones((N, Q, E), np.float32)
    kernel[:, [70, 150, 239]] = 1
    banned = np.arange(V) < 5
    for how in (reference, *WINDOWED, in_windows_of(7, mesh_of(1, 1, 8))):
        np.testing.assert_array_equal(run(how, hidden, kernel, None, banned, np.zeros(N, np.float32)).ids, 70)
        np.testing.assert_array_equal(run(how, hidden, 0 * kernel, None, banned, np.zeros(N, np.float32)).ids, 5)


def test_banned_ids_may_fill_windows_and_dwarf_the_others():
    hidden, kernel, keys, _, temperature = draw_arrays(0)
    banned = np.arange(V) != 100
    kernel[:, 20] = 4000 * np.sign(hidden[1, 1])  # far above every allowed logit
    for how in (reference, *WINDOWED):
        got = run(how, hidden, kernel, keys, banned, temperature)
        np.testing.assert_array_equal(got.ids, 100)
        np.testing.assert_array_equal(got.allowed_logprobs, 0)
        np.testing.assert_array_equal(got.entropy, 0)
        assert np.isfinite(got.logprobs).all() and got.logprobs[1, 1] < -1000


def test_bfloat16_hidden_with_a_float32_kernel_is_a_bfloat16_product():
    hidden, kernel, keys, banned, temperature = draw_arrays(3)
    kernel += np.float32(2**-12)  # lost in bfloat16 beside 1
    got = run(WINDOWED[1], hidden.astype(jnp.bfloat16), kernel, keys, banned, temperature)
    rounded = np.asarray(jnp.asarray(kernel, jnp.bfloat16), np.float32)
    expected = probabilities(hidden, rounded, banned, temperature, np.asarray(got.ids))
    np.testing.assert_allclose(got.logprobs, expected[0], atol=1e-5)


IN_GROUPS = [partial(chunked_sample_tokens, width=64, group=group) for group in (1, 5, None)]


@given(seed=st.integers(0, 2**32 - 1), share=st.sampled_from([0.0, 0.2, 0.6, 1.0]), how=st.sampled_from(IN_GROUPS))
def test_positions_that_are_wanted_get_the_same_whatever_the_others_do(seed, share, how):
    args, wanted = draw_arrays(seed), np.random.default_rng(seed).random((N, Q)) < share
    want = run(reference, *args)
    got = run(how, *args, wanted)
    np.testing.assert_array_equal(got.ids[wanted], want.ids[wanted])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[wanted], b[wanted], atol=1e-5), got[1:], want[1:])


@pytest.mark.parametrize("axes", [(2, 2, 2), (1, 1, 8)])
def test_wanted_positions_on_a_mesh(axes):
    """Devices that gather their columns together go through the head equally often, whoever wants most."""
    args, wanted = draw_arrays(4), np.array([[1, 1, 1], [0, 0, 0], [0, 1, 0], [1, 0, 1]], bool)
    got = run(partial(chunked_sample_tokens, width=32, group=1, mesh=mesh_of(*axes)), *args, wanted)
    np.testing.assert_array_equal(got.ids[wanted], run(reference, *args).ids[wanted])


def test_no_product_is_taken_for_nobody():
    hidden, *args = draw_arrays(1)
    got = run(IN_GROUPS[0], np.full_like(hidden, np.nan), *args, np.zeros((N, Q), bool))
    assert not np.any(got.ids) and not np.any(got.logprobs)


def test_entropy_is_left_out_unless_asked_for():
    args = draw_arrays(1)
    for how in (reference, *WINDOWED):
        got, want = run(how, *args, use_entropy=False), run(how, *args)
        np.testing.assert_array_equal(got.entropy, 0)
        jax.tree.map(np.testing.assert_array_equal, got[:3], want[:3])


def mesh_of(data, fsdp, tensor):
    return jax.make_mesh((data, fsdp, tensor), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize("axes", [(2, 2, 2), (1, 1, 8), (4, 1, 2)])
def test_a_mesh_draws_the_same(axes):
    args = draw_arrays(2)
    want = run(reference, *args)
    for how in (in_windows_of(32, mesh_of(*axes)), partial(sample_tokens, mesh=mesh_of(*axes))):
        got = run(how, *args)
        np.testing.assert_array_equal(got.ids, want.ids)
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), got[1:], want[1:])


def test_a_sharded_vocabulary_is_not_gathered():
    mesh, V = mesh_of(2, 1, 4), 4096

    def spec(shape, *axes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0, impl="threefry2x32"), N))
    args = (spec((N, Q, E), "data"), spec((E, V), None, "tensor"), keys, spec((V,), dtype=bool), spec((N,), "data"))
    text = run.lower(in_windows_of(256, mesh), *args).compile().as_text()
    collectives = re.findall(r"= (.*?) (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", text)
    assert collectives and {kind for _, kind in collectives} == {"all-reduce"}
    sizes = [dims for shapes, _ in collectives for dims in re.findall(r"\[([\d,]*)\]", shapes)]
    assert set(sizes) == {f"{N // 2 * Q}"}


def test_bad_calls_are_refused():
    hidden, kernel, keys, banned, temperature = draw_arrays(0)
    with pytest.raises(ValueError, match="unknown implementation 'fused'; known: chunked, reference"):
        sample_tokens(hidden, kernel, keys, banned, temperature, implementation="fused")
    with pytest.raises(ValueError, match=r"\[N,Q,E\], \[E,V\]"):
        sample_tokens(hidden[0], kernel, keys, banned, temperature)
    with pytest.raises(ValueError, match="hidden is int32; use float32"):
        sample_tokens(hidden.astype(np.int32), kernel, keys, banned, temperature)
    with pytest.raises(ValueError, match=r"banned is bool \(5,\), not bool \(240,\)"):
        sample_tokens(hidden, kernel, keys, banned[:5], temperature)
    with pytest.raises(ValueError, match=r"temperature \(3,\) is not \(4,\)"):
        sample_tokens(hidden, kernel, keys, banned, temperature[:3])
    with pytest.raises(ValueError, match="not threefry2x32 keys"):
        sample_tokens(hidden, kernel, jax.random.split(jax.random.key(0, impl="rbg"), N), banned, temperature)
    with pytest.raises(ValueError, match="rows = 4 cannot be split evenly over 8 devices"):
        sample_tokens(hidden, kernel, keys, banned, temperature, mesh=mesh_of(8, 1, 1))
