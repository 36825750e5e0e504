"""Two-interval attention."""

from tracerl_jax.kernels.attention.api import attention

__all__ = ["attention"]
