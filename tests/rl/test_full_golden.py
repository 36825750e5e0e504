"""RL rows, log-probs, losses and gradients of Dream, LLaDA and MMaDA as the published code has them (parity mode).

Responses are filled up with pads, pads behind the first `post_num` are never targets, and the prompts of LLaDA and
MMaDA keep their visible left pads. A row's surrogate is a mean over its targets, its KL a sum; the loss is the mean of
rows. Training's own defaults are means over targets, see docs/full_attention.md.
"""

import json
from functools import lru_cache, partial

import jax
import numpy as np
import pytest
from golden_utils import FULL_NAMES, load_golden
from replay_utils import check_full_gradients, pack_to, read_lists

from tracerl_jax.diffusion.replay import masking_item, shrunk_steps, trace_item
from tracerl_jax.models import Model
from tracerl_jax.rl.logprobs import packed_logprobs
from tracerl_jax.rl.objectives import policy_loss

CASES = [(name, f"t{i:02}") for name in FULL_NAMES for i in range(11)]
SHAPE = (8, 128, 64)  # N, T, P of every case: each program compiles once


@lru_cache
def load(name, case):
    """(golden, meta, arrays, columns of left padding per sequence, (sequence, rows of one state each))"""
    golden = load_golden(name)
    meta, data = json.loads(str(golden.arrays("tracerl")["meta"]))[case], golden.arrays("tracerl", case)
    dataset = golden.arrays("tracerl", f"ds.{meta['dataset']}")
    P, mask = meta["prompt_len"], meta["mask_id"]
    left = [P - len(p) if name == "dream_tiny" else 0 for p in read_lists(dataset, "prompts")]
    items = []
    for s, clean in enumerate(data["clean_ids"]):
        prompt, ids = clean[left[s] : P], clean[P:]
        canvas, is_pad = len(prompt) + len(ids), ids == meta["pad_id"]
        post_num = len(ids) if meta["post_num"] is None else meta["post_num"]
        tail = is_pad & (np.cumsum(is_pad) > post_num)
        common = {"block_size": canvas, "mask_id": mask, "weights": (~tail).astype(np.float32)}
        if meta["method"] == "TraceRL":
            full = read_lists(dataset, "steps")[s]
            steps = shrunk_steps(0, full, len(full), meta["shrink"])[: len(ids)]
            np.testing.assert_array_equal(steps, data["step_collapsed"][s])
            items.append((s, trace_item(prompt, ids, steps, **common)))
            continue
        for drawn in data["draw_mask"][s][:, P:]:
            for view in [drawn, ~drawn] if meta["method"] == "coupled" else [drawn]:
                items.append((s, masking_item(prompt, ids, view | tail, **common)))
    return golden, meta, data, left, [(s, piece) for s, item in items for piece in item.pieces() if piece.size]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_rows(name, case):
    _, meta, data, left, pieces = load(name, case)
    P = meta["prompt_len"]
    np.testing.assert_array_equal([s for s, _ in pieces], data["row_seq"])
    for n, (s, piece) in enumerate(pieces):
        np.testing.assert_array_equal(piece.group_ids[0], data["input_ids"][n, left[s] :])
        np.testing.assert_array_equal(piece.target_pos + P, np.flatnonzero(data["p_mask"][n]))


@partial(jax.jit, static_argnames="model")
def forward_and_gradient(model, params, rows, cotangent):
    """(log-probs [N,P], parameter gradient of sum(cotangent * them)): one program for every loss."""
    logp, pull_back = jax.vjp(lambda params: packed_logprobs(model, params, rows)[0], params)
    return logp, *pull_back(cotangent)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_losses_and_gradients(name, case):
    golden, meta, data, _, pieces = load(name, case)
    rows = pack_to([piece for _, piece in pieces], SHAPE)
    live, row, column = rows.target_item >= 0, np.maximum(rows.target_item, 0), meta["prompt_len"] + rows.target_pos
    column = column - (name == "dream_tiny" and data["logp_old"].shape[1] < meta["length"])  # stored one to the left
    counts = np.array([len(piece.target_ids) for _, piece in pieces])
    per_row = np.where(live, 1 / len(counts), 0).astype(np.float32)
    old = np.where(live, data["logp_old"][row, column], 0).astype(np.float32)
    model, estimator = Model(golden.config), "k3" if meta["use_kl_estimator_k3"] else "k1"
    options = {"clip_low": meta["eps"], "clip_high": meta["eps"], "kl_estimator": estimator}

    def loss_of(logp):
        surrogate, _ = policy_loss(logp, old, data["adv"][row], per_row / counts[row], kl_coef=0.0, **options)
        kl, _ = policy_loss(logp, old, 0.0 * old, per_row * meta["beta"], kl_coef=1.0, **options)
        return surrogate + kl, (surrogate, kl)

    logp, _ = forward_and_gradient(model, golden.params_new, rows, 0.0 * old)
    (loss, (surrogate, kl)), cotangent = jax.value_and_grad(loss_of, has_aux=True)(logp)
    _, grads = forward_and_gradient(model, golden.params_new, rows, cotangent)
    np.testing.assert_allclose(np.asarray(logp)[live], data["logp_new"][row, column][live], atol=2e-4)
    for got, want in ((loss, "loss"), (surrogate, "policy_loss"), (kl, "kl_loss")):
        np.testing.assert_allclose(got, data[want], atol=1e-4, err_msg=want)
    assert check_full_gradients(grads, golden.config, data, golden.arrays("tracerl")["param_names"]) == 4


@pytest.mark.parametrize("name", FULL_NAMES)
def test_old_logprobs_are_the_samplers(name):
    golden, meta, data, _, pieces = load(name, "t05")
    rows = pack_to([piece for _, piece in pieces], SHAPE)
    live, column = rows.target_item >= 0, meta["prompt_len"] + rows.target_pos
    column = column - (data["rollout_logp"].shape[1] < meta["length"])
    nothing = np.zeros(live.shape, np.float32)
    old = np.asarray(forward_and_gradient(Model(golden.config), golden.params, rows, nothing)[0])
    np.testing.assert_allclose(old[live], data["rollout_logp"][rows.target_item, column][live], atol=2e-4)
