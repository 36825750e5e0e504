"""Log-probabilities and entropies in one pass over windows of the vocabulary, with their own gradient."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from tracerl_jax.kernels.logprob.columns import LOWEST, Split, dot, fold, per_device, read, rebase, window_width

_ROWS, _HIDDEN, _KERNEL = ("batch",), ("batch", None), ("embed", "vocab")


def chunked_token_logprobs(
    hidden: jax.Array,  # [P, E]
    kernel: jax.Array,  # [E, V]
    targets: jax.Array,  # [P]
    temperature: jax.Array,  # [P] f32
    *,
    mesh: Mesh | None = None,
    width: int | None = None,
) -> tuple[jax.Array, jax.Array]:  # [P] f32, [P] f32
    """See `token_logprobs`. `width`: vocabulary columns of a window, for tuning and tests."""
    return _token_logprobs(mesh, width, hidden, kernel, targets, temperature)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _token_logprobs(mesh, width, hidden, kernel, targets, temperature):
    return _forward(mesh, width, hidden, kernel, targets, temperature)[0]


def _forward(mesh, width, hidden, kernel, targets, temperature):
    run = per_device(partial(_local_forward, width), mesh, (_HIDDEN, _KERNEL, _ROWS, _ROWS), (_ROWS,) * 3)
    logprob, entropy, log_normaliser = run(hidden, kernel, targets, temperature)
    return (logprob, entropy), (hidden, kernel, targets, temperature, log_normaliser, entropy)


def _backward(mesh, width, residuals, cotangents):
    operands = (_HIDDEN, _KERNEL) + (_ROWS,) * 6
    run = per_device(partial(_local_backward, width), mesh, operands, (_HIDDEN, _KERNEL))
    return *run(*residuals, *cotangents), None, None


_token_logprobs.defvjp(_forward, _backward)


def _local_forward(width: int | None, split: Split, hidden, kernel, targets, temperature):
    """This device's rows against its columns -> (logprob, entropy, log-sum-exp of the logits), each [P] f32."""
    P, V = hidden.shape[0], kernel.shape[1]
    mine = targets - split.first_id(V)

    def step(carry, start, width):
        # The highest logit m, sum exp(x - m), sum exp(x - m) (x - m), and the target's logit once it was met.
        peak, total, moment, target = carry
        logits = dot("pe,ev->pv", hidden, read(split, kernel, start, width, hidden.dtype)) / temperature[:, None]
        ids = start + jnp.arange(width)
        target += jnp.sum(jnp.where(ids == mine[:, None], logits, 0.0), axis=-1)
        higher = jnp.maximum(peak, jnp.max(logits, axis=-1))
        total, moment = rebase(total, moment, peak - higher)
        below = logits - higher[:, None]
        weights = jnp.exp(below)
        return higher, total + jnp.sum(weights, axis=-1), moment + jnp.sum(weights * below, axis=-1), target

    zeros = jnp.zeros(P, jnp.float32)
    start = (zeros + LOWEST, zeros, zeros, zeros)
    peak, total, moment, target = fold(step, start, V, min(width or window_width(P, V), V))
    highest = split.highest(peak)
    total, moment, target = (split.sum(x) for x in (*rebase(total, moment, peak - highest), target))
    log_total = jnp.log(total)
    return target - highest - log_total, log_total - moment / total, highest + log_total


def _local_backward(width: int | None, split: Split, hidden, kernel, targets, temperature, log_normaliser, entropy,
                    d_logprob, d_entropy):  # fmt: skip
    """Gradients of this device's rows [P, E] and of its part of the kernel."""
    P, V = hidden.shape[0], kernel.shape[1]
    column = (x[:, None] for x in (targets - split.first_id(V), temperature, log_normaliser, entropy, d_logprob,
                                   d_entropy))  # fmt: skip
    mine, temperature, log_normaliser, entropy, d_logprob, d_entropy = column

    def step(carry, start, width):
        d_hidden, d_kernel = carry
        columns = read(split, kernel, start, width, hidden.dtype)
        logprobs = dot("pe,ev->pv", hidden, columns) / temperature - log_normaliser
        # d logp[target] / d logit = onehot - p;  d H / d logit = -p (log p + H)
        hit = start + jnp.arange(width) == mine
        d_logits = d_logprob * hit - jnp.exp(logprobs) * (d_logprob + d_entropy * (logprobs + entropy))
        d_logits = (d_logits / temperature).astype(hidden.dtype)
        d_hidden += dot("pv,ev->pe", d_logits, columns)
        d_columns = split.scatter(dot("pe,pv->ev", hidden, d_logits)).astype(kernel.dtype)
        return d_hidden, lax.dynamic_update_slice_in_dim(d_kernel, d_columns, start, axis=1)

    zeros = (jnp.zeros(hidden.shape, jnp.float32), jnp.zeros(kernel.shape, kernel.dtype))
    d_hidden, d_kernel = fold(step, zeros, V, min(width or window_width(P, V), V))
    return split.sum(d_hidden).astype(hidden.dtype), d_kernel
