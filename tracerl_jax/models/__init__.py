"""Decoders: their description (`ModelConfig`, `PRESETS`) and the functional `Model` over plain parameter dicts."""

from tracerl_jax.models.config import ModelConfig
from tracerl_jax.models.decoder import KV, Model
from tracerl_jax.models.presets import PRESETS

__all__ = ["KV", "PRESETS", "Model", "ModelConfig"]
