"""The engine's copy of the weights: cast and gathered once, without a change to any output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_utils import load_golden

from tracerl_jax.errors import ConfigError
from tracerl_jax.models import Model
from tracerl_jax.parallel.mesh import make_mesh
from tracerl_jax.parallel.sharding import param_shardings
from tracerl_jax.rollout.weights import conversion, needs_copy, rollout_model, rollout_params, weight_bytes

MOE = {"num_experts": 4, "experts_per_token": 2, "expert_width": 16}


def logits(model, params):
    ids = np.arange(8, dtype=np.int32)[None] * 3
    intervals = np.broadcast_to(np.array([0, 8, 0, 0], np.int32), (1, 8, 4))
    hidden = model.hidden(params, ids, np.arange(8, dtype=np.int32)[None], intervals)
    return model.logits(params, hidden), model.hidden(params, ids, ids % 8, intervals)


@pytest.mark.parametrize("change", [{}, MOE], ids=["dense", "mixture of experts"])
def test_cast_once_or_at_every_use_gives_the_same_bits(change):
    model = Model(load_golden("sdar_tiny").config.replace(dtype="bfloat16", **change))
    params = model.init(jax.random.key(0))
    copy = rollout_params(model, params)
    kinds = {str(path[-1].key): leaf.dtype for path, leaf in jax.tree.leaves_with_path(copy)}
    assert kinds["scale"] == jnp.float32 and kinds["embedding"] == jnp.bfloat16
    for one, two in zip(logits(model, params), logits(model, copy), strict=True):
        np.testing.assert_array_equal(one, two)


def test_each_copy_is_whole_but_for_the_tensor_axis():
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    golden = load_golden("sdar_tiny")
    model = Model(golden.config, mesh=mesh)
    params = jax.device_put(golden.params, param_shardings(model, mesh))
    decoder = rollout_model(model)
    assert dict(decoder.mesh.shape) == {"data": 4, "fsdp": 1, "tensor": 2}
    copy = rollout_params(decoder, params)
    kernel = copy["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (*kernel.shape[:2], kernel.shape[2] // 2)
    jax.tree.map(np.testing.assert_array_equal, copy, golden.params)
    assert not needs_copy(decoder, copy)
    assert rollout_params(decoder, copy) is copy
    assert dict(rollout_model(model, 1).mesh.shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    with_experts = Model(golden.config, mesh=make_mesh(1, 2, 2, expert=2))
    assert rollout_model(with_experts).mesh == decoder.mesh


def test_no_device_holds_a_whole_mixture_while_its_layout_changes():
    """From experts over fsdp x expert to their widths over tensor, a way that the compiler takes by a whole copy."""
    config = load_golden("sdar_tiny").config.replace(
        num_layers=32, num_experts=8, experts_per_token=2, expert_width=256, num_kv_heads=4, num_heads=4
    )
    model = Model(config, mesh=make_mesh(1, 2, 1, expert=4))
    params = jax.jit(model.init, out_shardings=param_shardings(model, model.mesh))(jax.random.key(0))
    decoder = rollout_model(model, 4)
    copy = rollout_params(decoder, params)
    assert not needs_copy(decoder, copy)
    jax.tree.map(np.testing.assert_array_equal, copy, params)
    kernel = params["layers"]["moe"]["up_proj"]
    used = conversion(decoder).lower(params).compile().memory_analysis()
    assert used.output_size_in_bytes < weight_bytes(decoder) / 8 + 4096
    assert used.temp_size_in_bytes < kernel.nbytes / 2


def test_nothing_is_copied_where_nothing_differs():
    golden = load_golden("sdar_tiny")
    assert rollout_params(rollout_model(Model(golden.config)), golden.params) is golden.params


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("devices", [1, 8])
def test_an_own_copy_outlives_the_weights_it_was_made_of(dtype, devices):
    """As when updates donate them: also what has the right dtype and place already is copied."""
    golden = load_golden("sdar_tiny")
    mesh = make_mesh(data=devices, devices=jax.devices()[:devices])
    model = Model(golden.config.replace(dtype=dtype), mesh=mesh)
    params = jax.device_put(jax.tree.map(np.array, golden.params), param_shardings(model, mesh))
    want = jax.tree.map(np.asarray, rollout_params(model, params))
    copy = rollout_params(model, params, own=True)
    for leaf in jax.tree.leaves(params):
        leaf.delete()
    jax.tree.map(np.testing.assert_array_equal, copy, want)
    assert not needs_copy(model, copy)


def test_devices_that_cannot_be_shared_are_refused():
    model = Model(load_golden("sdar_tiny").config, mesh=make_mesh(data=2, fsdp=2, tensor=2))
    with pytest.raises(ConfigError, match=r"rollout.tensor is 3, which does not divide the 8 devices"):
        rollout_model(model, 3)
    with pytest.raises(ConfigError, match="num_heads: 4"):
        rollout_model(model, 8)
