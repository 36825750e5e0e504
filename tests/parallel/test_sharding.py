"""Sharding rules, and a model on every mesh of eight devices against the same model on one."""

import contextlib
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tracerl_jax.errors import ConfigError
from tracerl_jax.kernels.decode import KVCache
from tracerl_jax.models import PRESETS, Model, ModelConfig
from tracerl_jax.parallel import sharding
from tracerl_jax.parallel.mesh import make_mesh
from tracerl_jax.parallel.sharding import batch_sharding, cache_sharding, mesh_spec, param_shardings

CONFIG = ModelConfig(vocab_size=64, width=32, num_layers=2, num_heads=16, num_kv_heads=8, head_dim=4, mlp_width=48,
                     mask_token_id=63, qkv_bias=True, out_bias=True)
MOE = CONFIG.replace(num_experts=4, experts_per_token=2, expert_width=16)
FACTORISATIONS = [f for f in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(f) == 8]


# Rules


def test_parameters_follow_the_table():
    mesh = make_mesh(2, 2, 2)
    specs = jax.tree.map(lambda s: s.spec, param_shardings(Model(MOE), mesh))
    layers = specs["layers"]
    assert specs["embed"]["embedding"] == P("tensor", "fsdp")
    assert specs["lm_head"]["kernel"] == P("fsdp", "tensor")
    assert layers["attention"]["k_proj"]["kernel"] == P(None, "fsdp", "tensor")
    assert layers["attention"]["k_proj"]["bias"] == P(None, "tensor")
    assert layers["attention"]["o_proj"]["kernel"] == P(None, "tensor", "fsdp")
    assert layers["attention"]["q_norm"]["scale"] == P(None, None)
    assert layers["moe"]["down_proj"] == P(None, None, "tensor", "fsdp")
    assert layers["moe"]["router"]["kernel"] == P(None, "fsdp", None)
    assert batch_sharding(mesh).spec == P(("data", "fsdp"))
    assert cache_sharding(mesh).spec == P(None, ("data", "fsdp"), "tensor")


def test_every_parameter_has_one_logical_name_per_dimension():
    for model in (Model(CONFIG), Model(MOE), Model(CONFIG, head="value"), Model(CONFIG.replace(tie_embeddings=True))):
        axes = model.logical_axes()
        assert jax.tree.structure(axes) == jax.tree.structure(model.abstract_params())
        for leaf, names in zip(jax.tree.leaves(model.abstract_params()), jax.tree.leaves(axes), strict=True):
            assert len(names) == leaf.ndim and None not in names


def test_unknown_and_colliding_axes_are_refused(monkeypatch):
    mesh = make_mesh(2, 2, 2)
    with pytest.raises(ConfigError, match=r"q_proj: no sharding rule .* 'hedas'.*heads"):
        mesh_spec(("embed", "hedas"), mesh, "q_proj")
    with pytest.raises(ConfigError, match=r"'heads' and 'mlp' both go to the mesh axis 'tensor'"):
        mesh_spec(("heads", "mlp"), mesh, "strange")
    monkeypatch.setitem(sharding.RULES, "heads", ("fsdp",))
    with pytest.raises(ConfigError, match=r"layers/attention/o_proj/kernel.*'heads' and 'embed'.*'fsdp'"):
        Model(CONFIG, mesh=mesh)


def test_a_mesh_without_our_axes_is_refused():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with pytest.raises(ConfigError, match=r"mesh axis 'tensor'.*make_mesh"):
        Model(CONFIG, mesh=mesh)


