"""The reference's training rows: one row per response and replay round, `[prompt | clean response | noisy response]`.

The oracle of tests and the baseline of `benchmarks/update.py`; training uses `packing`. Row r of a response holds every
block in its r-th denoising state at once. B = 4, left padded prompt `. . 1 2 3`, response a..j, response-aligned:

    row      . .  1  2  3 | a  b  c  d  e  f  g  h  i  j | M  M  M  M  e  f  M  M  i  j
              padding      clean                           noisy: a block without an r-th state stays clean
    sees, from a noisy token of block k: the prompt, the clean blocks before k, the noisy tokens of block k
          from a clean token:            the prompt, the clean blocks up to its own
          from a prompt token:           the prompt's blocks up to its own, on the same grid

The reference is dLLM-RL (arXiv 2509.06949): its grid is `alignment="response"`, its rules on pads are `pad_response`
and `post_num`. With `alignment="absolute"` the noisy part opens with the prompt's last p mod B tokens.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import numpy as np

from tracerl_jax.diffusion.grid import block_of, block_start
from tracerl_jax.diffusion.packing import TARGETS, TargetRows, no_targets
from tracerl_jax.diffusion.replay import shrunk_steps


@partial(
    jax.tree_util.register_dataclass, data_fields=("ids", "positions", "intervals", *TARGETS), meta_fields=(),
    drop_fields=("response_lens",),
)  # fmt: skip
@dataclasses.dataclass(frozen=True, eq=False)
class RoundRows(TargetRows):
    """Rows as the reference lays them out, every token written out. What is computed from `PackedRows` can be computed
    from them."""

    ids: np.ndarray  # [N,T] int32
    positions: np.ndarray  # [N,T] int32
    intervals: np.ndarray  # [N,T,4] int32
    target_index: np.ndarray
    target_ids: np.ndarray
    target_weight: np.ndarray
    target_item: np.ndarray
    target_pos: np.ndarray
    target_round: np.ndarray
    response_lens: tuple[int, ...] = ()

    @classmethod
    def empty(cls, N: int, T: int, P: int, response_lens: Sequence[int]) -> "RoundRows":
        zeros = partial(np.zeros, dtype=np.int32)
        return cls(zeros((N, T)), zeros((N, T)), zeros((N, T, 4)), **no_targets(N, P),
                   response_lens=tuple(response_lens))  # fmt: skip

    @property
    def token_count(self) -> int:
        """Tokens that are not padding; `ids.size` are computed."""
        s1, e1, s2, e2 = np.moveaxis(self.intervals, -1, 0)
        return int(((s1 < e1) | (s2 < e2)).sum())


State = tuple[np.ndarray, np.ndarray]  # hidden [r] bool: MASK in the noisy response; selected [r] bool: the targets


def pad_response(ids, step_map, *, length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """ids and step map cut to `length`, or filled up with pads of step max(step_map) + 1, as the reference does."""
    ids, step_map = np.asarray(ids)[:length], np.asarray(step_map)
    steps = np.concatenate([step_map, np.full(max(length - len(step_map), 0), step_map.max() + 1)])[:length]
    return np.concatenate([ids, np.full(length - len(ids), pad_id)]), steps


def trace_states(
    prompt_len: int, step_map, *, block_size: int, shrink: int = 1, alignment: str = "response"
) -> list[State]:
    """The rounds of one response: each takes, in every block, the smallest step not taken yet."""
    steps = shrunk_steps(prompt_len, step_map, block_size, shrink, alignment)
    offset = prompt_len % block_size if alignment == "response" else 0
    blocks = block_of(prompt_len + np.arange(len(steps)), block_size, offset)
    left, states = np.ones(len(steps), bool), []
    while left.any():
        selected = np.zeros(len(steps), bool)
        for block in np.unique(blocks[left]):
            unconsumed = left & (blocks == block)
            selected |= unconsumed & (steps == steps[unconsumed].min())
        states.append((left.copy(), selected))
        left &= ~selected
    return states


def round_rows(
    prompts: Sequence[np.ndarray],
    responses: Sequence[np.ndarray],
    states: Sequence[Sequence[State]],
    *,
    block_size: int,
    mask_id: int,
    pad_id: int,
    alignment: str = "response",
    post_num: int | None = None,
) -> RoundRows:
    """One row per response and state that has a target, in this order; T and P are the smallest that fit.

    Blocks are cut at the end of the response, so a response whose last block had hidden tokens behind it is passed with
    these tokens (MASK where unknown), hidden where they were, never selected.

    `post_num`: targets that are pads, kept per row from the left; None keeps all. `pad_id` serves this and the padding.
    """
    L0, L1 = max(map(len, prompts)), max(map(len, responses))
    # Prompt tokens that share the first noisy block.
    heads = [len(prompt) % block_size if alignment == "absolute" else 0 for prompt in prompts]
    rows = []
    for item, response in enumerate(responses):
        for number, (hidden, selected) in enumerate(states[item]):
            kept = _limit_pads(selected, np.asarray(response) == pad_id, post_num)
            if kept.any():
                rows.append((item, number, hidden, kept))
    T = L0 + L1 + max(head + len(response) for head, response in zip(heads, responses, strict=True))
    P = max((int(kept.sum()) for *_, kept in rows), default=1)
    packed = RoundRows.empty(len(rows), T, P, [len(response) for response in responses])
    packed.ids[:], packed.positions[:] = pad_id, 1  # what the reference gives to pads

    for n, (item, number, hidden, kept) in enumerate(rows):
        prompt, response, head = np.asarray(prompts[item]), np.asarray(responses[item]), heads[item]
        p, end = len(prompt), len(prompt) + len(response)
        offset = p % block_size if alignment == "response" else 0
        clean_pos, noisy_pos = np.arange(end), np.arange(p - head, end)
        to_clean, to_noisy = L0 - p, L0 + L1 - (p - head)  # from a position to its column
        clean, noisy = slice(to_clean, to_clean + end), slice(L0 + L1, to_noisy + end)

        packed.ids[n, clean] = np.concatenate([prompt, response])
        packed.ids[n, noisy] = np.concatenate([prompt[p - head :], np.where(hidden, mask_id, response)])
        packed.positions[n, clean], packed.positions[n, noisy] = clean_pos, noisy_pos

        clean_end = np.minimum(_block_end(clean_pos, block_size, offset), end)
        noisy_end = np.minimum(_block_end(noisy_pos, block_size, offset), end)
        noisy_start = _block_end(noisy_pos, block_size, offset) - block_size
        packed.intervals[n, clean] = _intervals(to_clean, to_clean + clean_end)
        packed.intervals[n, noisy] = _intervals(
            to_clean, to_clean + noisy_start, to_noisy + noisy_start, to_noisy + noisy_end
        )
        # A pad sees the real tokens of the block it falls in, or only itself.
        pads = np.arange(to_clean)
        pad_end = to_clean + _block_end(pads - to_clean, block_size, offset)
        alone = pad_end <= to_clean
        packed.intervals[n, pads] = _intervals(np.where(alone, pads, to_clean), np.where(alone, pads + 1, pad_end))

        pos = np.flatnonzero(kept)
        slots = slice(0, len(pos))
        packed.target_index[n, slots] = to_noisy + p + pos
        packed.target_ids[n, slots] = response[pos]
        packed.target_weight[n, slots] = 1
        packed.target_item[n, slots] = item
        packed.target_pos[n, slots] = pos
        packed.target_round[n, slots] = number
    return packed


def _limit_pads(selected: np.ndarray, is_pad: np.ndarray, post_num: int | None) -> np.ndarray:
    if post_num is None:
        return selected
    return selected & ~(is_pad & (np.cumsum(selected & is_pad) > post_num))


def _block_end(pos: np.ndarray, block_size: int, offset: int) -> np.ndarray:
    return block_start(block_of(pos, block_size, offset) + 1, block_size, offset)


def _intervals(s1, e1, s2=0, e2=0) -> np.ndarray:
    """Columns of the four bounds, broadcast -> [t,4]."""
    return np.stack(np.broadcast_arrays(s1, e1, s2, e2), -1)
