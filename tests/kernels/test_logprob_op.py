"""Target log-probabilities and entropies against float64 maths: values, gradients, windows, memory, sharding."""

import re
from functools import cache, partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tracerl_jax.kernels.logprob import token_logprobs
from tracerl_jax.kernels.logprob.api import LOGPROB_IMPLEMENTATIONS as IMPLEMENTATIONS
from tracerl_jax.kernels.logprob.chunked import chunked_token_logprobs
from tracerl_jax.kernels.logprob.columns import NARROWEST, TILE, WIDEST, WINDOW_ELEMENTS, fold, window_width


def dense(hidden, kernel, targets, temperature, d_logprob, d_entropy):
    """Plain maths in float64 -> (logprob, entropy, d_hidden, d_kernel)."""
    hidden, kernel, d_logprob, d_entropy = (np.asarray(x, np.float64) for x in (hidden, kernel, d_logprob, d_entropy))
    temperature = np.broadcast_to(np.asarray(temperature, np.float64), targets.shape)[:, None]
    logits = hidden @ kernel / temperature
    logp = logits - logits.max(-1, keepdims=True)
    logp = logp - np.log(np.exp(logp).sum(-1, keepdims=True))
    p, rows = np.exp(logp), np.arange(len(targets))
    entropy = -(p * logp).sum(-1)
    d_logits = -p * d_logprob[:, None] - p * (logp + entropy[:, None]) * d_entropy[:, None]
    d_logits[rows, targets] += d_logprob
    d_logits /= temperature
    return logp[rows, targets], entropy, d_logits @ kernel.T, hidden.T @ d_logits


def draw_arrays(P, E, V, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    hidden, kernel = rng.normal(size=(P, E)).astype(dtype), rng.normal(size=(E, V), scale=2 * E**-0.5).astype(dtype)
    return hidden, kernel, rng.integers(0, V, P).astype(np.int32), *rng.normal(size=(2, P)).astype(np.float32)


@cache
def value_and_gradients(run):
    """jitted (hidden, kernel, targets, temperature, d_logprob, d_entropy) -> (logprob, entropy, d_hidden, d_kernel)."""

    @jax.jit
    def compute(hidden, kernel, targets, temperature, *cotangents):
        out, pull = jax.vjp(lambda h, k: run(h, k, targets, temperature=temperature), hidden, kernel)
        return *out, *pull(cotangents)

    return compute


def logit_rounding(hidden, kernel, temperature):
    """What a float32 dot product may lose on the largest logit; probabilities inherit it as a relative error."""
    magnitudes = (np.abs(hidden) @ np.abs(kernel)).max(-1) / temperature
    return 4 * np.finfo(np.float32).eps * magnitudes.max()


def check(run, arrays, temperature, atol=5e-6):
    hidden, kernel, targets, *cotangents = arrays
    actual = value_and_gradients(run)(hidden, kernel, targets, jnp.float32(temperature), *cotangents)
    expected = dense(hidden, kernel, targets, temperature, *cotangents)
    for name, a, e in zip(("logprob", "entropy", "d_hidden", "d_kernel"), actual, expected, strict=True):
        a, bound = np.asarray(a, np.float64), atol * max(1, np.abs(e).max())
        np.testing.assert_allclose(a, e, atol=bound, rtol=0, err_msg=name)
    return actual


@cache
def in_windows_of(width, mesh=None):
    def run(hidden, kernel, targets, temperature):
        temperature = jnp.broadcast_to(temperature, targets.shape)
        return chunked_token_logprobs(hidden, kernel, targets, temperature, width=width, mesh=mesh)

    return run


@cache
def named(implementation):
    return partial(token_logprobs, implementation=implementation)


# The vocabulary: one token, prime, a power of two, one that no window divides.
@pytest.mark.parametrize(("P", "E", "V", "width"), [(3, 4, 1, 5), (5, 8, 97, 10), (16, 8, 256, 64), (7, 12, 1000, 96)])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), temperature=st.floats(0.3, 3.0))
def test_values_and_gradients_match_dense_maths(P, E, V, width, seed, temperature):
    arrays = draw_arrays(P, E, V, seed)
    per_token = temperature * np.random.default_rng(seed).uniform(0.5, 2, size=P)
    for run in (named("reference"), named("chunked"), in_windows_of(width)):
        for T in (temperature, per_token):
            check(run, arrays, T, atol=max(5e-6, logit_rounding(*arrays[:2], T)))


@pytest.mark.parametrize(("V", "width"), [(1, 1), (7, 3), (96, 32), (1000, 999), (1000, 1000)])
def test_every_column_belongs_to_one_window(V, width):
    windows = fold(lambda seen, start, width: seen.at[start + jnp.arange(width)].add(1), jnp.zeros(V, int), V, width)
    np.testing.assert_array_equal(windows, 1)


def test_windows_are_tiles_and_hold_few_logits():
    for P, V in product((1, 32, 2048, 1 << 20), (40, 32_000, 151_936)):
        width = window_width(P, V)
        assert width == V or (width % TILE == 0 and width <= WIDEST)
        assert P * width <= max(WINDOW_ELEMENTS, P * NARROWEST)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_confident_and_large_logits_stay_finite(name):
    hidden, kernel, targets, *cotangents = draw_arrays(6, 8, 300)
    check(named(name), (hidden * 100, kernel * 5, targets, *cotangents), 1.0, atol=2e-5)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_bfloat16_inputs_give_float32_values_and_bfloat16_gradients(name):
    arrays = draw_arrays(16, 32, 500, dtype=jnp.bfloat16)
    # Logits are exact products summed in fp32, so the values stay sharp; the gradients pass through bf16.
    logprob, entropy, d_hidden, d_kernel = check(named(name), arrays, 0.9, atol=2**-7)
    assert [x.dtype for x in (logprob, entropy, d_hidden, d_kernel)] == [jnp.float32] * 2 + [jnp.bfloat16] * 2
    expected = dense(*arrays[:3], 0.9, *arrays[3:])
    np.testing.assert_allclose(logprob, expected[0], atol=1e-5)
    np.testing.assert_allclose(entropy, expected[1], atol=1e-5)