@pytest.mark.parametrize("changes, sizes, words", [
    ({"num_kv_heads": 4}, (1, 1, 8), ["model.num_kv_heads: 4 (kv_heads)", "8 devices", "tensor"]),
    # 6 heads of 4 channels: 24 channels would divide, the heads do not
    ({"num_heads": 6, "num_kv_heads": 6}, (2, 1, 4), ["model.num_heads: 6 (heads)", "4 devices"]),
    ({"width": 36}, (1, 8, 1), ["embed/embedding: 36 (embed)", "8 devices", "fsdp"]),
    ({"mlp_width": 50}, (2, 1, 4), ["layers/mlp/down_proj/kernel: 50 (mlp)", "4 devices", "tensor"]),
    ({"vocab_size": 66}, (2, 1, 4), ["embed/embedding: 66 (vocab)", "4 devices"]),
])
def test_what_cannot_be_split_is_refused_when_the_model_is_described(changes, sizes, words):
    with pytest.raises(ConfigError) as error:
        Model(CONFIG.replace(**changes), mesh=make_mesh(*sizes))
    for word in words:
        assert word in str(error.value)


def test_rows_that_cannot_be_split_are_refused():
    model = Model(CONFIG, mesh=make_mesh(4, 2, 1))
    with pytest.raises(ConfigError, match=r"rows of the batch: 6 .* 8 devices .*data x fsdp"):
        model.hidden(model.abstract_params(), *batch(rows=6))


# One device = many devices


