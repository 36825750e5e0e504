"""The compiled decoding loop on meshes: the cache is updated in place, and the platform's kernel reads it."""

import math
import re

import jax
import numpy as np
import pytest

from tracerl_jax.models import Model, ModelConfig
from tracerl_jax.parallel.mesh import make_mesh
from tracerl_jax.plan.topology import compile_devices, missing_compiler, parse_topology
from tracerl_jax.rollout.engine import Engine, EngineConfig, Request, SamplingOptions
from tracerl_jax.rollout.weights import abstract_rollout_params

ROWS, LENGTH, PAGE = 256, 16384, 128
CONFIG = ModelConfig(vocab_size=256, width=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=128, mlp_width=64,
                     mask_token_id=255, eos_token_id=1, pad_token_id=1, stop_token_ids=(1,), block_size=4,
                     dtype="bfloat16")  # fmt: skip


def compiled_decode(mesh, platform, dtype, attention="block_causal", **cache):
    """(the program that decodes ROWS rows of up to LENGTH tokens, shape of a chip's part of the keys)."""
    model = Model(CONFIG.replace(dtype=dtype, attention_mode=attention), mesh=mesh)
    prompt, options = np.array([2, 3, 4, 5]), SamplingOptions(max_tokens=LENGTH - 4, temperature=1.0)
    requests = [Request(prompt, options, sample_index=i) for i in range(ROWS)]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        config = EngineConfig(ROWS, page_size=PAGE, **cache)
        traced = Engine(model, abstract_rollout_params(model), config).traced(requests)["decode"]
        compiled = traced.lower(lowering_platforms=(platform,)).compile()
    rows, tensor = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["tensor"]
    shared = attention != "full"  # prompts have pages of their own, whose tokens depend on no response
    pages = (ROWS // rows + shared) * LENGTH // PAGE + 1
    return compiled, (CONFIG.num_layers, pages, CONFIG.num_kv_heads // tensor, PAGE, CONFIG.head_dim)


@pytest.mark.parametrize(("topology", "sizes", "full"), [
    ("v5p:2x2x1", (1, 2, 2), {}), ("h100:8", (2, 2, 2), {}), ("cpu", (2, 2, 2), {}),
    *(pytest.param(topology, sizes, {"attention": "full", "cache": "dual", "horizon": 64}, marks=pytest.mark.slow)
      for topology, sizes in (("v5p:2x2x1", (1, 2, 2)), ("h100:8", (2, 2, 2)))),
])  # fmt: skip
def test_the_loop_updates_the_cache_in_place(topology, sizes, full):
    """Also where full forwards, which write it, and window forwards, which do not, take turns."""
    if topology == "cpu":
        platform, devices, dtype = "cpu", jax.devices()[: math.prod(sizes)], "float32"
    else:
        platform, dtype = parse_topology(topology).chip.platform, "bfloat16"
        if missing := missing_compiler(platform):
            pytest.skip(missing)
        devices = compile_devices(topology)
    compiled, shape = compiled_decode(make_mesh(*sizes, devices=devices), platform, dtype, **full)
    part = math.prod(shape) * (4 if dtype == "float32" else 2)
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < part / (4 if full else 8)  # a full forward holds a canvas' keys and values
    assert memory.alias_size_in_bytes >= 2 * part
    text = compiled.as_text()
    dims = ",".join(map(str, shape))
    assert re.search(rf"\[{dims}\].* (?:fusion|dynamic-update-slice)\(", text)
    assert not re.search(rf"\w\[{dims}\]\S* (?:copy|transpose)\(", text)
    kernel = {
        "tpu": r'decode_attention\S* = .*custom_call_target="tpu_custom_call"',
        "cuda": r'custom_call_target="__gpu\$xla\.gpu\.triton".* name = "decode_attention"',
    }
    assert platform == "cpu" or re.search(kernel[platform], text)
