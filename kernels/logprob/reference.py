"""Dense log-probabilities, entropies and draws: the oracle."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tracerl_jax.kernels.logprob.draws import Draws


def reference_token_logprobs(
    hidden: jax.Array,  # [P, E]
    kernel: jax.Array,  # [E, V]
    targets: jax.Array,  # [P]
    temperature: jax.Array,  # [P] f32
    *,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array]:  # [P] f32, [P] f32
    """See `token_logprobs`. Holds [P, V] logits; the compiler decides what a mesh does to them."""
    logits = jnp.dot(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32) / temperature[:, None]
    logprobs = jax.nn.log_softmax(logits)
    return _at(logprobs, targets), _entropy(logprobs)


def reference_sample_tokens(
    hidden: jax.Array,  # [N, Q, E]
    kernel: jax.Array,  # [E, V]
    keys: jax.Array | None,  # [N]
    banned: jax.Array,  # [V] bool
    temperature: jax.Array,  # [N] f32
    wanted: jax.Array | None = None,
    *,
    use_entropy: bool,
    mesh: Mesh | None = None,
) -> Draws:
    """See `sample_tokens`. Holds [N, Q, V] logits and noise; the compiler decides what a mesh does to them."""
    greedy = (temperature == 0)[:, None, None]
    logits = jnp.dot(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
    logits /= jnp.where(greedy, 1.0, temperature[:, None, None])
    allowed = jnp.where(banned, -jnp.inf, logits)
    scores = allowed
    if keys is not None:
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32))(keys)
        scores += jnp.where(greedy, 0.0, noise)
    ids = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    logprobs, allowed_logprobs = jax.nn.log_softmax(logits), jax.nn.log_softmax(allowed)
    entropy = _entropy(allowed_logprobs) if use_entropy else jnp.zeros(ids.shape, jnp.float32)
    return Draws(ids, _at(logprobs, ids), _at(allowed_logprobs, ids), entropy)


def _at(values: jax.Array, ids: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values, ids[..., None], axis=-1)[..., 0]


def _entropy(logprobs: jax.Array) -> jax.Array:
    return -jnp.sum(jnp.where(logprobs > -jnp.inf, jnp.exp(logprobs) * logprobs, 0.0), axis=-1)