@pytest.mark.parametrize("differentiate", [False, True])
def test_memory_holds_neither_the_logits_nor_a_copy_of_the_kernel(differentiate):
    P, E, V = 1024, 256, 400_000

    def loss(hidden, kernel, targets):
        logprob, entropy = token_logprobs(hidden, kernel, targets)
        return jnp.sum(logprob) + jnp.sum(entropy)

    args = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in
            (((P, E), jnp.float32), ((E, V), jnp.float32), ((P,), jnp.int32))]
    compiled = jax.jit(jax.grad(loss, (0, 1)) if differentiate else loss).lower(*args).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < V * E * 4 / 2  # the logits take P * V * 4


def test_a_tied_head_gets_the_gradient_of_its_embedding():
    hidden, kernel, targets, *cotangents = draw_arrays(6, 8, 90)

    def tied(hidden, embedding, targets, temperature):
        return token_logprobs(hidden, embedding.T, targets, temperature=temperature)

    *_, d_embedding = value_and_gradients(tied)(hidden, kernel.T, targets, 1.0, *cotangents)
    expected = dense(hidden, kernel, targets, 1.0, *cotangents)[3]
    np.testing.assert_allclose(d_embedding, expected.T, atol=1e-5, rtol=0)


def mesh_of(data, fsdp, tensor):
    return jax.make_mesh((data, fsdp, tensor), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_rows_sharded_over_data_and_fsdp_and_vocabulary_over_tensor(name):
    mesh = mesh_of(2, 2, 2)
    hidden, kernel, targets, *cotangents = draw_arrays(16, 8, 400)
    rows, table = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((("data", "fsdp"),), ("fsdp", "tensor")))
    place = jax.device_put
    arrays = (place(hidden, rows), place(kernel, table), *(place(x, rows) for x in (targets, *cotangents)))
    check(partial(token_logprobs, implementation=name, mesh=mesh), arrays, 0.8)
    check(in_windows_of(48, mesh), arrays, np.linspace(0.5, 2, 16))


def sharded_compilation(data, fsdp, tensor, P, E, V, width):
    """Forward and backward, compiled for shapes of these sizes over a mesh."""
    mesh = mesh_of(data, fsdp, tensor)

    def spec(shape, *axes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    rows = spec((P,), ("data", "fsdp"))
    args = (spec((P, E), ("data", "fsdp")), spec((E, V), "fsdp", "tensor"), spec((P,), ("data", "fsdp"), dtype=int),
            jax.ShapeDtypeStruct((), jnp.float32), rows, rows)  # fmt: skip
    return value_and_gradients(in_windows_of(width, mesh)).lower(*args).compile()


def test_a_sharded_vocabulary_is_not_gathered_and_hidden_gradients_are_summed_once():
    P, E, V = 16, 8, 4096
    text = sharded_compilation(2, 1, 4, P, E, V, 256).as_text()
    assert "all-gather" not in text
    # Devices that share the vocabulary meet after the loops: for 4 statistics of the softmax and for d_hidden. Inside
    # the loop the data axis sums the gradient of each window of the kernel.
    sums = [(shape, "while/body" in where) for shape, where in reduced_arrays(text)]
    assert sorted(sums) == sorted([("8", False)] * 4 + [("8,8", False)] + [("8,256", True)])


def reduced_arrays(text):
    """(shape, name) of every array that an all-reduce of the compiled text yields."""
    for shapes, where in re.findall(r"= (.*?) all-reduce(?:-start)?\(.*?op_name=\"(.*?)\"", text):
        for shape in re.findall(r"f32\[([\d,]*)\]", shapes):
            yield shape, where


def test_a_kernel_split_by_width_is_gathered_window_by_window():
    P, E, V, width = 16, 8, 4096, 256
    text = sharded_compilation(1, 4, 2, P, E, V, width).as_text()
    gathered = set(re.findall(r"f32\[([\d,]*)\]\S* all-gather", text))
    assert gathered == {f"{E},{width}"}


def test_bad_calls_are_refused():
    hidden, kernel, targets, *_ = draw_arrays(4, 8, 20)
    with pytest.raises(ValueError, match="unknown implementation 'fused'; known: chunked, reference"):
        token_logprobs(hidden, kernel, targets, implementation="fused")
    with pytest.raises(ValueError, match=r"\[P,E\], \[E,V\], \[P\]"):
        token_logprobs(hidden, kernel.T, targets)
    with pytest.raises(ValueError, match="temperature"):
        token_logprobs(hidden, kernel, targets, temperature=jnp.ones(3))
    with pytest.raises(ValueError, match="kernel is int8; use float32"):
        token_logprobs(hidden, kernel.astype(np.int8), targets)
    with pytest.raises(ValueError, match="targets are float32, not integers"):
        token_logprobs(hidden, kernel, targets.astype(np.float32))
    with pytest.raises(ValueError, match="V = 20 cannot be split evenly over 8 devices"):
        token_logprobs(hidden, kernel, targets, mesh=mesh_of(1, 1, 8))
