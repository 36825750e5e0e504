r"""Log-likelihood of a given completion under a block-diffusion model.

The probability of a block is that of its tokens in some order of revealing them; two estimates are defined.

monte_carlo     The bound by which diffusion language models are compared (LLaDA, arXiv 2502.09992, section 2.4, for the
                whole completion; here for a block given those before, as in BD3-LM, arXiv 2503.09573): the mean of the
                chain rule over random orders. With L tokens of a block to be predicted and l of them hidden, l uniform
                in 1..L,

                    log p(block) >= E_l E_mask [ L / l * sum over hidden i of log p(x_i | what is visible) ].

                `draws` masks are drawn for each block; their l take all values in turn, from a random one on.
left_to_right   The chain rule from left to right, the rest of the block hidden: exactly the probability with which the
                strategy `sequential`, one token per step, samples the completion at temperature 1. Not random.

Positions of the last block behind the completion stay hidden.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from tracerl_jax.diffusion.corruption import sample_rng
from tracerl_jax.diffusion.grid import block_of
from tracerl_jax.diffusion.replay import ReplayItem, masking_item, trace_item
from tracerl_jax.errors import ConfigError
from tracerl_jax.models.decoder import Model, Params
from tracerl_jax.rl.logprobs import SCORE_TOKENS_PER_BATCH, score_items

ESTIMATES = ("monte_carlo", "left_to_right")


def log_likelihoods(
    model: Model,
    params: Params,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    estimate: str = "monte_carlo",
    draws: int = 128,
    seed: int = 0,
    block_size: int | None = None,
    tokens_per_batch: int = SCORE_TOKENS_PER_BATCH,
) -> np.ndarray:
    """Log-probability in nats of each (prompt ids, completion ids) [n] f64; the completion's, given the prompt.

    The draws for a pair depend on `seed` and the lengths only, so completions of one length are compared under the same
    masks. Raises ConfigError for an unknown estimate, or a model without mask token.
    """
    if estimate not in ESTIMATES:
        raise ConfigError(f"unknown estimate {estimate!r} of a likelihood; use one of {', '.join(ESTIMATES)}")
    if draws < 1:
        raise ConfigError(f"draws is {draws}; it must be at least 1")
    if model.config.mask_token_id is None:
        raise ConfigError("the model has no mask_token_id; add it to its config.json")
    sizes = {"block_size": block_size or model.config.block_size, "mask_id": model.config.mask_token_id}
    items: list[ReplayItem] = []
    owners: list[int] = []
    for i, (prompt, completion) in enumerate(pairs):
        if estimate == "left_to_right":
            found = [trace_item(prompt, completion, np.arange(1, len(completion) + 1), **sizes)]
        else:
            found = _drawn_items(prompt, completion, draws, seed, tokens_per_batch, **sizes)
        items += found
        owners += [i] * len(found)
    if not items:
        return np.zeros(len(pairs))
    rows, scores = score_items(model, params, items, [1.0] * len(items), tokens_per_batch=tokens_per_batch)
    real = rows.target_item >= 0
    weighted = (rows.target_weight * scores.astype(np.float64))[real]
    owner = np.array(owners)[rows.target_item[real]]
    return np.bincount(owner, weights=weighted, minlength=len(pairs))


def _drawn_items(
    prompt: Sequence[int], completion: Sequence[int], draws: int, seed: int, most: int, *, block_size: int, mask_id: int
) -> list[ReplayItem]:
    """Items of at most about `most` tokens with `draws` masks of every block, weighted so that their targets sum to the
    estimate."""
    p, r = len(prompt), len(completion)
    block = block_of(p + np.arange(r), block_size) - block_of(p, block_size)
    length = np.bincount(block)[block] if r else np.zeros(0, int)  # L of each token's block
    rng = sample_rng(seed, p, r)
    first = rng.random(block[-1] + 1 if r else 0)[block]  # l of the first draw, as a share of L
    masked_items = []
    for draw in range(draws):
        hidden = 1 + (np.floor(first * length).astype(int) + draw) % np.maximum(length, 1)
        order = np.lexsort((rng.random(r), block))  # by block, at random inside
        rank = np.empty(r, int)
        rank[order] = np.arange(r) - np.searchsorted(block, block)
        masked_items.append(masking_item(
            prompt, completion, rank < hidden, block_size=block_size, mask_id=mask_id,
            weights=length / (hidden * draws),
        ))  # fmt: skip
    noisy = max((item.size - item.clean_len for item in masked_items), default=0)
    together = max(1, (most - p - r) // max(noisy, 1))  # draws that share one clean stream
    return [_joined(masked_items[i : i + together]) for i in range(0, draws, together)]


def _joined(items: Sequence[ReplayItem]) -> ReplayItem:
    """The groups of items of one response in one item, which reads the clean tokens once."""
    # Every item shows other tokens, so each keeps its canvas; all of them begin with the same clean stream.
    items = sorted(items, key=lambda item: -item.clean_len)
    counts = [len(item.group_start) for item in items]
    groups = np.cumsum([0, *counts[:-1]])
    canvases = np.cumsum([0, *(len(item.canvas) for item in items[:-1])], dtype=np.int32)

    def together(name: str) -> np.ndarray:
        return np.concatenate([getattr(item, name) for item in items])

    names = ("canvas", "shown_after", "group_start", "group_round", "target_offset", "target_ids", "target_weight",
             "target_pos", "target_round")  # fmt: skip
    return dataclasses.replace(
        items[0],
        group_source=np.concatenate([item.group_source + at for item, at in zip(items, canvases, strict=True)]),
        target_group=np.concatenate([item.target_group + at for item, at in zip(items, groups, strict=True)]),
        **{name: together(name) for name in names},
    )
