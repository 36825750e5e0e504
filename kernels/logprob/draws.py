"""Drawing a token per position in one pass over windows of the vocabulary (Gumbel-max), and what is said about it."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p
from jax.sharding import Mesh

from tracerl_jax.kernels.dispatch import target_platform
from tracerl_jax.kernels.logprob.columns import LOWEST, Split, dot, fold, per_device, read, rebase, window_width

_ROWS, _HIDDEN, _KERNEL = ("batch",), ("batch", None, None), ("embed", "vocab")


class Draws(NamedTuple):
    """One token for every position. Log-probabilities are of softmax(logits / temperature)."""

    ids: jax.Array  # [N, Q] int32
    logprobs: jax.Array  # [N, Q] f32, over the whole vocabulary
    allowed_logprobs: jax.Array  # [N, Q] f32, over the ids that are not banned: the distribution drawn from
    entropy: jax.Array  # [N, Q] f32, in nats, of the latter


def gumbel_at(words: jax.Array, counter: jax.Array) -> jax.Array:
    """Entry number `counter` (uint32) of `jax.random.gumbel(key, shape)`, f32, for every broadcast pair.

    words [.., 2] uint32, the key data of a threefry key; shape of at most 2^32 entries. Nothing is drawn in order, so
    any part of a draw can be made anywhere.
    """
    high, low = threefry2x32_p.bind(words[..., 0], words[..., 1], jnp.zeros_like(counter), counter)
    mantissa = (high ^ low) >> 9 | 0x3F800000  # of a float in [1, 2)
    uniform = jax.lax.bitcast_convert_type(mantissa, jnp.float32) - 1.0
    return -jnp.log(-jnp.log(jnp.maximum(uniform, jnp.finfo(jnp.float32).tiny)))


def chunked_sample_tokens(
    hidden: jax.Array,  # [N, Q, E]
    kernel: jax.Array,  # [E, V]
    keys: jax.Array | None,  # [N]
    banned: jax.Array,  # [V] bool
    temperature: jax.Array,  # [N] f32
    wanted: jax.Array | None = None,  # [N, Q] bool
    *,
    use_entropy: bool,
    mesh: Mesh | None = None,
    width: int | None = None,
    group: int | None = None,
) -> Draws:
    """See `sample_tokens`. For tuning and tests: `width`, vocabulary columns of a window; `group`, wanted positions
    that go through the head together."""
    run = partial(_local_draws, width, group, kernel.shape[1], keys is not None, use_entropy)
    words = jnp.zeros((len(hidden), 2), jnp.uint32) if keys is None else jax.random.key_data(keys)
    operands = (_HIDDEN, _KERNEL, ("batch", None), ("vocab",), _ROWS, _ROWS)
    return Draws(*per_device(run, mesh, operands, (_ROWS,) * 4)(hidden, kernel, words, banned, temperature, wanted))


class _Positions(NamedTuple):
    """What the head is asked about, R positions."""

    hidden: jax.Array  # [R, E]
    words: jax.Array  # [R, 2] uint32, of the key
    number: jax.Array  # [R] uint32, the position's row in the noise of its key
    temperature: jax.Array  # [R] f32


def _local_draws(width, group, vocabulary, use_noise, use_entropy, split: Split, hidden, kernel, words, banned,
                 temperature, wanted):  # fmt: skip
    """This device's rows against its columns, all devices of a row agreeing on the result.

    wanted      . # . . # # . #     positions 1, 4, 5, 7 go through the head in groups, and no group runs without one
    """
    N, Q, E = hidden.shape
    R = N * Q
    positions = _Positions(
        hidden.reshape(R, E), jnp.repeat(words, Q, axis=0), jnp.tile(jnp.arange(Q, dtype=jnp.uint32), N),
        jnp.repeat(temperature, Q),
    )  # fmt: skip
    draw = partial(_draw, width, vocabulary, use_noise, use_entropy, split, kernel, banned)
    if wanted is None:
        return tuple(x.reshape(N, Q) for x in draw(positions))

    wanted = wanted.reshape(R)
    size = min(R, group or group_size(R))
    length = -(-R // size) * size
    rank = jnp.where(wanted, jnp.cumsum(wanted) - 1, length)  # out of bounds, where the scatter drops it
    order = jnp.full(length, R).at[rank].set(jnp.arange(R), mode="drop")

    def run_group(g, results):
        index = jax.lax.dynamic_slice_in_dim(order, g * size, size)
        part = draw(jax.tree.map(lambda x: x.at[index].get(mode="clip"), positions))
        return [result.at[index].set(new, mode="drop") for result, new in zip(results, part, strict=True)]

    zeros = jnp.zeros(R, jnp.float32)
    groups = split.most(-(-jnp.sum(wanted, dtype=jnp.int32) // size))
    results = jax.lax.fori_loop(0, groups, run_group, [jnp.zeros(R, jnp.int32), zeros, zeros, zeros])
    return tuple(x.reshape(N, Q) for x in results)


def group_size(R: int) -> int:
    """How many of a device's R positions go through the head together: a quarter, where that many keep the device busy,
    for every group reads the whole head."""
    least = 8 if target_platform() == "cpu" else 512
    return R if R < 4 * least else -(-R // 4)


def _draw(width, vocabulary, use_noise, use_entropy, split: Split, kernel, banned, positions: _Positions):
    """(ids, logprobs, allowed_logprobs, entropy), each [R]."""
    R, V = len(positions.number), kernel.shape[1]
    hidden, words = positions.hidden, positions.words
    first = split.first_id(V)
    greedy = (positions.temperature == 0)[:, None]
    temperature = jnp.where(greedy, 1.0, positions.temperature[:, None])

    def step(carry, start, width):
        # Of the scores the highest (lowest id first) and the logit there. Of all logits, and of those not banned: the
        # highest m and sum exp(x - m); of the latter sum exp(x - m) (x - m) too.
        (best, best_id, chosen), everything, allowed = carry
        logits = dot("re,ev->rv", hidden, read(split, kernel, start, width, hidden.dtype)) / temperature
        columns = start + jnp.arange(width)
        everything = _accumulate(everything, logits, False)
        kept = jnp.where(jax.lax.dynamic_slice_in_dim(banned, start, width), LOWEST, logits)
        allowed = _accumulate(allowed, kept, use_entropy)
        scores = kept
        if use_noise:
            counter = positions.number[:, None] * jnp.uint32(vocabulary) + (first + columns).astype(jnp.uint32)
            scores += jnp.where(greedy, 0.0, gumbel_at(words[:, None], counter))
        top = jnp.argmax(scores, axis=-1)
        here = jnp.take_along_axis(scores, top[..., None], axis=-1)[..., 0]
        better = here > best
        best_id = jnp.where(better, first + columns[top], best_id)
        chosen = jnp.where(better, jnp.take_along_axis(logits, top[..., None], axis=-1)[..., 0], chosen)
        return (jnp.maximum(best, here), best_id, chosen), everything, allowed

    zeros = jnp.zeros(R, jnp.float32)
    nothing = (zeros + LOWEST, zeros, zeros)
    start = ((zeros - jnp.inf, jnp.zeros(R, jnp.int32), zeros), nothing, nothing)
    (best, best_id, chosen), everything, allowed = fold(step, start, V, min(width or window_width(R, V), V))
    best_id = jnp.where(best == split.highest(best), best_id, vocabulary)
    winner = split.lowest(best_id)
    chosen = split.sum(jnp.where(best_id == winner, chosen, 0.0))
    whole, _ = _finish(split, everything)
    allowed_whole, entropy = _finish(split, allowed)
    return winner, chosen - whole, chosen - allowed_whole, entropy if use_entropy else zeros


def _accumulate(carry, x: jax.Array, use_moment: bool):
    peak, total, moment = carry
    higher = jnp.maximum(peak, jnp.max(x, axis=-1))
    total, moment = rebase(total, moment, peak - higher)
    below = x - higher[..., None]
    weights = jnp.exp(below)
    if use_moment:
        moment += jnp.sum(weights * below, axis=-1)
    return higher, total + jnp.sum(weights, axis=-1), moment


def _finish(split: Split, carry) -> tuple[jax.Array, jax.Array]:
    """(log-sum-exp, entropy) over all devices."""
    peak, total, moment = carry
    highest = split.highest(peak)
    total, moment = (split.sum(x) for x in rebase(total, moment, peak - highest))
    log_total = jnp.log(total)
    return highest + log_total, log_total - moment / total
