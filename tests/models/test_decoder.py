"""The decoder against recorded forwards, and its run-time modes against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_utils import NAMES, load_golden, load_value_golden

from tracerl_jax.kernels.decode import KVCache
from tracerl_jax.models import PRESETS, Model

TINY = PRESETS["sdar_tiny"]


def intervals_of(mask):
    """The two-interval description [N,T,4] of a boolean mask [N,T,T]; fails when a row needs more than two."""
    intervals = np.zeros((*mask.shape[:2], 4), np.int32)
    for n, t in np.ndindex(mask.shape[:2]):
        edges = np.flatnonzero(np.diff(np.r_[0, mask[n, t].astype(int), 0]))
        assert len(edges) <= 4
        intervals[n, t, : len(edges)] = edges
    return intervals


def block_causal(length, block_size, rows=1):
    block = np.arange(length) // block_size
    return np.repeat((block[None, :, None] >= block[None, None, :]), rows, axis=0)


def batch(config, rows=2, length=12, seed=0):
    """Random ids, positions and block-causal intervals."""
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (rows, length)).astype(np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    return ids, positions, intervals_of(block_causal(length, config.block_size, rows))


def random_params(config, seed=0):
    """Parameters larger than the initial ones, norms near 1, so that every layer matters. Drawn without compiling."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = rng.normal(0, 0.08, leaf.shape).astype(np.float32)
        return 1 + values if "scale" in jax.tree_util.keystr(path) else values

    return jax.tree.map_with_path(draw, Model(config).abstract_params())


def forward(golden, ids, positions, mask):
    model = Model(golden.config)
    hidden = model.hidden(golden.params, ids.astype(np.int32), np.broadcast_to(positions, ids.shape).astype(np.int32),
                          intervals_of(np.broadcast_to(mask, (*ids.shape, ids.shape[1]))))
    return hidden, model.logits(golden.params, hidden)


# Recorded forwards


