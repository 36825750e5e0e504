"""Runs programs that nobody has read: each in a process tree, file system and network of its own (docs/sandbox.md)."""

from tracerl_jax.rewards.sandbox.pool import Job, Reply, Sandbox

__all__ = ["Job", "Reply", "Sandbox"]
