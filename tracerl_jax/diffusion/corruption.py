"""Random masks of a response: supervised training (semi-AR), random masking and coupled RL."""

import numpy as np

from tracerl_jax.diffusion.grid import block_of


def draw_masks(
    rng: np.random.Generator, prompt_len: int, length: int, *, block_size: int, low: float, high: float
) -> tuple[np.ndarray, np.ndarray]:
    """Masks each block of a response with a ratio of its own, t ~ U(low, high).

    The published code draws every token with probability (low + high) / 2 instead, which never shows the model a nearly
    clean or nearly masked block.

    Returns:
        masked [r] bool, ratio [r] float32: the t of each token's block.
    """
    block = block_of(prompt_len + np.arange(length), block_size)
    block -= block_of(prompt_len, block_size)
    ratio = rng.uniform(low, high, size=int(block[-1]) + 1 if length else 0)[block]
    return rng.uniform(size=length) < ratio, ratio.astype(np.float32)


def sample_rng(*counters: int) -> np.random.Generator:
    """A generator that depends on its counters only: (seed, update, sample), say."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([c & 0xFFFFFFFF for c in counters])))