@pytest.mark.parametrize("name", NAMES)
def test_block_causal_forward_matches_the_recorded_one(name):
    golden = load_golden(name)
    case = golden.arrays("forward", "bc")
    hidden, logits = forward(golden, case["input_ids"], case["position_ids"], case["mask"])
    np.testing.assert_allclose(logits, case["logits"], atol=5e-4, rtol=0)
    np.testing.assert_allclose(hidden[1], case["hidden_row1"][-1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_left_padded_forward_matches_the_recorded_one(name):
    golden = load_golden(name)
    case = golden.arrays("forward", "lp")
    _, logits = forward(golden, case["input_ids"], case["position_ids"], case["mask"])
    np.testing.assert_allclose(logits, case["logits"], atol=5e-4, rtol=0)  # pads too: each sees itself


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", ["full", "key", "pos"])
def test_bidirectional_forward_matches_the_recorded_one(name, case):
    golden = load_golden(name)
    case = golden.arrays("forward", case)
    length = case["input_ids"].shape[1]
    mask = case["mask"][:, None].astype(bool) if "mask" in case else np.ones((1, 1, length), bool)
    _, logits = forward(golden, case["input_ids"], case.get("position_ids", np.arange(length)), mask)
    np.testing.assert_allclose(logits, case["logits"], atol=5e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_cached_forward_matches_the_recorded_one(name):
    golden = load_golden(name)
    case = golden.arrays("forward", "cache")
    model, prefix = Model(golden.config), int(case["prefix_len"])
    ids = case["input_ids"].astype(np.int32)
    positions = np.arange(ids.shape[1], dtype=np.int32)[None]
    _, kv = model.hidden_and_kv(golden.params, ids[:, :prefix], positions[:, :prefix],
                                intervals_of(block_causal(prefix, golden.config.block_size)))
    hidden, _ = model.decode(golden.params, ids[:, prefix:], positions[:, prefix:], KVCache.from_tokens(*kv),
                             np.array([prefix]))
    np.testing.assert_allclose(model.logits(golden.params, hidden), case["logits"], atol=5e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_values_are_the_head_applied_to_the_final_normed_state(name):
    golden = load_value_golden(name)
    case = golden.arrays("forward", "bc")
    model = Model(golden.config, head="value")
    assert jax.tree.structure(golden.params) == jax.tree.structure(model.abstract_params())
    hidden, _ = forward(load_golden(name), case["input_ids"], case["position_ids"], case["mask"])
    values = model.values(golden.params, hidden)
    assert values.shape == hidden.shape[:2] and values.dtype == jnp.float32
    expected = case["hidden_row1"][-1] @ golden.params["value_head"]["kernel"][:, 0]
    np.testing.assert_allclose(values[1], expected, atol=2e-4, rtol=0)


# Parameters


@pytest.mark.parametrize("name", NAMES)
def test_parameter_tree_has_the_checkpoint_s_names_and_shapes(name):
    golden = load_golden(name)
    shapes = jax.tree.map(lambda leaf: leaf.shape, Model(golden.config).abstract_params())
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, golden.params)


def test_initial_values():
    config = TINY.replace(qkv_bias=True, out_bias=True)
    params = Model(config, head="value").init(jax.random.key(0))
    kernels = params["layers"]["attention"]["q_proj"]["kernel"]
    assert abs(float(kernels.std()) - 0.02) < 1e-3
    assert not np.array_equal(kernels[0], kernels[1])
    assert abs(float(params["embed"]["embedding"].std()) - 0.02) < 1e-3
    for scale in (params["final_norm"], params["layers"]["attention_norm"], params["layers"]["attention"]["q_norm"]):
        assert (scale["scale"] == 1).all()
    assert (params["layers"]["attention"]["o_proj"]["bias"] == 0).all()
    assert (params["value_head"]["kernel"] == 0).all() and params["value_head"]["kernel"].shape == (config.width, 1)
    assert "lm_head" not in params


def test_param_dtype_and_compute_dtype_are_separate():
    config = TINY.replace(dtype="bfloat16")
    model = Model(config)
    params = random_params(config)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert {p.dtype for p in jax.tree.leaves(Model(TINY.replace(param_dtype="bfloat16")).abstract_params())} == {
        jnp.dtype("bfloat16")}
    hidden = model.hidden(params, *batch(config))
    assert hidden.dtype == jnp.bfloat16 and model.logits(params, hidden).dtype == jnp.float32
    exact = Model(TINY).hidden(params, *batch(config))
    error = jnp.abs(hidden.astype(jnp.float32) - exact)
    assert 0 < float(jnp.sqrt(jnp.mean(error**2))) < 0.02  # states are normed to 1; bf16 keeps 8 bits


# Run-time modes


def loss_and_grad(model, params, inputs):
    def loss(params):
        return jnp.mean(jnp.sin(model.logits(params, model.hidden(params, *inputs))))

    return jax.jit(jax.value_and_grad(loss))(params)


def assert_trees_close(actual, expected, atol):
    for (path, a), (_, b) in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves_with_path(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=atol * max(1e-3, float(np.abs(b).max())), rtol=0, err_msg=str(path))


MOE = {"num_experts": 4, "experts_per_token": 2, "expert_width": 24}


@pytest.fixture(scope="module")
def scanned():
    """Parameters, loss and gradients of the scanned model that recomputes nothing, by configuration."""
    results = {}
    for config in (TINY, TINY.replace(**MOE)):
        params = random_params(config)
        results[config] = params, loss_and_grad(Model(config), params, batch(config))
    return results


@pytest.mark.parametrize("mode, extra", [
    ({"scan_layers": False}, {}), ({"scan_layers": False}, MOE), ({"remat": "full"}, MOE), ({"remat": "dots"}, {}),
    ({"remat": "full", "scan_layers": False}, {})], ids=str)
def test_scan_and_remat_change_nothing(mode, extra, scanned):
    config = TINY.replace(**extra)
    params, expected = scanned[config]
    actual = loss_and_grad(Model(config.replace(**mode)), params, batch(config))
    assert_trees_close(actual, expected, atol=1e-5)


def test_remat_saves_activations():
    config = TINY.replace(num_layers=8)
    params, inputs = Model(config).abstract_params(), batch(config, length=64)
    peak = {}
    for remat in ("none", "dots", "full"):
        model = Model(config.replace(remat=remat))
        loss = jax.jit(jax.grad(lambda p, m=model: jnp.mean(m.hidden(p, *inputs) ** 2)))
        peak[remat] = loss.lower(params).compile().memory_analysis().temp_size_in_bytes
    assert peak["full"] < peak["dots"] < peak["none"]


@pytest.mark.parametrize("flags", [
    {}, MOE, {"qkv_bias": True, "out_bias": True, "qk_norm": False, "tie_embeddings": True}, {"scan_layers": False},
    {"num_heads": 2}], ids=str)
def test_decode_with_a_cache_equals_the_full_forward(flags):
    """Rows hold different numbers of committed tokens; what lies beyond them in the cache is garbage."""
    config = TINY.replace(**flags)
    model, params = Model(config), random_params(config)
    ids, positions, intervals = batch(config, rows=2, length=12)
    full, kv = model.hidden_and_kv(params, ids, positions, intervals)
    np.testing.assert_array_equal(full, model.hidden(params, ids, positions, intervals))

    starts, rows = np.array([4, 8]), np.arange(2)[:, None]
    block = starts[:, None] + np.arange(4)
    beyond = (np.arange(12)[None] >= starts[:, None])[None, :, :, None, None]
    cache = KVCache.from_tokens(*(jnp.where(beyond, 1e3, leaf) for leaf in kv))
    hidden, new = model.decode(params, ids[rows, block], positions[rows, block], cache, starts.astype(np.int32))
    np.testing.assert_allclose(hidden, full[rows, block], atol=2e-5, rtol=0)
    for leaf, expected in zip(new, kv, strict=True):
        np.testing.assert_allclose(leaf, expected[:, rows, block], atol=2e-5, rtol=0)


def test_attention_implementations_agree_through_the_model():
    params, inputs = random_params(TINY), batch(TINY, length=24)
    dense, chunked = (loss_and_grad(Model(TINY.replace(attention=name)), params, inputs)
                      for name in ("reference", "chunked"))
    assert_trees_close(chunked, dense, atol=1e-5)


def test_rope_dtype_compute_rounds_tables_and_rotation():
    config = TINY.replace(dtype="bfloat16")
    params, (ids, positions, intervals) = random_params(config), batch(config)
    precise, rounded = (Model(config.replace(rope_dtype=dtype)).hidden(params, ids, positions + 1000, intervals)
                        for dtype in ("float32", "compute"))
    assert not np.array_equal(precise, rounded)
    assert float(jnp.abs(precise.astype(jnp.float32) - rounded.astype(jnp.float32)).mean()) < 0.02


def test_only_relative_positions_matter():
    params, (ids, positions, intervals) = random_params(TINY), batch(TINY)
    model = Model(TINY)
    np.testing.assert_allclose(model.hidden(params, ids, positions + 500, intervals),
                               model.hidden(params, ids, positions, intervals), atol=1e-4, rtol=0)


def test_model_is_a_static_argument():
    forward = jax.jit(lambda model, params, *inputs: model.hidden(params, *inputs), static_argnums=0)
    params, inputs = random_params(TINY), batch(TINY)
    forward(Model(TINY), params, *inputs)
    forward(Model(TINY.replace()), params, *inputs)
    assert forward._cache_size() == 1
