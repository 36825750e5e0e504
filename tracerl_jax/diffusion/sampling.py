"""Proposing a token for every position of a block: bans, temperature, top-k, top-p, the draw and its probabilities.

The order is the one of the reference's sampler: temperature, then top-k, then top-p on what top-k left (or, as Dream's
sampler has it, on all tokens). Top-k and top-p sort logits [.., V]; where no row uses them, nor ranks by anything else
that needs all logits, the head is fused with the draw and no such array exists.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tracerl_jax.errors import ConfigError
from tracerl_jax.kernels.logprob import sample_tokens

# What probabilities a proposal is ranked by: those of the policy at the temperature without banned ids, those that
# top-k and top-p leave of them, or those of the model as they are, at temperature 1 with nothing banned.
CONFIDENCES = ("policy", "truncated", "untempered")
POLICY, TRUNCATED, UNTEMPERED = range(3)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Proposal:
    """What a denoise step proposes at every position of every row, before any of it is revealed."""

    ids: jax.Array  # [N,B] int32
    logprobs: jax.Array  # [N,B] f32, policy: full vocabulary, at the temperature, nothing banned or truncated
    behaviour_logprobs: jax.Array  # [N,B] f32, the distribution drawn from: after bans, top-k and top-p
    confidence: jax.Array  # [N,B] f32, probability of the id in the distribution that the row ranks by
    entropy: jax.Array  # [N,B] f32, of that distribution; zeros unless asked for
    margin: jax.Array  # [N,B] f32, its largest probability less the second; zeros unless asked for


def banned_ids(vocab_size: int, mask_id: int, valid_vocab: int | None = None) -> np.ndarray:
    """[V] bool: MASK and every id of at least `valid_vocab` (rows of the head no token belongs to)."""
    valid = vocab_size if valid_vocab is None else valid_vocab
    if not 0 < valid <= vocab_size:
        raise ConfigError(f"valid_vocab is {valid}; it must lie between 1 and the model's vocabulary {vocab_size}")
    banned = np.arange(vocab_size) >= valid
    banned[mask_id] = True
    return banned


def filter_logits(scaled: jax.Array, top_k: jax.Array, top_p: jax.Array, top_p_of_all: bool = False) -> jax.Array:
    """Set what top-k and top-p remove to -inf.

    scaled [.., V] logits after the temperature; top_k [..] int, 0 = off; top_p [..] in (0, 1], 1 = off.
    Top-k keeps every logit not below the k-th largest, so ties at that value all stay. Top-p goes through what is left
    from the largest down (equal values: lowest id first) and drops a token when the probability before it already
    exceeds p; the first one always stays. That probability is a share of what top-k left, or with `top_p_of_all` of
    all tokens.
    """
    vocab_size = scaled.shape[-1]
    top_k = jnp.where((top_k <= 0) | (top_k > vocab_size), vocab_size, top_k)[..., None]
    ordered = jnp.sort(scaled, axis=-1, descending=True)
    kth = jnp.take_along_axis(ordered, top_k - 1, axis=-1)
    everything, ordered = ordered, jnp.where(ordered >= kth, ordered, -jnp.inf)
    cumulative = jnp.cumsum(jax.nn.softmax(everything if top_p_of_all else ordered, axis=-1), axis=-1)
    before = jnp.pad(cumulative, [(0, 0)] * (scaled.ndim - 1) + [(1, 0)])[..., :-1]
    top_p = jnp.asarray(top_p)[..., None]
    prefix = (ordered > -jnp.inf) & ((before <= top_p) | (top_p >= 1))
    kept = jnp.sum(prefix, axis=-1, keepdims=True)
    last = jnp.take_along_axis(ordered, kept - 1, axis=-1)
    # Of the tokens that equal the last kept value, only so many (lowest ids first) belong to the prefix.
    equal = scaled == last
    room = kept - jnp.sum(scaled > last, axis=-1, keepdims=True)
    keep = (scaled > last) | (equal & (jnp.cumsum(equal, axis=-1) <= room))
    return jnp.where(keep, scaled, -jnp.inf)


def propose(
    hidden: jax.Array,  # [N,B,E]
    kernel: jax.Array,  # [E,V], the language-model head
    keys: jax.Array | None,  # [N] PRNG keys, one per row and denoise step; None when no row samples
    banned: jax.Array,  # [V] bool
    temperature: jax.Array,  # [N] f32, 0 = greedy
    top_k: jax.Array,  # [N] int32, 0 = off
    top_p: jax.Array,  # [N] f32, 1 = off
    ranked_by: jax.Array,  # [N] int32, index into CONFIDENCES
    wanted: jax.Array | None = None,  # [N,B] bool; elsewhere the proposal means nothing
    *,
    use_filters: bool,  # some row uses top-k or top-p, or is ranked by other probabilities than it is drawn from
    use_entropy: bool,
    use_margin: bool = False,  # without it and `use_filters` no [N,B,V] array is held
    top_p_of_all: bool = False,
    mesh: Mesh | None = None,
) -> Proposal:
    """Propose one id per position. The static flags save work and memory; they never change the result of a row.

    A greedy row takes the argmax after the bans (ties: lowest id); its probabilities are those of temperature 1, and
    its top-k and top-p are ignored unless it is ranked by what they leave. Every other row draws by Gumbel-max from the
    filtered distribution.

    Where the model's numbers are not finite the log-probs say so, and the id is the first that is not banned.
    """
    if use_filters or use_margin:
        logits = jnp.dot(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
        proposal = _propose_filtered(logits, keys, banned, temperature, top_k, top_p, ranked_by, use_entropy,
                                     use_margin, top_p_of_all)  # fmt: skip
    else:
        draws = sample_tokens(hidden, kernel, keys, banned, temperature, wanted, use_entropy=use_entropy, mesh=mesh)
        confidence = jnp.exp(draws.allowed_logprobs)
        proposal = Proposal(draws.ids, draws.logprobs, draws.allowed_logprobs, confidence, draws.entropy,
                            jnp.zeros_like(confidence))  # fmt: skip
    # A comparison with NaN can pick anything, and a block into which MASK is "revealed" would never be complete.
    ids = jnp.where(jnp.isfinite(proposal.logprobs), proposal.ids, jnp.argmin(banned).astype(jnp.int32))
    return replace(proposal, ids=ids)


def _propose_filtered(
    logits, keys, banned, temperature, top_k, top_p, ranked_by, use_entropy, use_margin, top_p_of_all
) -> Proposal:
    greedy, ranked_by = (temperature == 0)[:, None], ranked_by[:, None]  # [N,1], the leading axes of the logits
    off = greedy & (ranked_by != TRUNCATED)
    policy = logits / jnp.where(greedy, 1.0, temperature[:, None])[..., None]
    allowed = jnp.where(banned, -jnp.inf, policy)
    drawn_from = filter_logits(
        allowed, jnp.where(off, 0, top_k[:, None]), jnp.where(off, 1.0, top_p[:, None]), top_p_of_all
    )
    scores = drawn_from
    if keys is not None:
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32))(keys)
        scores = drawn_from + jnp.where(greedy[..., None], 0.0, noise)
    ids = jnp.argmax(scores, axis=-1)

    def logprob(values):  # log-softmax at `ids` without a [N,B,V] result
        chosen = jnp.take_along_axis(values, ids[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(values, axis=-1)

    behaviour = logprob(drawn_from)
    nothing = jnp.zeros_like(behaviour)
    code = ranked_by[..., None]
    ranking = jnp.select([code == TRUNCATED, code == UNTEMPERED], [drawn_from, logits], allowed)
    return Proposal(
        ids=ids.astype(jnp.int32),
        logprobs=logprob(policy),
        behaviour_logprobs=behaviour,
        confidence=jnp.exp(logprob(ranking)),
        entropy=entropy(ranking) if use_entropy else nothing,
        margin=_margin(ranking) if use_margin else nothing,
    )


def _margin(logits: jax.Array) -> jax.Array:
    first, second = jnp.moveaxis(jax.lax.top_k(jax.nn.softmax(logits, axis=-1), 2)[0], -1, 0)
    return first - second


def entropy(logits: jax.Array) -> jax.Array:
    """Entropy [..] in nats of softmax(logits [.., V]); -inf entries have probability 0."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.sum(jnp.where(logprobs > -jnp.inf, jnp.exp(logprobs) * logprobs, 0.0), axis=-1)
