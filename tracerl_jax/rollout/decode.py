"""Block-diffusion decoding in N slots: what the device does between two looks of the host.

    canvas   [ p0 p1 p2 p3 | p4 p5  M  M |  M  M  M  M | .. ]      B = 4, prompt of 6 tokens, M = MASK
    cache    |- prefilled -|                                       K/V of the positions before the current block
                            |- current block -|                    opens with the prompt's last p mod B tokens

`decode` is one `lax.while_loop`; an iteration is one forward of every slot, each at its own place:

    separate commit   Q = B    block has MASK    denoise: propose, rank, reveal, record
                               block complete    commit: its K/V are now those of the final tokens; on to the next block
    fused commit      Q = GB   the finished block's K/V are committed by the forward that denoises the next one

A forward of a fused commit holds G = 1 + drafts groups of B tokens, at least two. A group sees the cache and itself:

    group             0                   1           2           ..   G - 1
    block finished    finished block      s0          -                -          s0 sees group 0 too
    otherwise         s(G-1)              s0          s1               s(G-2)

s0 is the current block as it is. s1, s2, .. are drafts: what the forward before suggested that the block would be one,
two, .. denoise steps later. If the reveal from s0 leads to s1, then the forward has computed the next step as well, and
so on: several steps of a forward, all of them those that would have been taken one by one. A draft that is wrong costs
its computation and nothing else. Noise belongs to a step, not to a forward, so this holds for sampling too.

The last block, once complete, ends the slot: nobody needs its K/V. A slot that is done computes nothing of use and
writes to page 0, which belongs to nobody.

With a separate commit every forward writes the block's K/V at their place. Only how far the slot has come decides what
later forwards see, so a denoise step's K/V are overwritten by the next one and those of the commit stay.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tracerl_jax.diffusion.sampling import Proposal
from tracerl_jax.kernels.decode import KVCache
from tracerl_jax.models.decoder import Model
from tracerl_jax.rollout.cache import write_blocks
from tracerl_jax.rollout.slots import Needs, Rows, SlotState, has_stop, propose_groups, reveal, run_forwards


@dataclass(frozen=True)
class Program:
    """What is compiled in."""

    model: Model
    block_size: int
    groups: int  # of B tokens in a forward; 1: commit blocks by a forward of their own
    needs: Needs


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State(SlotState):
    """`forwards` are fewer than `steps` where drafts were right, more where blocks are committed."""

    pending: jax.Array  # [N] bool, the block before is finished but not committed (fused commit only)
    drafts: jax.Array  # [N,G-1,B] int32, the current block after one, two, .. more denoise steps, as guessed


@partial(jax.jit, static_argnames="program", donate_argnames="state")
def decode(
    program: Program,
    params: dict,
    banned: jax.Array,  # [V] bool
    rows: Rows,
    state: State,
    most: jax.Array,  # [] int32, forwards
    enough: jax.Array,  # [] int32, slots
    chosen: jax.Array | None = None,  # [n] int32, n <= N
) -> State:
    """Up to `most` forwards, or until `enough` slots are done, see `run_forwards`."""
    forward = partial(_forward, program, params, banned)
    return run_forwards(forward, program.model, rows, state, most, enough, chosen)


class _Step(NamedTuple):
    """What is known of the current block, and what the denoise steps of a forward revealed of it. Each [N,B]."""

    block: jax.Array
    revealed: jax.Array  # bool
    step_map: jax.Array
    logprobs: jax.Array
    behaviour_logprobs: jax.Array


def _forward(program: Program, params: dict, banned: jax.Array, rows: Rows, keys: jax.Array, state: State) -> State:
    """One forward of every slot, and what follows from it."""
    B, G, mask_id = program.block_size, program.groups, program.model.config.mask_token_id
    fused, active = G > 1, ~state.done
    positions = state.start[:, None] + jnp.arange(B)  # [N,B]
    block = jnp.take_along_axis(state.canvas, positions, axis=1)
    chain = jnp.concatenate([block[:, None], state.drafts], axis=1)  # [N,G,B]: s0, s1, ..
    masked = (chain == mask_id) & active[:, None, None]

    hidden, cache = _attend(program, params, state, chain, positions)
    number = state.steps[:, None] + 1 + jnp.arange(G)  # [N,G], of the denoise step from each state
    propose_for = partial(propose_groups, program.model, program.needs, params, banned, rows, keys)
    proposals = propose_for(hidden, number, masked)

    # From s0 to s1 and on, as long as a draft is what the step before it leads to.
    nothing = jnp.zeros_like(block)
    known = _Step(block, nothing > 0, nothing, *(jnp.zeros(block.shape, jnp.float32),) * 2)
    holds = jnp.ones_like(state.done)
    taken = jnp.zeros_like(state.steps)
    for g in range(G):
        if g:  # a finished block is in the place of the last draft
            holds &= (known.block == chain[:, g]).all(axis=-1) & ~(state.pending & (g == G - 1))
        proposal, hidden_now = _of_group(proposals, g), masked[:, g] & holds[:, None]
        revealed = reveal(program.model, rows, hidden_now, proposal, state.block_step + g)
        known = _record(known, revealed, proposal, number[:, g])
        taken += revealed.any(axis=-1)
    denoising, block = taken > 0, known.block
    steps, block_step = state.steps + taken, state.block_step + taken

    complete = denoising & ~(block == mask_id).any(axis=-1)
    last = has_stop(rows, block, positions) | (state.start + B >= rows.limit)
    # A complete block is left at once where the next forward commits it, and else after a forward of its own.
    left = complete & ~last if fused else active & ~denoising

    drafts = state.drafts
    if fused:
        at = jnp.maximum(taken - 1, 0)[:, None]  # the last step's state
        drafts = _draft(program, rows, propose_for, proposals, hidden, at, block, steps, block_step)

    # Compared with every position of the canvas: as a scatter it would be gathered from all devices.
    is_here = (jnp.arange(state.canvas.shape[1] // B) == state.start[:, None] // B)[..., None]  # [N,S/B,1]
    is_new = is_here & known.revealed[:, None]  # [N,S/B,B]

    def record(array, values):  # [N,S], [N,B]
        blocks = array.reshape(is_new.shape)
        return jnp.where(is_new, values[:, None], blocks).reshape(array.shape)

    return State(
        canvas=record(state.canvas, block),
        step_map=record(state.step_map, known.step_map),
        logprobs=record(state.logprobs, known.logprobs),
        behaviour_logprobs=record(state.behaviour_logprobs, known.behaviour_logprobs),
        start=state.start + B * left,
        pending=left & fused,
        drafts=drafts,
        block_step=jnp.where(left, 0, block_step),
        steps=steps,
        forwards=state.forwards + active,
        done=state.done | (complete & last),
        cache=cache,
    )


def _of_group(proposals: Proposal, g: int) -> Proposal:
    return jax.tree.map(lambda x: x[:, g], proposals)


def _record(known: _Step, revealed: jax.Array, proposal: Proposal, number: jax.Array) -> _Step:
    new = (proposal.ids, jnp.broadcast_to(number[:, None], revealed.shape), proposal.logprobs,
           proposal.behaviour_logprobs)  # fmt: skip
    old = (known.block, *known[2:])
    block, *rest = (jnp.where(revealed, n, o) for n, o in zip(new, old, strict=True))
    return _Step(block, known.revealed | revealed, *rest)


def _draft(program, rows, propose_for, proposals, hidden, at, block, steps, block_step) -> jax.Array:
    """The next drafts [N,G-1,B]: the steps to come, as if the model said from now on what it said last.

    at [N,1]: the group in which it did. A block that is complete stays as it is, and its drafts are never right: the
    next block has at least one MASK more.
    """
    N, count, mask_id = len(block), program.groups - 1, program.model.config.mask_token_id
    if program.needs.noise:  # the steps to come have their own noise
        last = jnp.take_along_axis(hidden, at[..., None, None], axis=1)  # [N,1,B,E]
        last, wanted = (
            jnp.broadcast_to(x, (N, count, *x.shape[2:])) for x in (last, (block == mask_id)[:, None])
        )
        proposals = propose_for(last, steps[:, None] + 1 + jnp.arange(count), wanted)
    else:
        proposals = jax.tree.map(lambda x: jnp.take_along_axis(x, at[..., None], axis=1), proposals)
    drafts = []
    for d in range(count):
        proposal = _of_group(proposals, d if program.needs.noise else 0)
        revealed = reveal(program.model, rows, block == mask_id, proposal, block_step + d)
        block = jnp.where(revealed, proposal.ids, block)
        drafts.append(block)
    return jnp.stack(drafts, axis=1)


def _attend(
    program: Program, params: dict, state: State, chain: jax.Array, positions: jax.Array
) -> tuple[jax.Array, KVCache]:
    """(hidden states [N,G,B,E] of the chain s0, s1, .., the cache behind this forward)."""
    model, B, G, active = program.model, program.block_size, program.groups, ~state.done
    if G == 1:
        committed = jnp.where(active, state.start, 0)
        hidden, kv = model.decode(params, chain[:, 0], positions, state.cache, committed)
        return hidden[:, None], write_blocks(model, state.cache, kv, state.start, active)
    N, pending = len(chain), state.pending & active
    before = jnp.maximum(positions - B, 0)
    finished = jnp.take_along_axis(state.canvas, before, axis=1)
    first = jnp.where(pending[:, None], finished, chain[:, -1])
    ids = jnp.concatenate([first, chain[:, :-1].reshape(N, -1)], axis=1)  # [N,G*B]
    places = jnp.concatenate([jnp.where(pending[:, None], before, positions), jnp.tile(positions, (1, G - 1))], axis=1)
    group = jnp.broadcast_to(jnp.arange(G * B) // B, ids.shape)
    start = jnp.where(pending[:, None] & (group == 1), 0, group * B)
    new_intervals = jnp.stack([start, (group + 1) * B], axis=-1)
    committed = jnp.where(active, state.start - B * pending, 0)
    hidden, kv = model.decode(params, ids, places, state.cache, committed, new_intervals)
    hidden = jnp.roll(hidden.reshape(N, G, B, -1), -1, axis=1)
    kept = jax.tree.map(lambda x: x[:, :, :B], kv)
    return hidden, write_blocks(model, state.cache, kept, state.start - B, pending)
