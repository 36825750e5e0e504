"""Losses against stored numbers and gradients of the published code, and against their own definitions."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tracerl_jax.rl.objectives import (
    cross_entropy,
    explained_variance,
    loss_weights,
    policy_loss,
    value_loss,
)

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS = ("sdar_tiny", "sdar_tied")


def _cases(file):
    for folder in FOLDERS:
        for case in json.loads(str(np.load(GOLDEN / folder / file)["meta"])):
            yield folder, case


def _relative(got, want, tolerance):
    """Losses of up to 1 are compared absolutely, larger ones relative to their size."""
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


# --- policy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("folder", "case"), list(_cases("loss_unit.npz")))
def test_golden_loss_arithmetic(folder, case):
    z = np.load(GOLDEN / folder / "loss_unit.npz")
    meta = json.loads(str(z["meta"]))[case]
    start, length = meta["L0"], meta["L1"]
    logits, labels, mask = jnp.asarray(z["logits"]), z["labels"], z["p_mask"]
    rows = len(logits)
    weights, denominator = loss_weights("reference", mask.sum(axis=1), length=length, rounds=rows)
    target_weight = jnp.asarray(mask * weights[:, None])
    advantages = z[f"{case}.adv"].reshape(rows, -1) * np.ones(labels.shape)  # [M] or [M,L]

    def total(logits):
        columns = jnp.concatenate([logits[:, :start], logits[:, start + length :]], axis=1)
        logp = jnp.take_along_axis(jax.nn.log_softmax(columns), labels[..., None], axis=-1)[..., 0]
        loss, metrics = policy_loss(
            logp,
            jnp.asarray(z["logp_old"]),
            jnp.asarray(advantages),
            target_weight,
            clip_low=meta["eps"],
            clip_high=meta["eps"],
            kl_coef=meta["beta"],
            kl_estimator="k3" if meta["k3"] else "k1",
        )
        return loss / denominator, metrics

    (loss, metrics), grad = jax.value_and_grad(total, has_aux=True)(logits)
    _relative(loss, z[f"{case}.loss"], 1e-5)
    _relative(metrics["policy_loss"][0] / denominator, z[f"{case}.policy_loss"], 1e-5)
    _relative(meta["beta"] * metrics["kl_loss"][0] / denominator, z[f"{case}.kl_loss"], 1e-5)
    want = z[f"{case}.grad_logits"]
    np.testing.assert_allclose(grad, want, atol=1e-6 * np.abs(want).max(), rtol=1e-5)


ROWS = {  # reward, noisy copy, 1 at the targets of the response
    "A0": (1.5, [99] * 10, "1000010000"),
    "A1": (1.5, [21, 99, 99, 99, 99, 26, 99, 99, 0, 0], "0110001000"),
    "A2": (1.5, [21, 22, 23, 99, 99, 26, 27, 99, 0, 0], "0001100100"),
    "B0": (-0.5, [99] * 10, "0101111101"),
    "B1": (-0.5, [99, 32, 99, 34, 35, 36, 37, 38, 99, 40], "1010000010"),
}
ROW_LOSSES = [-0.236676, -0.490416, -0.457483, 0.414498, 0.187914]


def _sine_rows():
    """Log-probs [5,10] of a fixed sine model at the noisy copy, targets [5,10] and rewards [5]."""
    clean = {"A": [21, 22, 23, 24, 25, 26, 27, 28, 0, 0], "B": list(range(31, 41))}
    response_positions = {"A": np.arange(3, 13), "B": np.arange(5, 15)}
    logp, targets, rewards = [], [], []
    for name, (reward, noisy, mask) in ROWS.items():
        position = response_positions[name[0]]
        angle = 0.37 * np.arange(128) + 0.11 * np.array(noisy)[:, None] + 0.05 * position[:, None]
        logits = jax.nn.log_softmax(jnp.asarray(2 * np.sin(angle), jnp.float32))
        logp.append(logits[np.arange(10), np.array(clean[name[0]])])
        targets.append([bit == "1" for bit in mask])
        rewards.append(reward)
    return jnp.stack(logp), np.array(targets), np.array(rewards)


def _sine_loss(logp, advantages, targets):
    weights, _ = loss_weights("reference", targets.sum(axis=1), length=10, rounds=len(targets))
    weights = jnp.asarray(targets * weights[:, None])
    return policy_loss(
        logp, jnp.full_like(logp, -4.8), jnp.asarray(advantages), weights, clip_low=0.2, clip_high=0.2, kl_coef=0.01
    )[0]


def test_worked_rows():
    logp, targets, rewards = _sine_rows()
    per_row = [
        _sine_loss(logp[i : i + 1], np.full((1, 10), rewards[i]), targets[i : i + 1]) for i in range(len(targets))
    ]
    np.testing.assert_allclose(per_row, ROW_LOSSES, atol=2e-6)
    batch = _sine_loss(logp, np.tile(rewards[:, None], 10), targets) / len(targets)
    np.testing.assert_allclose(batch, -0.116433, atol=2e-6)


def test_worked_rows_with_an_advantage_per_token():
    logp, targets, _ = _sine_rows()
    advantages = np.zeros(targets.shape)
    advantages[targets] = np.linspace(-1, 1, 18)
    np.testing.assert_allclose(_sine_loss(logp, advantages, targets) / len(targets), 0.106421, atol=2e-6)


def _random_targets(seed=0, shape=(3, 7)):
    rng = np.random.default_rng(seed)
    logp, old, reference, advantages = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(4))
    weights = jnp.asarray(rng.uniform(0.1, 1, shape) * (rng.uniform(size=shape) < 0.7), jnp.float32)
    return logp, old, reference, advantages, weights


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_is_taken_to_the_reference_when_there_is_one(estimator):
    logp, old, reference, advantages, weights = _random_targets()
    options = dict(clip_low=0.2, clip_high=0.3, kl_estimator=estimator)
    plain, _ = policy_loss(logp, old, advantages, weights, kl_coef=0.0, **options)
    total, metrics = policy_loss(logp, old, advantages, weights, kl_coef=0.5, reference_logp=reference, **options)
    d = np.asarray(logp - reference, np.float64)
    kl = {"k1": d, "k2": d**2 / 2, "k3": np.exp(-d) - 1 + d}[estimator]
    np.testing.assert_allclose(total - plain, 0.5 * np.sum(weights * kl), rtol=1e-5)
    np.testing.assert_allclose(metrics["kl_loss"][0], np.sum(weights * kl), rtol=1e-5)


def test_on_policy_gradient_is_reinforce():
    """At logp = old logp the clipped surrogate and k3 leave the gradient -weight * advantage."""
    logp, _, _, advantages, weights = _random_targets()

    def loss(x):
        return policy_loss(x, logp, advantages, weights, clip_low=0.2, clip_high=0.2, kl_coef=0.1)[0]

    np.testing.assert_allclose(jax.grad(loss)(logp), -weights * advantages, atol=1e-6)


def test_asymmetric_clipping_and_its_metrics():
    ratio = jnp.array([1.25, 1.35, 0.7, 0.7, 1.35, 1.0])
    advantages = jnp.array([1.0, 1.0, -1.0, 1.0, -1.0, 1.0])

    def loss(logp):
        zeros, ones = jnp.zeros(6), jnp.ones(6)
        return policy_loss(logp, zeros, advantages, ones, clip_low=0.2, clip_high=0.3, kl_coef=0.0)

    (total, metrics), grad = jax.value_and_grad(loss, has_aux=True)(jnp.log(ratio))
    np.testing.assert_allclose(total, -(1.25 + 1.3 - 0.8 + 0.7 - 1.35 + 1.0), rtol=1e-6)
    np.testing.assert_allclose(grad, [-1.25, 0, 0, -0.7, 1.35, -1.0], atol=1e-6)
    means = {name: float(s / n) for name, (s, n) in metrics.items()}
    assert means["clip_fraction_high"] == pytest.approx(1 / 6)
    assert means["clip_fraction_low"] == pytest.approx(1 / 6)
    assert means["clip_fraction"] == pytest.approx(2 / 6)
    assert means["ratio"] == pytest.approx(6.35 / 6)


def test_behaviour_weights_scale_the_surrogate_only():
    logp, old, _, advantages, weights = _random_targets()
    options = dict(clip_low=0.2, clip_high=0.2)
    behaviour = np.full(old.shape, 1.5)
    plain, plain_metrics = policy_loss(logp, old, advantages, weights, kl_coef=0.0, **options)
    total, _ = policy_loss(logp, old, advantages, weights, kl_coef=1.0, behaviour_weights=behaviour, **options)
    np.testing.assert_allclose(total, 1.5 * plain + plain_metrics["kl_loss"][0], rtol=1e-5)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
def test_padding_has_no_influence(garbage):
    logp, old, reference, advantages, weights = _random_targets()
    dead = np.asarray(weights) == 0
    assert dead.any()

    def loss(x, old, reference, advantages, behaviour):
        return policy_loss(
            x, old, advantages, weights, clip_low=0.2, clip_high=0.2, kl_coef=0.1, reference_logp=reference,
            behaviour_weights=behaviour,
        )  # fmt: skip

    arrays = (logp, old, reference, advantages, jnp.ones_like(logp))
    dirty = [jnp.where(dead, garbage, x) for x in arrays]
    (clean_loss, clean_metrics), clean_grad = jax.value_and_grad(loss, has_aux=True)(*arrays)
    (dirty_loss, dirty_metrics), dirty_grad = jax.value_and_grad(loss, has_aux=True)(*dirty)
    assert float(clean_loss) == float(dirty_loss)
    np.testing.assert_array_equal(dirty_grad, clean_grad)
    assert jax.tree.map(float, clean_metrics) == jax.tree.map(float, dirty_metrics)

    values = [jnp.where(dead, garbage, x) for x in (logp, old, reference)]
    assert float(value_loss(*values, weights, clip=0.2)[0]) == float(
        value_loss(logp, old, reference, weights, clip=0.2)[0]
    )
    grad = jax.grad(lambda v: value_loss(v, *values[1:], weights, clip=0.2)[0])(values[0])
    np.testing.assert_array_equal(grad[dead], 0)
    assert float(cross_entropy(values[0], weights)[0]) == float(cross_entropy(logp, weights)[0])


def test_sums_and_metrics_add_up_over_micro_batches():
    logp, old, reference, advantages, weights = _random_targets(shape=(5, 6))

    def loss(rows):
        arrays = [x[rows] for x in (logp, old, advantages, weights)]
        return policy_loss(*arrays, clip_low=0.2, clip_high=0.2, kl_coef=0.1, reference_logp=reference[rows])

    whole = loss(slice(None))
    parts = jax.tree.map(lambda a, b: a + b, loss(slice(0, 1)), loss(slice(1, 5)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, parts)


def test_low_precision_inputs_are_computed_in_float32():
    logp, old, _, advantages, weights = _random_targets()
    half = [x.astype(jnp.bfloat16) for x in (logp, old, advantages)]
    loss, metrics = policy_loss(*half, weights, clip_low=0.2, clip_high=0.2, kl_coef=0.1)
    full = [x.astype(jnp.float32) for x in half]
    assert loss.dtype == jnp.float32 and all(s.dtype == jnp.float32 for s, _ in metrics.values())
    assert float(loss) == float(policy_loss(*full, weights, clip_low=0.2, clip_high=0.2, kl_coef=0.1)[0])


def test_unknown_estimator():
    logp, old, _, advantages, weights = _random_targets()
    with pytest.raises(ValueError, match="k4"):
        policy_loss(logp, old, advantages, weights, clip_low=0.2, clip_high=0.2, kl_coef=0.1, kl_estimator="k4")


# --- value ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("folder", "case"), list(_cases("value.npz")))
def test_golden_value_loss_and_policy_loss_with_advantages_per_token(folder, case):
    z = np.load(GOLDEN / folder / "value.npz")
    meta = json.loads(str(z["meta"]))[case]
    mask = z[f"{case}.p_mask"]
    weights, denominator = loss_weights("reference", mask.sum(axis=1), length=meta["L1"], rounds=len(mask))
    weights = jnp.asarray(mask * weights[:, None])
    for k in range(4):
        arrays = [jnp.asarray(z[f"{case}.{name}"]) for name in ("new_values", "old_values", f"g{k}.returns")]
        loss, metrics = value_loss(*arrays, weights, clip=meta["eps"])
        np.testing.assert_allclose(loss / denominator, z[f"{case}.g{k}.value_loss"], atol=1e-6)
        np.testing.assert_allclose(metrics["value_loss"][0] / denominator, z[f"{case}.g{k}.value_loss"], atol=1e-6)
    if f"{case}.pol.loss" in z:
        arrays = [jnp.asarray(z[f"{case}.{name}"]) for name in ("pol.logp_new", "pol.logp_old", "g2.advantages")]
        options = dict(clip_low=meta["eps"], clip_high=meta["eps"], kl_coef=meta["policy_beta"])
        loss, metrics = policy_loss(*arrays, weights, **options)
        np.testing.assert_allclose(loss / denominator, z[f"{case}.pol.loss"], atol=1e-5)
        np.testing.assert_allclose(metrics["policy_loss"][0] / denominator, z[f"{case}.pol.policy_loss"], atol=1e-5)


def test_value_clipping_stops_the_gradient_beyond_the_range():
    old, returns = jnp.zeros(3), jnp.array([1.0, 1.0, -1.0])
    values = jnp.array([0.1, 0.5, 0.5])  # inside the range; past it towards the return; past it away from the return

    def loss(v):
        return value_loss(v, old, returns, jnp.ones(3), clip=0.2)

    (total, metrics), grad = jax.value_and_grad(loss, has_aux=True)(values)
    np.testing.assert_allclose(total, 0.5 * (0.9**2 + 0.8**2 + 1.5**2), rtol=1e-6)
    np.testing.assert_allclose(grad, [-0.9, 0.0, 1.5], atol=1e-6)
    assert float(metrics["value_clip_fraction"][0]) == 1.0


def test_explained_variance_of_accumulated_parts():
    rng = np.random.default_rng(1)
    returns = rng.normal(0.3, 1, 40)
    old_values = 0.8 * returns + rng.normal(0.1, 0.3, 40)
    live = rng.uniform(size=40) < 0.8

    def metrics(part):
        arrays = [jnp.asarray(x[part], jnp.float32) for x in (old_values, old_values, returns, live)]
        return value_loss(*arrays, clip=0.2)[1]

    sums = jax.tree.map(lambda a, b: a + b, metrics(slice(0, 7)), metrics(slice(7, 40)))
    got = explained_variance({name: float(s / n) for name, (s, n) in sums.items()})
    want = 1 - np.var((returns - old_values)[live]) / np.var(returns[live])
    assert got == pytest.approx(want, abs=1e-5)


def test_explained_variance_of_equal_returns_is_undefined():
    arrays = [jnp.asarray(x, jnp.float32) for x in ([0.1, 0.2], [0.1, 0.2], [0.7, 0.7], [1, 1])]
    metrics = value_loss(*arrays, clip=0.2)[1]
    assert np.isnan(explained_variance({name: float(s / n) for name, (s, n) in metrics.items()}))


# --- cross entropy and normalisers ----------------------------------------------------------------------------------


def test_cross_entropy():
    logp, weights = jnp.array([-1.0, -2.0, -3.0]), jnp.array([0.5, 2.0, 0.0])
    loss, metrics = cross_entropy(logp, weights)
    assert float(loss) == 4.5
    assert float(metrics["token_nll"][0] / metrics["token_nll"][1]) == 1.5
    assert float(metrics["cross_entropy"][0] / metrics["cross_entropy"][1]) == pytest.approx(4.5 / 2.5)


def test_normalisers():
    counts = np.array([4, 0, 2])
    losses = np.array([10.0, 0.0, 3.0])  # summed over the targets of each response

    def loss(*args, **options):
        weights, denominator = loss_weights(*args, **options)
        return (weights * losses).sum() / denominator

    assert loss("tokens", counts) == pytest.approx(13 / 6)
    assert loss("sequences", counts) == pytest.approx((10 / 4 + 3 / 2) / 2)
    assert loss("constant", counts, length=8) == pytest.approx(13 / 8 / 3)
    assert loss("reference", counts, length=8, rounds=5) == pytest.approx(13 / 8 / 5)


def test_nothing_to_train_on_does_not_divide_by_zero():
    assert loss_weights("tokens", np.array([0, 0]))[1] == 1.0
    assert loss_weights("sequences", np.array([], int))[1] == 1.0


def test_unknown_normaliser():
    with pytest.raises(ValueError, match="rows"):
        loss_weights("rows", np.array([1]))
