"""Rewards of how a text looks. They vary on any model's output, so a run can be tried before it has a capable model."""

from collections.abc import Sequence

from tracerl_jax.rewards.registry import register_reward


@register_reward("ascii_share")
def ascii_share(prompts: Sequence[str], completions: Sequence[str], **columns) -> list[float]:
    """Share of a completion's characters that are ASCII; 0 for an empty one."""
    return [sum(c.isascii() for c in text) / max(1, len(text)) for text in completions]
