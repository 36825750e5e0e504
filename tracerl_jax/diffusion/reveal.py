"""Which proposals a denoise step reveals: every strategy is a rank and a count over the positions still masked.

    strategy           ranked by          count
    static, linspace   score, highest     n
    dynamic            score, highest     positions with score > threshold, at least n
    sequential         position, first    n
    entropy_bounded    entropy, lowest    leading positions whose entropies sum to less than the bound, at least 1

    score              of a proposal, highest first
    confidence         its probability
    margin             its probability less that of the second most probable token
    entropy            minus the entropy of the distribution
    uncertainty        the entropy: the least certain first, as the reference's LLaDA sampler ranks by mistake

n is the step's entry of `schedule`. Only masked positions are ranked and ties go to the lowest index, so nothing
visible is ever drawn again and a count above the number of masked positions takes all of them. (The reference re-draws
visible positions there.)
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tracerl_jax.diffusion.sampling import Proposal
from tracerl_jax.errors import ConfigError

STRATEGIES = ("static", "dynamic", "sequential", "entropy_bounded", "linspace")
STATIC, DYNAMIC, SEQUENTIAL, ENTROPY_BOUNDED, LINSPACE = range(5)
SCORES = ("confidence", "margin", "entropy", "uncertainty")
CONFIDENCE, MARGIN, ENTROPY, UNCERTAINTY = range(4)
LONGEST_LINSPACE = 2**16  # steps
_REFERENCE_PREFIX = "low_confidence_"


def strategy_code(name: str) -> int:
    """Index into STRATEGIES; the reference's low_confidence_static and low_confidence_dynamic are accepted too."""
    short = str(name)
    if short in (_REFERENCE_PREFIX + "static", _REFERENCE_PREFIX + "dynamic"):
        short = short.removeprefix(_REFERENCE_PREFIX)
    if short not in STRATEGIES:
        raise ConfigError(
            f"strategy is {name!r}; use one of {', '.join(STRATEGIES)} "
            f"(or {_REFERENCE_PREFIX}static, {_REFERENCE_PREFIX}dynamic)"
        )
    return STRATEGIES.index(short)


@functools.lru_cache
def schedule(strategy: str, block_size: int, denoising_steps: int, first_token: bool = False) -> np.ndarray:
    """[B] int32: the tokens that each denoise step of a block reveals by plan, at least 1.

    static and all others: floor(B/S) + [s < B mod S] at step s of S. LLaDA's transfer schedule is the same.
    linspace: Dream's, floor(m (1 - t(s+1) / t(s))) of the m still masked, t from 1 to 0.001 in S steps (float32); the
    last step takes the rest. Steps of its plan that reveal nothing are left out: they would change nothing.
    first_token: step 0 reveals one token, and the plan is for the others.
    """
    plan = _linspace if strategy_code(strategy) == LINSPACE else _even
    counts = plan(block_size, denoising_steps, int(first_token))
    return np.array(counts + [1] * (block_size - len(counts)), np.int32)


def _even(block_size: int, steps: int, first: int) -> list[int]:
    share, rest = divmod(block_size - first, max(1, steps - first))
    shares = [max(1, share + (step < rest)) for step in range(block_size - first)]
    return [1] * first + shares


def _linspace(block_size: int, steps: int, first: int) -> list[int]:
    t = _torch_linspace(1.0, 1e-3, steps + 1)
    counts, masked, step = [1] * first, block_size - first, first
    while masked:
        share = np.float32(masked) * (1 - t[step + 1] / t[step]) if step < steps - 1 else masked
        if count := int(share):
            counts.append(count)
        masked, step = masked - count, step + 1
    return counts


def _torch_linspace(start: float, end: float, count: int) -> np.ndarray:
    """float32, rounded as torch.linspace rounds: from both ends to the middle."""
    start, end = np.float32(start), np.float32(end)
    stride, index = (end - start) / np.float32(count - 1), np.arange(count, dtype=np.float32)
    return np.where(index < count // 2, start + stride * index, end - stride * (count - 1 - index)).astype(np.float32)


def score_of(
    proposal: Proposal,  # [N,B]
    score: jax.Array,  # [N] int32, index into SCORES
    pad_id: int | None = None,
    pad_penalty: jax.Array | None = None,  # [N] f32, at least 1: how many times worse a proposal of `pad_id` counts
) -> jax.Array:
    """[N,B] f32, what `choose_reveals` ranks by; `proposal` must hold the margins and entropies asked for."""
    code = score[:, None]
    chosen = jnp.select(
        [code == MARGIN, code == ENTROPY, code == UNCERTAINTY],
        [proposal.margin, -proposal.entropy, proposal.entropy],
        proposal.confidence,
    )
    if pad_id is None:
        return chosen
    penalty = pad_penalty[:, None]
    lowered = jnp.where(chosen > 0, chosen / penalty, chosen * penalty)
    return jnp.where(proposal.ids == pad_id, lowered, chosen)


def choose_reveals(
    masked: jax.Array,  # [N,B] bool
    score: jax.Array,  # [N,B] f32, from `score_of`
    entropy: jax.Array,  # [N,B] f32
    strategy: jax.Array,  # [N] int32, index into STRATEGIES
    count: jax.Array,  # [N] int32, of this step, from `schedule`
    threshold: jax.Array,  # [N] f32, dynamic only; strict
    entropy_bound: jax.Array,  # [N] f32, entropy_bounded only
) -> jax.Array:
    """[N,B] bool: the masked positions to reveal; at least one in every row that has any."""
    block_size = masked.shape[-1]
    strategy = strategy[:, None]
    index = jnp.arange(block_size)
    order = jnp.select([strategy == SEQUENTIAL, strategy == ENTROPY_BOUNDED], [-index, -entropy], score)
    ahead = _ahead(order)
    rank = jnp.sum(ahead & masked[:, None, :], axis=-1)  # [N,B]

    above = jnp.sum(masked & (score > threshold[:, None]), axis=-1)
    upto = (ahead | jnp.eye(block_size, dtype=bool)) & masked[:, None, :]
    cumulative = jnp.sum(jnp.where(upto, entropy[:, None, :], 0.0), axis=-1)  # [N,B], in order of rank
    bounded = jnp.sum(masked & (cumulative < entropy_bound[:, None]), axis=-1)

    count = jnp.select(
        [strategy == DYNAMIC, strategy == ENTROPY_BOUNDED],
        [jnp.maximum(above, count)[:, None], jnp.maximum(bounded, 1)[:, None]],
        count[:, None],
    )
    return masked & (rank < count)


def _ahead(score: jax.Array) -> jax.Array:
    """[N,B,B] bool: entry (i, j) says that j comes before i, by higher score or by lower index at equal scores."""
    index = jnp.arange(score.shape[-1])
    higher = score[:, None, :] > score[:, :, None]
    equal = score[:, None, :] == score[:, :, None]
    return higher | (equal & (index[None, :] < index[:, None]))
