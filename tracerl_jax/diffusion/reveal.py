"""Which proposals a denoise step reveals: every strategy is a rank and a count over the positions still masked.

    strategy           ranked by              count
    static             confidence, highest    n
    dynamic            confidence, highest    positions with confidence > threshold, at least n
    sequential         position, first        n
    entropy_bounded    entropy, lowest        leading positions whose entropies sum to less than the bound, at least 1

n = floor(B/S) + [s < B mod S] for step s of S inside the block (s counts from 0), at least 1. Only masked positions are
ranked and ties go to the lowest index, so nothing visible is ever drawn again and a count above the number of masked
positions takes all of them. (The reference re-draws visible positions there.)
"""

import jax
import jax.numpy as jnp

from tracerl_jax.errors import ConfigError

STRATEGIES = ("static", "dynamic", "sequential", "entropy_bounded")
STATIC, DYNAMIC, SEQUENTIAL, ENTROPY_BOUNDED = range(4)
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


def scheduled_count(step: jax.Array, denoising_steps: jax.Array, block_size: int) -> jax.Array:
    """Tokens the schedule reveals at `step` (from 0, inside the block) of `denoising_steps`; at least 1."""
    share, rest = jnp.divmod(block_size, denoising_steps)
    return jnp.maximum(share + (step < rest), 1)


def choose_reveals(
    masked: jax.Array,  # [N,B] bool
    confidence: jax.Array,  # [N,B] f32
    entropy: jax.Array,  # [N,B] f32
    strategy: jax.Array,  # [N] int32, index into STRATEGIES
    count: jax.Array,  # [N] int32, from `scheduled_count`
    threshold: jax.Array,  # [N] f32, dynamic only; strict
    entropy_bound: jax.Array,  # [N] f32, entropy_bounded only
) -> jax.Array:
    """[N,B] bool: the masked positions to reveal; at least one in every row that has any."""
    block_size = masked.shape[-1]
    strategy = strategy[:, None]
    index = jnp.arange(block_size)
    score = jnp.select([strategy == SEQUENTIAL, strategy == ENTROPY_BOUNDED], [-index, -entropy], confidence)
    ahead = _ahead(score)
    rank = jnp.sum(ahead & masked[:, None, :], axis=-1)  # [N,B]

    above = jnp.sum(masked & (confidence > threshold[:, None]), axis=-1)
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