def batch(rows=8, length=12):
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (rows, length)).astype(np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    ends = (positions // CONFIG.block_size + 1) * CONFIG.block_size
    starts = np.arange(rows, dtype=np.int32)[:, None] % 3 + 0 * positions  # rows hide different numbers of keys
    return ids, positions, np.stack([starts, ends, 0 * ends, 0 * ends], -1)


def value_and_grad(model, params, inputs):
    def loss(params):
        hidden = model.hidden(params, *inputs)
        return jnp.mean(jnp.sin(model.logits(params, hidden))), hidden

    (_, hidden), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return hidden, grads


@pytest.fixture(scope="module")
def expected():
    """Parameters, states and gradients on one device, by configuration."""
    results, rng = {}, np.random.default_rng(0)
    for config in (CONFIG, MOE):
        params = jax.tree.map(lambda p: rng.normal(0, 0.1, p.shape).astype(np.float32), Model(config).abstract_params())
        results[config] = params, *value_and_grad(Model(config), params, batch())
    return results


def assert_same_on(mesh, config, expected):
    params, hidden, grads = expected[config]
    model = Model(config, mesh=mesh)
    shardings = param_shardings(model, mesh)
    inputs = jax.device_put(batch(), batch_sharding(mesh))
    actual_hidden, actual_grads = value_and_grad(model, jax.device_put(params, shardings), inputs)
    assert actual_hidden.sharding.is_equivalent_to(batch_sharding(mesh), 3)
    np.testing.assert_allclose(actual_hidden, hidden, atol=1e-5, rtol=0)
    for (path, actual), leaf in zip(jax.tree.leaves_with_path(actual_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(actual, leaf, atol=1e-5 * float(jnp.abs(leaf).max()), rtol=0, err_msg=str(path))


@pytest.mark.parametrize("sizes", FACTORISATIONS, ids=str)
def test_every_factorisation_of_eight_devices_gives_the_same_states_and_gradients(sizes, expected):
    assert_same_on(make_mesh(*sizes), CONFIG, expected)


@pytest.mark.parametrize("sizes", [
    (2, 2, 2), pytest.param((1, 8, 1), marks=pytest.mark.slow), pytest.param((1, 1, 8), marks=pytest.mark.slow),
], ids=str)  # fmt: skip
def test_experts_are_split_without_changing_states_or_gradients(sizes, expected):
    assert_same_on(make_mesh(*sizes), MOE, expected)


@pytest.mark.parametrize("sizes", [(1, 2, 2, 2), pytest.param((2, 1, 1, 4), marks=pytest.mark.slow)], ids=str)
def test_experts_of_their_own_change_no_state_or_gradient(sizes, expected):
    """data, fsdp, tensor and expert: each device has the kernels of some experts only."""
    mesh = make_mesh(*sizes)
    specs = jax.tree.map(lambda s: s.spec, param_shardings(Model(MOE), mesh))
    assert specs["layers"]["moe"]["down_proj"] == P(None, "expert", "tensor", "fsdp")
    assert specs["layers"]["moe"]["router"]["kernel"] == P(None, ("fsdp", "expert"), None)
    assert specs["lm_head"]["kernel"] == P(("fsdp", "expert"), "tensor")
    assert batch_sharding(mesh).spec == P(("data", "fsdp", "expert"))
    assert_same_on(mesh, MOE, expected)


def test_a_dense_model_takes_the_expert_axis_for_more_fsdp(expected):
    assert_same_on(make_mesh(1, 2, 2, 2), CONFIG, expected)


@pytest.mark.parametrize("ambient", [False, True], ids=["plain", "set_mesh"])
def test_init_on_a_mesh_gives_the_same_parameters_in_their_places(ambient):
    mesh = make_mesh(2, 2, 2)
    model = Model(MOE, mesh=mesh)
    with jax.set_mesh(mesh) if ambient else contextlib.nullcontext():
        params = model.init(jax.random.key(0))
    jax.tree.map(lambda p, s: np.testing.assert_(p.sharding.is_equivalent_to(s, p.ndim)), params,
                 param_shardings(model, mesh))
    jax.tree.map(np.testing.assert_array_equal, params, Model(MOE).init(jax.random.key(0)))


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 1, 8)], ids=str)
def test_prefill_and_decode_on_a_mesh(sizes, expected):
    mesh, (params, *_) = make_mesh(*sizes), expected[CONFIG]
    ids, positions, intervals = batch()
    intervals[..., 0] = 0
    starts, rows = np.where(np.arange(8) % 2, 4, 8).astype(np.int32), np.arange(8)[:, None]
    block = starts[:, None] + np.arange(4)

    def run(model, params):
        hidden, kv = model.hidden_and_kv(params, ids, positions, intervals)
        cache = KVCache.from_tokens(*kv)
        return hidden, kv, model.decode(params, ids[rows, block], positions[rows, block], cache, starts)

    model = Model(CONFIG, mesh=mesh)
    alone = run(Model(CONFIG), params)
    spread = jax.jit(lambda p: run(model, p))(jax.device_put(params, param_shardings(model, mesh)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=0), spread, alone)
    rows_and_heads = NamedSharding(mesh, P(None, ("data", "fsdp"), None, "tensor"))  # what the cache is split by
    assert spread[1].k.sharding.is_equivalent_to(rows_and_heads, 5)


def test_an_ambient_mesh_changes_nothing(expected):
    mesh, (params, hidden, _) = make_mesh(2, 2, 2), expected[CONFIG]
    model = Model(CONFIG, mesh=mesh)
    with jax.set_mesh(mesh):
        ambient = jax.jit(model.hidden)(jax.device_put(params, param_shardings(model, mesh)), *batch())
    np.testing.assert_allclose(ambient, hidden, atol=1e-5, rtol=0)


def test_no_device_holds_foreign_rows_or_the_whole_vocabulary():
    """In the compiled gradient only weights are gathered: no row of the batch leaves its device except as ids, and
    neither the embedding table nor its gradient is whole in the vocabulary. At real sizes: they steer the compiler
    (the sizes of the 4B model, nothing is allocated)."""
    config, rows, length = PRESETS["sdar_4b"].replace(num_layers=2, remat="full"), 8, 4096
    mesh = make_mesh(2, 2, 2)
    model = Model(config, mesh=mesh)
    params = jax.tree.map(lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s), model.abstract_params(),
                          param_shardings(model, mesh))
    inputs = [jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh))
              for shape in ((rows, length), (rows, length), (rows, length, 4))]
    gradient = jax.jit(jax.grad(lambda params, *inputs: jnp.mean(jnp.sin(model.hidden(params, *inputs)))))
    compiled = gradient.lower(params, *inputs).compile().as_text()
    gathered = re.findall(r"= f32\[([\d,]*)\]\S* all-gather", compiled)
    assert gathered, "the weights split over fsdp must be gathered somewhere"
    assert not [shape for shape in gathered if str(length) in shape.split(",")]
    assert not re.findall(rf"f32\[{config.vocab_size},\d+\]", compiled)
