"""Supervised rows, losses and gradients of Dream, LLaDA and MMaDA as the published code has them.

Parity mode: responses are filled up with pads, pads behind the first `post_num` are never targets, and the prompts of
LLaDA and MMaDA keep their (visible) left pads. Dream hides them, which is the same as not having them.
"""

import json
from functools import lru_cache, partial

import jax
import numpy as np
import pytest
from golden_utils import FULL_NAMES, load_golden
from replay_utils import check_full_gradients, pack_to, read_lists

from tracerl_jax.diffusion.replay import causal_item, masking_item, shrunk_steps, slices_item
from tracerl_jax.models import Model
from tracerl_jax.parallel.mesh import make_mesh
from tracerl_jax.parallel.sharding import param_shardings
from tracerl_jax.rl.logprobs import packed_logprobs
from tracerl_jax.rl.objectives import cross_entropy
from tracerl_jax.training.step import put_batch

CASES = [(name, f"f{i:02}") for name in FULL_NAMES for i in range(7 if name == "dream_tiny" else 4)]
SHAPE = (2, 128, 64)  # N, T, P of every case: each program compiles once


@lru_cache
def load(name, case):
    """(meta, arrays, columns of left padding per sequence, items, golden row of every item's round)"""
    golden = load_golden(name)
    meta, data = json.loads(str(golden.arrays("sft")["meta"]))[case], golden.arrays("sft", case)
    dataset = golden.arrays("sft", f"ds.{meta['dataset']}")
    P, length, pad, mask = meta["prompt_len"], meta["length"], meta["pad_id"], meta["mask_id"]
    hidden = [P - len(p) if name == "dream_tiny" else 0 for p in read_lists(dataset, "prompts")]
    prompts = [clean[start:P] for clean, start in zip(data["clean_ids"], hidden, strict=True)]
    responses = data["clean_ids"][:, P:]
    is_pad = responses == pad
    post_num = length if meta["post_num"] is None else meta["post_num"]
    tail = is_pad & (np.cumsum(is_pad, axis=1) > post_num)
    items = []
    for s, (prompt, ids) in enumerate(zip(prompts, responses, strict=True)):
        weights, canvas = (~tail[s]).astype(np.float32), len(prompt) + len(ids)
        if meta["method"] == "ar":
            items.append((s, causal_item(prompt, ids, weights=weights)))
        elif meta["method"] == "random_masking":
            items += [
                (s, masking_item(prompt, ids, drawn[P:] | tail[s], block_size=canvas, mask_id=mask, weights=weights))
                for drawn in data["draw_mask"][s]
            ]
        else:
            steps = read_lists(dataset, "steps")[s] if meta["recorded_steps"] else np.arange(meta["max_gen_length"])
            slices = shrunk_steps(0, steps, len(steps), meta["block_size"])[: len(ids)]
            np.testing.assert_array_equal(steps[: len(ids)], data["step_map"][s, : len(ids)])
            drawn = data["draw_seq"] == s
            kept = (data["draw_u"][drawn] < data["draw_p"][drawn])[:, P:] & (slices == data["draw_step"][drawn, None])
            items.append((s, slices_item(prompt, ids, kept.any(0), slices, canvas=canvas, mask_id=mask,
                                         weights=weights)))  # fmt: skip
    return golden, meta, data, hidden, [(s, piece) for s, item in items for piece in item.pieces() if piece.size]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_rows(name, case):
    _, meta, data, hidden, pieces = load(name, case)
    P = meta["prompt_len"]
    np.testing.assert_array_equal([s for s, _ in pieces], data["row_seq"])
    for n, (s, piece) in enumerate(pieces):
        ids = piece.clean if meta["method"] == "ar" else piece.group_ids[0]
        np.testing.assert_array_equal(ids, data["input_ids"][n, hidden[s] :])
        np.testing.assert_array_equal(piece.target_pos + P, np.flatnonzero(data["p_mask"][n]))
        np.testing.assert_array_equal(piece.target_ids, data["labels"][n, piece.target_pos + P])


@partial(jax.jit, static_argnames="model")
def loss_and_gradient(model, params, rows, weights):
    def loss(params):
        logp, _ = packed_logprobs(model, params, rows)
        return cross_entropy(logp, weights)[0], logp

    return jax.value_and_grad(loss, has_aux=True)(params)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_losses_and_gradients(name, case):
    golden, _, data, _, pieces = load(name, case)
    rows = pack_to([piece for _, piece in pieces], SHAPE)
    counts = np.array([len(piece.target_ids) for _, piece in pieces])
    weights = np.where(rows.target_item >= 0, 1 / (counts * len(counts))[rows.target_item], 0).astype(np.float32)
    (loss, logp), grads = loss_and_gradient(Model(golden.config), golden.params_new, rows, weights)
    np.testing.assert_allclose(loss, data["loss"], rtol=1e-4)
    live = rows.target_item >= 0
    row_loss = np.bincount(rows.target_item[live], -np.asarray(logp)[live]) / counts
    np.testing.assert_allclose(row_loss, data["row_loss"], rtol=1e-4)
    assert check_full_gradients(grads, golden.config, data, golden.arrays("sft")["param_names"]) == 4


def test_a_mesh_changes_nothing():
    """Rows over data and fsdp, heads, biases and vocabulary over tensor."""
    golden, *_, pieces = load("dream_tiny", "f02")
    rows = pack_to([piece for _, piece in pieces], (4, *SHAPE[1:]))
    model = Model(golden.config, mesh=make_mesh(2, 2, 2))
    sharded = jax.device_put(golden.params_new, param_shardings(model, model.mesh))
    (loss, logp), grads = loss_and_gradient(model, sharded, put_batch(rows, model.mesh), rows.target_weight)
    (want, want_logp), want_grads = loss_and_gradient(
        Model(golden.config), golden.params_new, rows, rows.target_weight
    )
    live = rows.target_item >= 0
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(logp)[live], np.asarray(want_logp)[live], atol=1e-4)
    for got, expected in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * float(np.abs(expected).max()))
