"""The head of a language model (log-probabilities, entropies, draws), without [tokens, vocabulary] memory."""

from tracerl_jax.kernels.logprob.api import sample_tokens, token_logprobs
from tracerl_jax.kernels.logprob.draws import Draws

__all__ = ["Draws", "sample_tokens", "token_logprobs"]
