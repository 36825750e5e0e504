"""Replay items: the states a training step shows the model again, and the tokens it is trained on in each.

A **replay group** is one block in one state of its denoising: some tokens visible, the others MASK. The loss is on the
tokens that were revealed in that state. `trace_item` replays a recorded trace; `masking_item` hides given positions
(random masking, coupled, semi-autoregressive SFT). Both return a `ReplayItem`, which `packing.pack` lays out in rows.

    B = 4, prompt p0..p4 (p mod B = 1), response a..g, steps 2 1 2 | 3 3 5 4          M = MASK

    canvas   p0 p1 p2 p3 | p4  a  b  c |  d  e  f  g
    round 0                p4  M [M] M | [M][M] M  M        [.] = target
    round 1                p4 [M] b [M]|  d  e  M [M]
    round 2                            |  d  e [M] g

With `alignment="response"` the grid starts at the response instead, as in the reference, and p4 is in no group.

A model with full attention sees its whole canvas at once: to it everything is one block, so `block_size` is the length
of the canvas, MASK behind the response included, there is no clean stream, and a group is a whole sequence:

    round 0  p0 p1 p2 p3 p4  M [M] M  M  M  M  M  M  M
    round 1  p0 p1 p2 p3 p4 [M] b [M] M  M  M  M  M  M
"""

import dataclasses
from dataclasses import dataclass

import numpy as np

from tracerl_jax.diffusion.grid import block_of, block_start
from tracerl_jax.diffusion.trace import Trace
from tracerl_jax.errors import ConfigError

_ALWAYS, _NEVER = -1, np.iinfo(np.int32).max  # rounds behind which a token is shown


@dataclass(frozen=True, eq=False)
class ReplayItem:
    """One response: the clean ids its groups look back on, its groups, and their targets (in order of group, position).

    Groups are not written out. `canvas` holds the ids once, and `shown_after` the round from behind which each is seen:
    a group shows those of earlier rounds than its own. So the rows of a response are made from its ids, its steps and
    the numbers of its groups, on the device (diffusion/packing.py).

    The clean stream is the canvas up to the start of the last block that has a group: nobody looks at a later clean
    token. Without groups (`causal_item`) it is the whole sequence and holds the targets itself.
    """

    canvas: np.ndarray  # [K] int32
    shown_after: np.ndarray  # [K] int32
    clean_len: int  # c: of the canvas
    group_start: np.ndarray  # [M] int32, absolute position of the first token of the group's block
    group_source: np.ndarray  # [M] int32, where this token is in the canvas
    group_round: np.ndarray  # [M] int32, index of the group among the states of its block
    block_size: int  # B
    mask_id: int
    target_group: np.ndarray  # [n] int32, index into the groups; -1: the clean stream
    target_offset: np.ndarray  # [n] int32, index into the group's B tokens, or the clean stream's
    target_ids: np.ndarray  # [n] int32
    target_weight: np.ndarray  # [n] f32
    target_pos: np.ndarray  # [n] int32, index into the response
    target_round: np.ndarray  # [n] int32, of the group
    grid_offset: int  # first position of a whole block: 0, or p mod B with alignment="response"
    response_len: int

    @property
    def clean(self) -> np.ndarray:
        """[c] ids of the clean stream."""
        return self.canvas[: self.clean_len]

    @property
    def group_ids(self) -> np.ndarray:
        """[M,B] the groups written out, MASK where hidden."""
        at = self.group_source[:, None] + np.arange(self.block_size)
        return np.where(self.shown_after[at] < self.group_round[:, None], self.canvas[at], np.int32(self.mask_id))

    @property
    def size(self) -> int:
        """Tokens the item takes in a row."""
        return self.clean_len + self.block_size * len(self.group_start)

    @property
    def row_tokens(self) -> int:
        """Tokens that must lie in one row, see `pieces`."""
        return self.size if self.clean_len else min(self.size, self.block_size)

    @property
    def pairs(self) -> int:
        """Keys that its tokens see, all together."""
        B, position = self.block_size, np.arange(len(self.clean))
        ends = block_start(block_of(position, B, self.grid_offset) + 1, B, self.grid_offset)
        return int(ends.sum()) + B * int((self.group_start + B).sum())

    @property
    def target_column(self) -> np.ndarray:
        """[n] index of each target among the item's tokens: the clean stream, then the groups."""
        group = self.clean_len + self.block_size * self.target_group
        return np.where(self.target_group < 0, 0, group) + self.target_offset

    def pieces(self) -> list["ReplayItem"]:
        """Parts that may lie in different rows: groups that look back on nothing do not need each other."""
        if self.clean_len or len(self.group_start) < 2:
            return [self]
        return [self._group(g) for g in range(len(self.group_start))]

    def _group(self, g: int) -> "ReplayItem":
        mine = self.target_group == g
        return dataclasses.replace(
            self, group_start=self.group_start[g : g + 1], group_source=self.group_source[g : g + 1],
            group_round=self.group_round[g : g + 1],
            target_group=self.target_group[mine] - g, target_offset=self.target_offset[mine],
            target_ids=self.target_ids[mine], target_weight=self.target_weight[mine], target_pos=self.target_pos[mine],
            target_round=self.target_round[mine],
        )  # fmt: skip

    @property
    def rounds(self) -> int:
        """Training rows the reference would spend on this item: denoising rounds that have a target."""
        return len(np.unique(self.target_round))


