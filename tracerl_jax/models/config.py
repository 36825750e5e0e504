"""One description for every decoder this project trains; families differ in its values, not in classes."""

from __future__ import annotations

import dataclasses
from typing import Any

from tracerl_jax.errors import ConfigError

CHOICES = {
    "rope_dtype": ("float32", "compute"),
    "logit_alignment": ("same_position", "shifted"),
    "attention_mode": ("block_causal", "full", "causal"),
    "dtype": ("float32", "bfloat16"),
    "param_dtype": ("float32", "bfloat16"),
    "remat": ("none", "full", "dots"),
}
SIZES = ("vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_width", "block_size",
         "max_positions")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of a decoder, its special ids, and how to run it. Frozen and hashable.

    Raises:
      ConfigError: a value or combination cannot work; the message names field, value and remedy.
    """

    vocab_size: int  # V
    width: int  # E
    num_layers: int  # L
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # D, independent of width / num_heads
    mlp_width: int  # F of a dense MLP (ignored by MoE layers)
    family: str = "sdar"
    norm_eps: float = 1e-6
    rope_theta: float = 1e6
    rope_dtype: str = "float32"  # "compute": tables rounded to `dtype` and rotation done in it, as Dream does
    qk_norm: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    tie_embeddings: bool = False
    logit_alignment: str = "same_position"  # "shifted": the logits at position j predict the token at j + 1
    attention_mode: str = "block_causal"
    block_size: int = 4  # B; of a model with full attention: the default of decoding
    initializer_range: float = 0.02  # standard deviation of fresh kernels and embeddings
    max_positions: int = 32768
    mask_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    text_vocab_size: int | None = None  # rows of the vocabulary from here on are image codes (MMaDA); None: all is text
    num_experts: int = 0  # X; 0 = dense, otherwise every layer is a mixture of experts
    experts_per_token: int = 0
    expert_width: int = 0  # F of one expert

    # How to run it: none of these changes the parameters' names or shapes.
    dtype: str = "float32"  # compute; parameters are cast to it where they are used
    param_dtype: str = "float32"
    scan_layers: bool = True  # False: a Python loop over the layers, for debugging
    remat: str = "none"  # what the backward pass recomputes: nothing, whole layers, all but weight products ("dots")
    attention: str | None = None  # implementation of tracerl_jax.kernels.attention

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for name in SIZES:
            self._require(name, isinstance(getattr(self, name), int) and getattr(self, name) >= 1,
                          "give a positive integer")
        for name, choices in CHOICES.items():
            self._require(name, getattr(self, name) in choices, f"choose one of {', '.join(map(repr, choices))}")
        self._require("num_heads", self.num_heads % self.num_kv_heads == 0,
                      f"make it a multiple of num_kv_heads ({self.num_kv_heads})")
        self._require("head_dim", self.head_dim % 2 == 0, "make it even: rotary embedding turns pairs of channels")
        for name in ("norm_eps", "rope_theta"):
            self._require(name, getattr(self, name) > 0, "give a positive number")
        for name in ("mask_token_id", "eos_token_id", "pad_token_id"):
            self._require(name, self._is_id(getattr(self, name), optional=True), self._id_remedy())
        self._require("stop_token_ids", all(map(self._is_id, self.stop_token_ids)), self._id_remedy())
        self._require("text_vocab_size", self.text_vocab_size is None or 1 <= self.text_vocab_size <= self.vocab_size,
                      f"give a number from 1 to vocab_size ({self.vocab_size}), or None")
        self._require("logit_alignment", (self.logit_alignment, self.attention_mode) != ("shifted", "block_causal"),
                      "what is left of a block's first token may not see the block; use 'same_position', or "
                      "attention_mode 'full' or 'causal'")
        self._check_experts()

    def _check_experts(self) -> None:
        if self.num_experts:
            self._require("num_experts", self.num_experts > 0, "give the number of experts, or 0 for a dense model")
            self._require("experts_per_token", 1 <= self.experts_per_token <= self.num_experts,
                          f"give a number from 1 to num_experts ({self.num_experts})")
            self._require("expert_width", self.expert_width >= 1, "give the MLP width of one expert")
        else:
            for name in ("experts_per_token", "expert_width"):
                self._require(name, getattr(self, name) == 0, "set num_experts too, or leave it 0 for a dense model")

    def _is_id(self, token_id: int | None, optional: bool = False) -> bool:
        return optional if token_id is None else 0 <= token_id < self.vocab_size

    def _id_remedy(self) -> str:
        return f"give ids from 0 to vocab_size - 1 ({self.vocab_size - 1})"

    def _require(self, name: str, ok: bool, remedy: str) -> None:
        if not ok:
            raise ConfigError(f"model.{name} = {getattr(self, name)!r} cannot be used: {remedy}.")

    def replace(self, **changes: Any) -> ModelConfig:
        return dataclasses.replace(self, **changes)

    def num_params(self) -> int:
        """Number of parameters of the language model (a tied head counts once), all experts included."""
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = 2 * self.width * (q_width + kv_width)
        attention += self.qkv_bias * (q_width + 2 * kv_width) + self.out_bias * self.width
        attention += self.qk_norm * 2 * self.head_dim
        if self.num_experts:
            mlp = self.num_experts * (self.width + 3 * self.width * self.expert_width)
        else:
            mlp = 3 * self.width * self.mlp_width
        layer = attention + mlp + 2 * self.width
        embeddings = self.vocab_size * self.width * (1 if self.tie_embeddings else 2)
        return embeddings + self.num_layers * layer + self.width
