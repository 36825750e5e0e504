"""The head of a language model without [tokens, vocabulary] memory: log-probabilities for losses, and draws."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tracerl_jax.kernels.dispatch import select
from tracerl_jax.kernels.logprob.chunked import chunked_token_logprobs
from tracerl_jax.kernels.logprob.columns import check_mesh
from tracerl_jax.kernels.logprob.draws import Draws, chunked_sample_tokens
from tracerl_jax.kernels.logprob.reference import reference_sample_tokens, reference_token_logprobs

LOGPROB_IMPLEMENTATIONS = {"reference": reference_token_logprobs, "chunked": chunked_token_logprobs}
SAMPLE_IMPLEMENTATIONS = {"reference": reference_sample_tokens, "chunked": chunked_sample_tokens}


def token_logprobs(
    hidden: jax.Array,  # [P, E]
    kernel: jax.Array,  # [E, V]
    targets: jax.Array,  # [P] int
    *,
    temperature: jax.Array | float = 1.0,  # scalar or [P]
    mesh: Mesh | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:  # [P] f32, [P] f32
    """(log p[target], entropy in nats) of p = softmax(hidden @ kernel / temperature), logits and softmax in fp32.

    The product is taken in hidden's dtype. Differentiable in hidden and kernel through both outputs (gradients in their
    dtypes); temperature is a constant and must be positive. Targets must lie in [0, V).

    `mesh` (axes data, fsdp, tensor): rows are split over data and fsdp, the kernel [E, V] over (fsdp, tensor); the
    vocabulary is not gathered, and the gradient of hidden is summed over tensor once.
    `implementation`: "reference" (holds [P, V]), "chunked" (windows of the vocabulary) or None: "chunked", which is a
    single window where [P, V] is small. Raises ValueError for an unknown name, for shapes and dtypes that do not fit,
    and for sizes that the mesh does not divide.
    """
    op = "token_logprobs"
    if hidden.ndim != 2 or kernel.ndim != 2 or hidden.shape[1] != kernel.shape[0] or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"{op}: hidden {hidden.shape}, kernel {kernel.shape}, targets {targets.shape} are not [P,E], [E,V], [P]"
        )
    _check_dtypes(op, hidden, kernel)
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(f"{op}: targets are {targets.dtype}, not integers")
    temperature = jax.lax.stop_gradient(jnp.asarray(temperature, jnp.float32))
    if temperature.shape not in ((), targets.shape):
        raise ValueError(f"{op}: temperature {temperature.shape} is neither a scalar nor {targets.shape}")
    check_mesh(op, mesh, len(hidden), kernel)
    temperature = jnp.broadcast_to(temperature, targets.shape)
    run = select(op, LOGPROB_IMPLEMENTATIONS, implementation or "chunked")
    return run(hidden, kernel, targets, temperature, mesh=mesh)


def sample_tokens(
    hidden: jax.Array,  # [N, Q, E]
    kernel: jax.Array,  # [E, V]
    keys: jax.Array | None,  # [N] threefry keys; None: no row samples
    banned: jax.Array,  # [V] bool, at least one id allowed
    temperature: jax.Array,  # [N] f32, 0 = greedy
    wanted: jax.Array | None = None,  # [N, Q] bool; None: all
    *,
    use_entropy: bool = True,
    mesh: Mesh | None = None,
    implementation: str | None = None,
) -> Draws:  # of [N, Q]
    """One id for every position from softmax(hidden @ kernel / temperature) without the banned ids, by Gumbel-max.

    A greedy row takes the argmax (ties: lowest id) and its probabilities are those of temperature 1. The noise is
    `jax.random.gumbel(keys[n], (Q, V))`, made where it is needed: neither windows nor a mesh change what is drawn.
    Logits and softmax in fp32, the product in hidden's dtype; without `use_entropy` the entropies are zeros. Positions
    that are not `wanted` cost no products where enough others do; what is drawn there means nothing.

    `mesh` and `implementation` as for `token_logprobs`; raises ValueError likewise.
    """
    op = "sample_tokens"
    if hidden.ndim != 3 or kernel.ndim != 2 or hidden.shape[2] != kernel.shape[0]:
        raise ValueError(f"{op}: hidden {hidden.shape}, kernel {kernel.shape} are not [N,Q,E], [E,V]")
    _check_dtypes(op, hidden, kernel)
    rows = hidden.shape[:1]
    if (banned.shape, banned.dtype) != (kernel.shape[1:], jnp.bool_):
        raise ValueError(f"{op}: banned is {banned.dtype} {banned.shape}, not bool {kernel.shape[1:]}")
    if temperature.shape != rows:
        raise ValueError(f"{op}: temperature {temperature.shape} is not {rows}, one for every row")
    if wanted is not None and (wanted.shape, wanted.dtype) != (hidden.shape[:2], jnp.bool_):
        raise ValueError(f"{op}: wanted is {wanted.dtype} {wanted.shape}, not bool {hidden.shape[:2]}")
    if keys is not None and (keys.shape != rows or str(jax.random.key_impl(keys)) != "threefry2x32"):
        raise ValueError(f"{op}: keys are {keys.dtype} {keys.shape}, not threefry2x32 keys {rows}")
    check_mesh(op, mesh, len(hidden), kernel)
    run = select(op, SAMPLE_IMPLEMENTATIONS, implementation or "chunked")
    return run(hidden, kernel, keys, banned, temperature, wanted, use_entropy=use_entropy, mesh=mesh)


def _check_dtypes(op: str, hidden: jax.Array, kernel: jax.Array) -> None:
    for name, array in (("hidden", hidden), ("kernel", kernel)):
        if array.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            raise ValueError(f"{op}: {name} is {array.dtype}; use float32, bfloat16 or float16")