def trace_item(
    prompt_ids,
    ids,
    step_map,
    *,
    block_size: int,
    mask_id: int,
    shrink: int = 1,
    alignment: str = "absolute",
    tail_ids=(),
    tail_step_map=(),
    weights=None,
) -> ReplayItem:
    """TraceRL replay of one response (arXiv 2509.06949): each token is predicted in the state that revealed it.

    Args:
      prompt_ids [p], ids [r], step_map [r]: int; steps need only be ordered, they may count over the whole sequence.
      block_size: of the training; it may differ from the block size of the trace.
      shrink: consecutive distinct steps of a block merged into one group.
      tail_ids, tail_step_map [tail]: what the last block revealed behind the response. A tail token is visible in the
        groups whose first step comes after its own. Positions of the last block without a known token are MASK.
      weights: [r] f32 loss weights, 1 when None. A token of weight 0 is no target.

    Raises ConfigError for shrink < 1 or an unknown alignment.
    """
    prompt_len, step_map = len(prompt_ids), np.asarray(step_map, np.int64)
    states = _states(prompt_len, step_map, block_size, shrink, alignment)
    offset = _grid_offset(prompt_len, block_size, alignment)
    tail_pos = prompt_len + len(step_map) + np.arange(len(tail_step_map))
    tail_blocks = block_of(tail_pos, block_size, offset)
    # A tail token is hidden in every state that began at or before its own step.
    begun = (states.block == tail_blocks[:, None]) & (states.first_step <= np.asarray(tail_step_map)[:, None])
    return _build(
        prompt_ids, ids, states.round[states.of_token], np.ones(len(step_map), bool), weights,
        block_size=block_size, mask_id=mask_id, offset=offset,
        tail_ids=tail_ids, tail_rounds=begun.sum(1) - 1,
    )  # fmt: skip


def item_of_trace(trace: Trace, *, mask_id: int, block_size: int | None = None, shrink: int = 1) -> ReplayItem:
    """`trace_item` of a recorded trace. By default its groups are the very states in which the sampler drew.

    block_size: of a block-causal model's training, default: the trace's own.
    """
    return trace_item(
        trace.prompt_ids, trace.ids, trace.step_map, block_size=trace.canvas_len or block_size or trace.block_size,
        mask_id=mask_id, shrink=shrink, tail_ids=trace.tail_ids, tail_step_map=trace.tail_step_map,
    )  # fmt: skip


def masking_item(
    prompt_ids, ids, masked, *, block_size: int, mask_id: int, alignment: str = "absolute", weights=None
) -> ReplayItem:
    """One state per block: the positions of `masked` [r] bool hidden and trained, the rest of the response visible.

    Random masking and semi-autoregressive SFT draw `masked`; coupled is two items, of `masked` and of `~masked`.
    `weights` [r] f32 are the targets' loss weights (say 1/t), 1 when None; a hidden token of weight 0 is no target.
    Raises ConfigError for an unknown alignment.
    """
    masked = np.asarray(masked, bool)
    return _build(
        prompt_ids, ids, np.where(masked, 0, _ALWAYS), masked, weights,
        block_size=block_size, mask_id=mask_id, offset=_grid_offset(len(prompt_ids), block_size, alignment),
        tail_ids=(), tail_rounds=(),
    )  # fmt: skip


def slices_item(prompt_ids, ids, masked, slices, *, canvas: int, mask_id: int, weights=None, chosen=None) -> ReplayItem:
    """Semi-autoregressive states of a model with full attention, one per slice: the slices before it are visible, those
    behind it hidden, and in it `masked` is hidden and trained.

    Args:
      prompt_ids [p], ids [r], masked [r] bool.
      slices: [r] int, which slice each token belongs to, in order of decoding.
      canvas: positions of the sequence, at least p + r; MASK behind the response.
      weights: [r] f32 loss weights, 1 when None. A token of weight 0 is no target.
      chosen: slices that get a state, all when None.
    """
    masked, slices = np.asarray(masked, bool), np.asarray(slices)
    is_target = masked if chosen is None else masked & np.isin(slices, chosen)
    return _build(
        prompt_ids, ids, np.where(masked, slices, slices - 1), is_target, weights,
        block_size=canvas, mask_id=mask_id, offset=0, tail_ids=(), tail_rounds=(),
    )  # fmt: skip


