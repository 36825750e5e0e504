"""The real TPU and CUDA compilers on the head: neither [P, V] logits nor a second copy of the kernel in memory."""

import math
import re
from functools import cache

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from tracerl_jax.kernels.logprob import sample_tokens, token_logprobs
from tracerl_jax.plan.topology import compile_devices, missing_compiler, parse_topology

N, Q, E, V = 256, 4, 512, 151_936
P = N * Q


@cache
def spec(device, shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))


def gradients(device):
    def loss(hidden, kernel, targets):
        logprob, entropy = token_logprobs(hidden, kernel, targets)
        return jnp.sum(logprob) + jnp.sum(entropy)

    return jax.grad(loss, (0, 1)), (spec(device, (P, E)), spec(device, (E, V)), spec(device, (P,), jnp.int32))


def draws(device):
    def draw(hidden, kernel, words, banned, temperature):
        return sample_tokens(hidden, kernel, jax.random.wrap_key_data(words, impl="threefry2x32"), banned, temperature)

    return draw, (spec(device, (N, Q, E)), spec(device, (E, V)), spec(device, (N, 2), jnp.uint32),
                  spec(device, (V,), bool), spec(device, (N,), jnp.float32))  # fmt: skip


@pytest.mark.parametrize("program", [gradients, draws])
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:1x1", "h100:1"])
def test_the_compiled_program_stays_small(topology, program):
    platform = parse_topology(topology).chip.platform
    if missing := missing_compiler(platform):
        pytest.skip(missing)
    function, args = program(compile_devices(topology)[0])
    compiled = jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).compile()
    largest = max(math.prod(map(int, shape.split(","))) for shape in re.findall(r"\w\[([\d,]+)\]", compiled.as_text()))
    assert largest == E * V < P * V
    assert compiled.memory_analysis().temp_size_in_bytes < E * V * 2  # a copy of the kernel, let alone the logits
