"""Log-probs, values, losses and gradients of the golden cases, through the reference's rows and through packed rows."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_utils import NAMES, load_golden, load_value_golden
from replay_utils import case_names, check_gradients, fill_up, load_case

from tracerl_jax.diffusion.packing import pack
from tracerl_jax.diffusion.replay import shrunk_steps
from tracerl_jax.models import Model
from tracerl_jax.rl.advantages import trace_gae
from tracerl_jax.rl.logprobs import packed_logprobs, packed_values
from tracerl_jax.rl.objectives import cross_entropy, loss_weights, policy_loss, value_loss

LAYOUTS = ("rounds", "packed")
VALUE_NAMES = ["sdar_tiny", pytest.param("sdar_tied", marks=pytest.mark.slow)]  # a value head is never tied
# v06 has L1 = 9: there the reference cuts the last block, while a packed group is always a whole block.
VALUE_CASES = [(c, layout) for c in case_names("value") for layout in LAYOUTS if (c, layout) != ("v06", "packed")]
ROUNDS_SHAPE, PACKED_SHAPE = (16, 48, 24), (1, 512, 64)  # N, T, P of every case: each program compiles once


@lru_cache
def load(name: str, file: str, case: str, layout: str):
    """(case, rows of one shape, golden row of every target, column of every target in the golden [M,L] arrays)"""
    case = load_case(load_golden(name).arrays, file, case)
    if layout == "rounds":
        rows = fill_up(case.rows, ROUNDS_SHAPE)
    else:
        N, T, P = PACKED_SHAPE
        rows = pack(case.items(), row_length=T, targets_multiple=P)
        assert (*rows.ids.shape, rows.target_ids.shape[1]) == PACKED_SHAPE
        assert sum(item.rounds for item in case.items()) == len(case.rows.ids)
    return case, rows, case.golden_row(rows), case.meta["L0"] + rows.target_pos


@lru_cache
def models(name: str):
    golden, value = load_golden(name), load_value_golden(name)
    return golden, Model(golden.config), value, Model(value.config, head="value")


def weights_and_denominator(case, rows):
    """normaliser="reference": each target counts 1 / (L1 * rows)."""
    counts = np.bincount(rows.target_item[rows.target_item >= 0], minlength=len(case.prompts))
    weights, denominator = loss_weights("reference", counts, length=case.meta["L1"], rounds=len(case.rows.ids))
    return rows.target_weight * rows.gather(weights), denominator


@partial(jax.jit, static_argnames="model")
def forward_and_gradient(model, params, rows, cotangent):
    """(log-probs or values [N,P], parameter gradient of sum(cotangent * them)): one program for every loss."""

    def forward(params):
        return packed_values(model, params, rows) if model.head == "value" else packed_logprobs(model, params, rows)[0]

    outputs, pull_back = jax.vjp(forward, params)
    return outputs, *pull_back(cotangent)


def forward(model, params, rows):
    return forward_and_gradient(model, params, rows, jnp.zeros(rows.target_ids.shape))[0]


def loss_and_gradient(loss, model, params, rows):
    """`loss` maps log-probs or values [N,P] to (sum, metrics); the chain rule does the rest."""
    (total, metrics), cotangent = jax.value_and_grad(loss, has_aux=True)(forward(model, params, rows))
    return total, metrics, forward_and_gradient(model, params, rows, cotangent)[1]


def row_sums(rows, golden_row, per_target, count):
    live = rows.target_item >= 0
    return np.bincount(golden_row[live], np.asarray(per_target)[live], minlength=count)


def per_target_policy(logp, old, advantages, clip):
    ratio = np.exp(np.clip(logp - old, -10, 10))
    return np.minimum(ratio * advantages, np.clip(ratio, 1 - clip, 1 + clip) * advantages)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", case_names("tracerl"))
@pytest.mark.parametrize("name", NAMES)
def test_policy(name, case, layout):
    golden, model, *_ = models(name)
    case, rows, row, column = load(name, "tracerl", case, layout)
    data, meta, live = case.data, case.meta, rows.target_item >= 0

    old = forward(model, golden.params, rows)
    new = forward(model, golden.params_new, rows)
    np.testing.assert_allclose(old[live], data["logp_old"][row, column][live], atol=2e-4)
    np.testing.assert_allclose(new[live], data["logp_new"][row, column][live], atol=2e-4)
    if "rollout_logp" in data:
        np.testing.assert_allclose(old[live], data["rollout_logp"][row, column][live], atol=2e-4)

    weights, denominator = weights_and_denominator(case, rows)
    advantages = data["adv"][row]
    loss, metrics, grads = loss_and_gradient(
        partial(
            policy_loss, old_logp=old, advantages=advantages, weights=weights / denominator, clip_low=meta["eps"],
            clip_high=meta["eps"], kl_coef=meta["beta"], kl_estimator="k3" if meta["use_kl_estimator_k3"] else "k1",
        ),
        model, golden.params_new, rows,
    )  # fmt: skip
    np.testing.assert_allclose(loss, data["loss"], atol=1e-4)
    np.testing.assert_allclose(metrics["policy_loss"][0], data["policy_loss"], atol=1e-4)
    np.testing.assert_allclose(meta["beta"] * metrics["kl_loss"][0], data["kl_loss"], atol=1e-4)
    surrogate = per_target_policy(np.asarray(new), np.asarray(old), advantages, meta["eps"])
    row_policy = row_sums(rows, row, -weights * surrogate, meta["rows"])
    np.testing.assert_allclose(row_policy, data["row_policy"], atol=1e-4)
    stored = check_gradients(grads, model.config.family, data, "", golden.arrays("tracerl")["param_names"])
    assert stored >= 3


@pytest.mark.parametrize(("case", "layout"), VALUE_CASES)
@pytest.mark.parametrize("name", VALUE_NAMES)
def test_value(name, case, layout):
    golden, policy, heads, model = models(name)
    case, rows, row, column = load(name, "value", case, layout)
    data, meta, live = case.data, case.meta, rows.target_item >= 0
    names = golden.arrays("value")["param_names"]

    old = forward(model, heads.params, rows)
    np.testing.assert_allclose(old[live], data["old_values"][row, column][live], atol=2e-4)
    new = forward(model, heads.params_new, rows)
    np.testing.assert_allclose(new[live], data["new_values"][row, column][live], atol=2e-4)

    weights, denominator = weights_and_denominator(case, rows)
    for k in range(len(meta["gammas_lambdas"])):
        returns = jnp.asarray(data[f"g{k}.returns"][row, column])
        loss_of = partial(
            value_loss, old_values=old, returns=returns, weights=weights / denominator, clip=meta["eps"]
        )
        loss, _, grads = loss_and_gradient(loss_of, model, heads.params_new, rows)
        np.testing.assert_allclose(loss, data[f"g{k}.value_loss"], atol=1e-4)
        if f"g{k}.grad_norms" in data:
            check_gradients(grads, model.config.family, data, f"g{k}.", names)
        else:
            norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
            np.testing.assert_allclose(norm, data[f"g{k}.grad_global_norm"], rtol=1e-4)

    if "pol.loss" in data:
        old, new = (forward(policy, p, rows) for p in (golden.params, golden.params_new))
        np.testing.assert_allclose(old[live], data["pol.logp_old"][row, column][live], atol=2e-4)
        np.testing.assert_allclose(new[live], data["pol.logp_new"][row, column][live], atol=2e-4)
        advantages = data["g2.advantages"][row, column]
        loss_of = partial(
            policy_loss, old_logp=old, advantages=advantages, weights=weights / denominator, clip_low=meta["eps"],
            clip_high=meta["eps"], kl_coef=meta["policy_beta"],
        )  # fmt: skip
        loss, metrics, grads = loss_and_gradient(loss_of, policy, golden.params_new, rows)
        np.testing.assert_allclose(loss, data["pol.loss"], atol=1e-4)
        np.testing.assert_allclose(metrics["policy_loss"][0], data["pol.policy_loss"], atol=1e-4)
        np.testing.assert_allclose(meta["policy_beta"] * metrics["kl_loss"][0], data["pol.kl_loss"], atol=1e-4)
        norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
        np.testing.assert_allclose(norm, data["pol.grad_global_norm"], rtol=1e-4)


@pytest.mark.parametrize(("case", "layout"), VALUE_CASES)
@pytest.mark.parametrize("name", VALUE_NAMES)
def test_values_to_advantages(name, case, layout):
    """Old values leave the rows, pass GAE per response on the shrunk steps, and return to their targets."""
    golden, _, heads, model = models(name)
    case, rows, row, column = load(name, "value", case, layout)
    data, meta, live = case.data, case.meta, rows.target_item >= 0
    old = rows.scatter(forward(model, heads.params, rows))
    trainable = rows.scatter(rows.target_weight)
    if meta["vector_reward"]:
        cut = [v[:n] for v, n in zip(data["reward_vec"], data["reward_len"], strict=True)]
        rewards = [np.pad(v, (0, meta["L1"]))[: meta["L1"]] for v in cut]
    else:
        rewards = list(data["reward"])
    steps = [
        shrunk_steps(len(p), s, meta["block_size"], meta["shrink"], "response")
        for p, s in zip(case.prompts, case.steps, strict=True)
    ]
    for k, (gamma, lam) in enumerate(meta["gammas_lambdas"]):
        pairs = [
            trace_gae(s, v, r, t > 0, gamma, lam) for s, v, r, t in zip(steps, old, rewards, trainable, strict=True)
        ]
        for what, per_item in zip(("returns", "advantages"), zip(*pairs, strict=True), strict=True):
            got = rows.gather(per_item)
            np.testing.assert_allclose(got[live], data[f"g{k}.{what}"][row, column][live], atol=2e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", case_names("sft"))
@pytest.mark.parametrize("name", NAMES)
def test_sft(name, case, layout):
    golden, model, *_ = models(name)
    case, rows, row, _ = load(name, "sft", case, layout)
    weights, denominator = weights_and_denominator(case, rows)
    loss_of = partial(cross_entropy, weights=weights / denominator)
    loss, _, grads = loss_and_gradient(loss_of, model, golden.params_new, rows)
    np.testing.assert_allclose(loss, case.data["loss"], rtol=1e-4)
    logp = np.asarray(forward(model, golden.params_new, rows))
    got = row_sums(rows, row, -weights * logp, case.meta["rows"])
    np.testing.assert_allclose(got, case.data["row_loss"], rtol=1e-4)
    check_gradients(grads, model.config.family, case.data, "", golden.arrays("sft")["param_names"])