def causal_item(prompt_ids, ids, *, weights=None) -> ReplayItem:
    """Next-token training: the clean sequence, each token seeing those up to itself, every token of `ids` a target.

    For models with shifted logits, which read it at the token before. `weights` as of `slices_item`.
    """
    weights = np.ones(len(ids), np.float32) if weights is None else np.asarray(weights, np.float32)
    pos = np.flatnonzero(weights).astype(np.int32)
    nothing, length = np.zeros(0, np.int32), len(prompt_ids) + len(ids)
    return ReplayItem(
        canvas=np.concatenate([prompt_ids, ids]).astype(np.int32),
        shown_after=np.full(length, _ALWAYS, np.int32),
        clean_len=length,
        group_start=nothing,
        group_source=nothing,
        group_round=nothing,
        block_size=1,  # the clean stream is causal
        mask_id=0,  # nothing is hidden
        target_group=np.full(len(pos), -1, np.int32),
        target_offset=(len(prompt_ids) + pos).astype(np.int32),
        target_ids=np.asarray(ids, np.int32)[pos],
        target_weight=weights[pos],
        target_pos=pos,
        target_round=np.zeros(len(pos), np.int32),
        grid_offset=0,
        response_len=len(ids),
    )


def shrunk_steps(prompt_len: int, step_map, block_size: int, shrink: int, alignment: str = "absolute") -> np.ndarray:
    """The step map as the groups of `trace_item` see it: in each block every `shrink` consecutive distinct steps are
    replaced by the largest of them. step_map [r] int -> [r] int64. Raises ConfigError like `trace_item`.
    """
    step_map = np.asarray(step_map, np.int64)
    states = _states(prompt_len, step_map, block_size, shrink, alignment)
    return states.last_step[states.of_token]


@dataclass(frozen=True)
class _States:
    """The states of all blocks, ordered by block, then step."""

    block: np.ndarray  # [M]
    round: np.ndarray  # [M], index among the states of the block
    first_step: np.ndarray  # [M]
    last_step: np.ndarray  # [M], differs from first_step where steps are merged
    of_token: np.ndarray  # [r], the state in which each response token is revealed


def _states(prompt_len: int, step_map: np.ndarray, block_size: int, shrink: int, alignment: str) -> _States:
    if shrink < 1:
        raise ConfigError(f"shrink is {shrink}; it must be at least 1 (1 replays every denoise step)")
    offset = _grid_offset(prompt_len, block_size, alignment)
    blocks = block_of(prompt_len + np.arange(len(step_map)), block_size, offset)
    block, step, of_token = _distinct_pairs(blocks, step_map)
    rank = np.arange(len(block)) - np.searchsorted(block, block)  # of a distinct step among those of its block
    opens = rank % shrink == 0
    first = np.flatnonzero(opens)
    last = np.append(first[1:], len(block))[: len(first)] - 1
    state_of_step = np.cumsum(opens) - 1
    return _States(block[first], rank[first] // shrink, step[first], step[last], state_of_step[of_token])


def _distinct_pairs(major: np.ndarray, minor: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct (major, minor) pairs in lexicographic order, and for each input pair its index among them."""
    low = minor.min(initial=0)
    span = minor.max(initial=0) - low + 1
    keys, index = np.unique(major * span + (minor - low), return_inverse=True)
    return keys // span, keys % span + low, index


def _grid_offset(prompt_len: int, block_size: int, alignment: str) -> int:
    if alignment not in ("absolute", "response"):
        raise ConfigError(f"alignment is {alignment!r}; use 'absolute' (the sampler's grid) or 'response' (parity)")
    return prompt_len % block_size if alignment == "response" else 0


def _build(
    prompt_ids, ids, rounds, is_target, weights, *, block_size, mask_id, offset, tail_ids, tail_rounds
) -> ReplayItem:
    """`rounds` [r]: the state of its block in which each token is a target; it is visible in later states only."""
    prompt_len, response_len = len(prompt_ids), len(ids)
    weights = np.ones(response_len, np.float32) if weights is None else np.asarray(weights, np.float32)
    pos = np.flatnonzero(is_target & (weights != 0))
    block = block_of(prompt_len + pos, block_size, offset)
    group_block, group_round, group = _distinct_pairs(block, rounds[pos])
    order = np.argsort(group, kind="stable")
    pos, group = pos[order], group[order]

    unknown = np.full(block_size, mask_id)  # the last block may reach beyond all known tokens
    canvas = np.concatenate([prompt_ids, ids, tail_ids, unknown]).astype(np.int32)
    shown_after = np.concatenate([np.full(prompt_len, _ALWAYS), rounds, tail_rounds, np.full(block_size, _NEVER)])
    group_start = block_start(group_block, block_size, offset).astype(np.int32)
    clean_len = int(group_start[-1]) if len(group_start) else 0
    end = clean_len + block_size if len(group_start) else 0
    return ReplayItem(
        canvas=canvas[:end],
        shown_after=shown_after[:end].astype(np.int32),
        clean_len=clean_len,
        group_start=group_start,
        group_source=group_start,
        group_round=group_round.astype(np.int32),
        block_size=block_size,
        mask_id=mask_id,
        target_group=group.astype(np.int32),
        target_offset=(prompt_len + pos - group_start[group]).astype(np.int32),
        target_ids=canvas[prompt_len + pos],
        target_weight=weights[pos],
        target_pos=pos.astype(np.int32),
        target_round=rounds[pos].astype(np.int32),
        grid_offset=offset,
        response_len=response_len,
    )
