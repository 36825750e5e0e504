"""What each published checkpoint family calls things: keys of `config.json`, tensor names, special ids, chat template.

A family is one entry of FAMILIES: nothing else in this package knows them apart. Sources: the published `config.json`
files and model code of SDAR, Dream and DiffuCoder (one model code), LLaDA and MMaDA.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tracerl_jax.errors import CheckpointError
from tracerl_jax.interop.names import LLAMA_TENSORS, OLMO_TENSORS, Tensors
from tracerl_jax.models import ModelConfig

REQUIRED = object()


@dataclass(frozen=True)
class Key:
    """A field of `ModelConfig` as a key of `config.json`."""

    name: str
    default: Any = REQUIRED  # of their configuration class
    ours: Mapping[Any, Any] | None = None  # their values -> ours, where they differ

    def read(self, value: Any) -> Any:
        """Ours of their value. Raises KeyError for one that has no meaning to us."""
        return value if self.ours is None else self.ours[value]

    def write(self, value: Any) -> Any:
        return value if self.ours is None else {ours: theirs for theirs, ours in self.ours.items()}[value]


@dataclass(frozen=True)
class Only:
    """A key of which one meaning is supported."""

    accepted: tuple[Any, ...]  # the first is written to a new config
    default: Any  # of their configuration class
    why: str


@dataclass(frozen=True)
class Family:
    """One published model code."""

    name: str  # `ModelConfig.family`
    model_type: str  # of config.json, compared without case
    architecture: str
    tensors: Tensors
    keys: Mapping[str, Key]  # by field of ModelConfig
    only: Mapping[str, Only]
    mask_token_id: int  # of the published checkpoints, whose config may not say it
    fixed: Mapping[str, Any] = field(default_factory=dict)  # fields that the model code has built in
    defaults: Mapping[str, Any] = field(default_factory=dict)  # fields the config does not say, free to be overridden
    same: Mapping[str, str] = field(default_factory=dict)  # further keys that repeat a field of ModelConfig
    new: Mapping[str, Any | Callable[[ModelConfig], Any]] = field(default_factory=dict)  # only in a new config
    turn_end_id: int | None = None  # of the published checkpoints: ends a reply, but is not in their eos_token_id
    chat_template: str | None = None
    chat_tokens: tuple[str, ...] = ()  # that the template writes


_SAME_POSITION = {"logit_alignment": "same_position"}
_FULL = {"attention_mode": "full", "qk_norm": False, "out_bias": False}
_DEFAULT_BLOCK = {"block_size": 32}  # of semi-autoregressive decoding: the models themselves know no blocks

_LLAMA_KEYS = {
    "vocab_size": Key("vocab_size"),
    "width": Key("hidden_size"),
    "mlp_width": Key("intermediate_size"),
    "num_layers": Key("num_hidden_layers"),
    "num_heads": Key("num_attention_heads"),
    "num_kv_heads": Key("num_key_value_heads", None),  # null: as many as heads
    "max_positions": Key("max_position_embeddings", 32768),
    "norm_eps": Key("rms_norm_eps", 1e-6),
    "rope_theta": Key("rope_theta", 10000.0),
    "tie_embeddings": Key("tie_word_embeddings", False),
    "initializer_range": Key("initializer_range", 0.02),
}
_LLAMA_ONLY = {"hidden_act": Only(("silu",), "silu", "only silu")}
_SDAR_KEYS = _LLAMA_KEYS | {
    "head_dim": Key("head_dim", 128),
    "qkv_bias": Key("attention_bias", False),
    "out_bias": Key("attention_bias", False),
    "block_size": Key("block_size", 4),
}
_SDAR: dict[str, Any] = {
    "tensors": LLAMA_TENSORS,
    "mask_token_id": 151669,
    "fixed": {"attention_mode": "block_causal", "qk_norm": True} | _SAME_POSITION,
    "new": {"rope_scaling": None, "fuse_cross_entropy": False},  # the published code reads them
}

_OLMO_KEYS = {
    "vocab_size": Key("vocab_size"),
    "width": Key("d_model"),
    "mlp_width": Key("mlp_hidden_size"),
    "num_layers": Key("n_layers"),
    "num_heads": Key("n_heads"),
    "num_kv_heads": Key("n_kv_heads", None),
    "max_positions": Key("max_sequence_length"),
    "norm_eps": Key("rms_norm_eps", 1e-5),
    "rope_theta": Key("rope_theta"),
    "rope_dtype": Key("rope_full_precision", True, {True: "float32", False: "compute"}),
    "qkv_bias": Key("include_qkv_bias", False),
    "tie_embeddings": Key("weight_tying"),
    "initializer_range": Key("init_std", 0.02),
}
_OLMO_ONLY = {
    "block_type": Only(("llama",), "sequential", "only llama"),
    "activation_type": Only(("silu",), "swiglu", "only silu"),
    "layer_norm_type": Only(("rms",), "default", "only rms"),
    "layer_norm_with_affine": Only((True,), True, "norms must have weights"),
    "bias_for_layer_norm": Only((False, None), None, "norms must have no bias"),
    "include_bias": Only((False,), True, "projections must have no bias"),
    "rope": Only((True,), False, "positions must be rotary"),
    "alibi": Only((False,), False, "positions must be rotary"),
    "attention_layer_norm": Only((False,), False, "no norm of queries and keys"),
    "input_emb_norm": Only((False,), False, "no norm of embeddings"),
    "scale_logits": Only((False,), False, "logits must not be scaled"),
    "multi_query_attention": Only((None, False), None, "set n_kv_heads instead"),
    "block_group_size": Only((1,), 1, "only 1"),
}
_LLADA: dict[str, Any] = {
    "tensors": OLMO_TENSORS,
    "mask_token_id": 126336,
    "turn_end_id": 126348,
    "fixed": _FULL | _SAME_POSITION,
    "defaults": _DEFAULT_BLOCK,
    # As published; the TraceRL paper's prompt has other newlines and a second <|startoftext|>.
    "chat_template": (
        "{% for message in messages %}{% if loop.first %}<|startoftext|>{% endif %}"
        "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "chat_tokens": ("<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("sdar", "sdar", "SDARForCausalLM", keys=_SDAR_KEYS, only=_LLAMA_ONLY, **_SDAR),
        Family(
            "sdar_moe", "sdar_moe", "SDARMoeForCausalLM", **_SDAR,
            keys=_SDAR_KEYS | {
                "num_experts": Key("num_experts"),
                "experts_per_token": Key("num_experts_per_tok"),
                "expert_width": Key("moe_intermediate_size"),
            },
            only=_LLAMA_ONLY | {
                "decoder_sparse_step": Only((1,), 1, "every layer must be a mixture of experts (1)"),
                "mlp_only_layers": Only(([], None), [], "every layer must be a mixture of experts ([])"),
                "shared_expert_intermediate_size": Only((None, 0), None, "no shared expert"),
            },
        ),
        Family(
            "dream", "Dream", "DreamModel", LLAMA_TENSORS, keys=_LLAMA_KEYS, only=_LLAMA_ONLY, mask_token_id=151666,
            fixed=_FULL | {"logit_alignment": "shifted", "qkv_bias": True},
            # Its code rounds the rotary tables to the activations' dtype and rotates in it.
            defaults=_DEFAULT_BLOCK | {"rope_dtype": "compute"},
            new={"rope_scaling": None, "attention_dropout": 0.0},
            turn_end_id=151645,
            chat_template=(
                "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
                "{% endif %}{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
                "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
            ),
            chat_tokens=("<|im_start|>", "<|im_end|>"),
        ),
        Family(
            "llada", "llada", "LLaDAModelLM", keys=_OLMO_KEYS, same={"embedding_size": "vocab_size"}, **_LLADA,
            only=_OLMO_ONLY | {"llm_vocab_size": Only((None,), None, "a key of MMaDA: set model_type to mmada")},
        ),
        Family(
            "mmada", "mmada", "MMadaModelLM", **_LLADA,
            keys=_OLMO_KEYS | {"text_vocab_size": Key("llm_vocab_size")}, only=_OLMO_ONLY,
            same={"embedding_size": "vocab_size", "new_vocab_size": "vocab_size"},
            new={
                "codebook_size": lambda c: c.vocab_size - c.text_vocab_size,
                "num_vq_tokens": 1024, "num_new_special_tokens": 0,
            },
        ),
    )
}  # fmt: skip


def family_of(config: Mapping[str, Any], source: str) -> Family:
    """The family of a `config.json`. Raises CheckpointError for a model_type that is none."""
    model_type = str(config.get("model_type", ""))
    for family in FAMILIES.values():
        if family.model_type.lower() == model_type.lower():
            return family
    known = ", ".join(family.model_type for family in FAMILIES.values())
    start = ""
    if model_type == "qwen2":
        start = (
            "; to start a diffusion model from this autoregressive one, copy the folder, set model_type to Dream and "
            "mask_token_id to an id no text uses, and train it with sft.method=ar or random_masking"
        )
    raise CheckpointError(f"{source}: model_type {model_type!r} is not supported; it must be one of {known}{start}")


def check_flags(model_config: ModelConfig, source: str) -> None:
    """Raises CheckpointError for a config that no checkpoint of its family can have: read with another family's flags,
    it would run and say nonsense."""
    family = FAMILIES.get(model_config.family)
    if family is None:
        raise CheckpointError(
            f"{source}: family {model_config.family!r} is not known; it must be one of {', '.join(FAMILIES)}"
        )
    for name, value in family.fixed.items():
        if getattr(model_config, name) != value:
            raise CheckpointError(
                f"{source}: {name} = {getattr(model_config, name)!r} does not go with model_type {family.model_type}, "
                f"whose code has {name} = {value!r}; keep that, or take the config of the checkpoint's own family"
            )
    if "head_dim" not in family.keys and model_config.head_dim * model_config.num_heads != model_config.width:
        raise CheckpointError(
            f"{source}: width {model_config.width} is not num_heads * head_dim ({model_config.num_heads} * "
            f"{model_config.head_dim}), as model_type {family.model_type} needs it"
        )


def others_with_keys(config: Mapping[str, Any], family: Family) -> list[str]:
    """model_types of the other families whose required keys are all there."""
    return [
        other.model_type
        for other in FAMILIES.values()
        if other is not family
        and all(key.name in config for key in other.keys.values() if key.default is REQUIRED)
    ]  # fmt: skip


def others_with_tensors(names: Iterable[str], family: Family) -> list[str]:
    """model_types of the other families to whose code the first layer's tensor names belong."""
    names = set(names)
    found = []
    for other in FAMILIES.values():
        layer = ((path, pattern.format(0, 0)) for path, (pattern, _) in other.tensors.items() if "{0}" in pattern)
        there = {path for path, name in layer if name in names}
        fits = (
            "layers/attention/q_proj/kernel" in there
            and ("layers/attention/q_norm/scale" in there) == other.fixed["qk_norm"]
            and ("layers/attention/q_proj/bias" in there or not other.fixed.get("qkv_bias"))
            and ("layers/moe/gate_proj" in there) == ("num_experts" in other.keys)
        )
        if other is not family and fits:
            found.append(other.model_type)
    return found
