"""One optimizer update: exact accumulation, skipped updates, shardings of the optimizer state, restoring."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tracerl_jax.config import OptimizerConfig
from tracerl_jax.errors import ConfigError
from tracerl_jax.models import PRESETS, Model
from tracerl_jax.parallel.mesh import make_mesh
from tracerl_jax.parallel.sharding import batch_sharding
from tracerl_jax.training.checkpoint import abstract_like
from tracerl_jax.training.optimizer import HOST, check_offload, make_optimizer, make_schedule
from tracerl_jax.training.step import TrainState, Updater, abstract_state, init_state, sharded_abstract_params

OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=0.1, weight_decay=0.1, max_grad_norm=0.5), 10)


def params(width=6):
    keys = jax.random.split(jax.random.key(0), 2)
    return {"w": {"kernel": jax.random.normal(keys[0], (width, 4))}, "b": {"bias": jax.random.normal(keys[1], (4,))}}


def loss(p, batch):
    """A sum over rows and their count; `weight` 0 is padding."""
    error = jnp.tanh(batch["x"] @ p["w"]["kernel"] + p["b"]["bias"]) - batch["y"]
    total = jnp.sum(batch["weight"] * jnp.sum(error**2, axis=-1))
    return total, {"error": (total, jnp.sum(batch["weight"]))}


def rows(count, seed=1, width=6):
    draw = np.random.default_rng(seed)
    x, y = draw.normal(size=(count, width)), draw.normal(size=(count, 4))
    return {"x": np.float32(x), "y": np.float32(y), "weight": np.ones(count, np.float32)}


def cut(batch, sizes):
    """Micro-batches of unequal numbers of real rows, filled with padding to one size."""
    ends = np.cumsum(sizes)
    fill = {name: max(sizes) for name in batch}
    parts = [
        {name: value[end - size : end] for name, value in batch.items()} for size, end in zip(sizes, ends, strict=True)
    ]
    return [
        {
            name: np.concatenate([v, np.zeros((fill[name] - len(v), *v.shape[1:]), np.float32)])
            for name, v in part.items()
        }
        for part in parts
    ]


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_unequal_micro_batches_give_the_update_of_one_batch():
    batch = rows(11)
    updater = Updater(loss, OPTIMIZER)
    whole, whole_result = updater.update(init_state(params(), OPTIMIZER), [batch], 11.0)
    parts, result = updater.update(init_state(params(), OPTIMIZER), cut(batch, [7, 1, 3]), 11.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), parts, whole)
    assert float(result.loss) == pytest.approx(float(whole_result.loss), abs=1e-6)
    assert float(result.grad_norm) == pytest.approx(float(whole_result.grad_norm), abs=1e-6)
    assert [float(x) for x in result.metrics["error"]] == pytest.approx([11 * float(result.loss), 11], abs=1e-5)


def test_an_update_is_adamw_on_the_clipped_mean_gradient():
    batch = rows(5)
    state, result = Updater(loss, OPTIMIZER).update(init_state(params(), OPTIMIZER), [batch], 5.0)
    gradient = jax.grad(lambda p: loss(p, batch)[0] / 5)(params())
    norm = optax.tree.norm(gradient)
    assert float(result.grad_norm) == pytest.approx(float(norm), rel=1e-6) and norm > 0.5
    clipped = jax.tree.map(lambda g: g * 0.5 / norm, gradient)
    # The first step of AdamW is lr * sign of the gradient; only the matrix decays.
    expected = jax.tree.map(lambda p, g: p - 0.1 * g / (jnp.abs(g) + 1e-8), params(), clipped)
    expected["w"]["kernel"] -= 0.1 * 0.1 * params()["w"]["kernel"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.params, expected)
    assert int(state.updates) == 1


@pytest.mark.parametrize("poison", [np.nan, np.inf, 3e38], ids=["nan", "inf", "overflow"])
def test_a_loss_that_is_not_finite_changes_nothing(poison):
    updater = Updater(loss, OPTIMIZER)
    state, _ = updater.update(init_state(params(), OPTIMIZER), [rows(4)], 4.0)
    before = bits(state)
    bad = rows(4, seed=2)
    bad["y"][2, 1] = poison
    state, result = updater.update(state, [rows(4), bad, rows(4)], 12.0)
    assert bool(result.skipped) and bits(state) == before
    state, result = updater.update(state, [rows(4)], 4.0)
    assert not bool(result.skipped) and bits(state) != before and int(state.updates) == 2


def test_a_gradient_that_is_not_finite_changes_nothing():
    def root(p, batch):  # finite at 0, where its gradient is not
        return jnp.sum(jnp.sqrt(jnp.abs(p["w"]["kernel"] - p["w"]["kernel"]))) + jnp.sum(batch["x"]), {}

    state = init_state(params(), OPTIMIZER)
    before = bits(state)
    state, result = Updater(root, OPTIMIZER).update(state, [rows(2)], 2.0)
    assert np.isfinite(result.loss) and not np.isfinite(result.grad_norm)
    assert bool(result.skipped) and bits(state) == before


def test_extra_trees_get_no_gradient_and_are_not_donated():
    def with_trunk(p, batch, trunk):
        total, metrics = loss(p, batch)
        return total + jnp.sum(trunk["w"] * jnp.sum(p["b"]["bias"])), metrics

    trunk = {"w": jnp.ones(3)}
    _, result = Updater(with_trunk, OPTIMIZER).update(init_state(params(), OPTIMIZER), [rows(2)], 1.0, trunk)
    assert not bool(result.skipped)
    np.testing.assert_array_equal(trunk["w"], np.ones(3))


def test_an_update_without_batches_is_refused():
    with pytest.raises(ValueError, match="at least one micro-batch"):
        Updater(loss, OPTIMIZER).update(init_state(params(), OPTIMIZER), [], 1.0)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1)], ids=["2x2x2", "fsdp"])
def test_optimizer_state_is_sharded_like_the_parameters(sizes):
    mesh = make_mesh(*sizes)
    model = Model(PRESETS["sdar_tiny"], mesh=mesh)
    state = init_state(model.init(jax.random.key(0)), OPTIMIZER)
    shardings = {leaf.sharding.spec for leaf in jax.tree.leaves(state.params)}
    assert len(shardings) > 1  # something is split
    moments = state.opt_state[-1][0]
    for tree in (moments.mu, moments.nu):
        for moment, leaf in zip(jax.tree.leaves(tree), jax.tree.leaves(state.params), strict=True):
            assert moment.sharding == leaf.sharding
    assert moments.count.sharding.spec == state.updates.sharding.spec == PartitionSpec()
    abstract = abstract_state(sharded_abstract_params(model), OPTIMIZER)
    for a, leaf in zip(jax.tree.leaves(abstract), jax.tree.leaves(state), strict=True):
        assert (a.shape, a.dtype) == (leaf.shape, leaf.dtype)
        assert a.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)


def test_moments_in_the_hosts_memory_change_nothing(tmp_path):
    """Bit for bit, through updates, a skipped one, and a checkpoint."""
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.1, max_grad_norm=0.5, offload=True)
    optimizer, mesh = make_optimizer(config, 10), make_mesh(2, 2, 2)
    spread = jax.tree.map(lambda x: jax.device_put(x, batch_sharding(mesh) if x.shape == (8, 4) else
                                                   NamedSharding(mesh, PartitionSpec())), params(8))  # fmt: skip

    def train(optimizer, state, scales):
        for scale in scales:
            batch = {name: np.float32(scale) * value for name, value in rows(8, width=8).items()}
            state, _ = Updater(loss, optimizer, mesh).update(state, [batch, batch], 16.0)
        return state

    there = init_state(jax.tree.map(jnp.copy, spread), optimizer)
    there = train(optimizer, there, (1, np.inf))
    moments = there.opt_state[-1][0]
    for moment, leaf in zip(jax.tree.leaves((moments.mu, moments.nu)), 2 * jax.tree.leaves(there.params), strict=True):
        assert moment.sharding.memory_kind == HOST and moment.sharding.spec == leaf.sharding.spec
    assert moments.count.sharding.memory_kind != HOST and there.updates == 1
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", there._asdict())
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", abstract_state(abstract_like(spread), optimizer)._asdict())
    assert restored["opt_state"][-1][0].mu["w"]["kernel"].sharding.memory_kind == HOST
    there = train(optimizer, TrainState(**restored), (2, 3))
    here = train(OPTIMIZER, init_state(jax.tree.map(jnp.copy, spread), OPTIMIZER), (1, np.inf, 2, 3))
    assert bits(there) == bits(here)


def test_memory_that_devices_do_not_have_is_refused():
    device = SimpleNamespace(device_kind="TPU v1", addressable_memories=lambda: [SimpleNamespace(kind="device")])
    check_offload("rl.optimizer", OptimizerConfig(), [device])
    check_offload("rl.optimizer", OptimizerConfig(offload=True), jax.local_devices())
    with pytest.raises(ConfigError, match=r"rl.optimizer.offload is true, but the TPU v1 .* only the memory device"):
        check_offload("rl.optimizer", OptimizerConfig(offload=True), [device])


def test_weights_are_decayed_and_norms_and_biases_are_not():
    config = OptimizerConfig(learning_rate=1.0, weight_decay=0.5, max_grad_norm=0.0)
    optimizer = make_optimizer(config, 1)
    tree = {"a": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "n": {"scale": jnp.ones(2)}}
    steps, _ = optimizer.update(jax.tree.map(jnp.zeros_like, tree), optimizer.init(tree), tree)
    np.testing.assert_array_equal(steps["a"]["kernel"], -0.5 * np.ones((2, 2)))
    np.testing.assert_array_equal(steps["a"]["bias"], np.zeros(2))
    np.testing.assert_array_equal(steps["n"]["scale"], np.zeros(2))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 1, 0.8, 0.6, 0.4]),
        ("cosine", [0.25, 0.5, 0.75, 1, 1, 0.2 + 0.8 * (1 + np.cos(np.pi / 4)) / 2, 0.6, None]),
    ],
)
def test_schedules(schedule, expected):
    config = OptimizerConfig(learning_rate=1.0, schedule=schedule, warmup_updates=4, end_scale=0.2)
    rate = make_schedule(config, 8)
    for update, value in enumerate(expected):
        if value is not None:
            assert float(rate(update)) == pytest.approx(value), update
