"""Hugging Face `config.json` of the families of `families.py` to `ModelConfig` and back."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tracerl_jax.errors import CheckpointError, ConfigError
from tracerl_jax.interop.families import FAMILIES, REQUIRED, Family, Key, check_flags, family_of, others_with_keys
from tracerl_jax.interop.folders import read_json
from tracerl_jax.interop.tokenizer import load_tokenizer, mask_token_id
from tracerl_jax.models import ModelConfig

_ID_KEYS = ("eos_token_id", "pad_token_id")  # the same in both


def read_model_config(folder: str | os.PathLike, **overrides: Any) -> ModelConfig:
    """`ModelConfig` of a model folder; stop ids also from `generation_config.json`, mask id also from the tokenizer.

    Raises:
        CheckpointError: not a model folder, another architecture, an unsupported feature, or no mask id.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: not a folder; give a Hugging Face model folder (with config.json); a model of the hub is "
            "fetched first: hf download OWNER/NAME --local-dir NAME"
        )
    path = folder / "config.json"
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such file; give a Hugging Face model folder, or convert a run folder first (tracerl convert)"
        )
    config = read_json(path)
    if "model_type" not in config and (folder / "checkpoints").is_dir():
        raise CheckpointError(
            f"{folder}: a run folder, not a model folder; give {folder / 'hf'} (written when the run ends), or convert "
            f"a checkpoint of it (tracerl convert --from {folder} --to DIR)"
        )
    generation_path = folder / "generation_config.json"
    generation = read_json(generation_path) if generation_path.exists() else {}
    if config.get("mask_token_id") is None and "mask_token_id" not in overrides:
        tokenizer = load_tokenizer(folder)
        config["mask_token_id"] = None if tokenizer is None else mask_token_id(tokenizer)
    return model_config_from_hf(config, generation=generation, source=str(path), **overrides)


def model_config_from_hf(
    config: Mapping[str, Any], *, generation: Mapping[str, Any] | None = None, source: str = "config.json",
    **overrides: Any,
) -> ModelConfig:  # fmt: skip
    """`ModelConfig` of the contents of a `config.json`.

    Special ids: the mask id is the config's, or the family's when the vocabulary is large enough for it. The end id is
    the first of `eos_token_id`; stop ids are all end ids of the config and of `generation`, and the id that ends a turn
    in published checkpoints. The pad id is the config's, else the generation config's, else the end id.

    Args:
        config: contents of `config.json`; `model_type` selects the family.
        generation: contents of `generation_config.json`.
        source: file name for messages.
        overrides: fields of `ModelConfig` to set to something else.

    Raises:
        CheckpointError: the model cannot be represented, or an override contradicts its family; names the key and the
            file.
    """
    family = family_of(config, source)
    fields: dict[str, Any] = {"family": family.name, **family.fixed, **family.defaults}
    fields |= {name: _value(config, key, family, source) for name, key in family.keys.items()}
    _refuse_unsupported(config, family, source)
    fields["rope_theta"] = _rope(config).get("rope_theta", fields["rope_theta"])
    if family.defaults.get("block_size") and "block_size" in config:  # not theirs, but where we write it
        fields["block_size"] = config["block_size"]
    if fields["num_kv_heads"] is None:
        fields["num_kv_heads"] = fields["num_heads"]
    if "head_dim" not in fields:
        fields["head_dim"], rest = divmod(fields["width"], fields["num_heads"])
        if rest:
            width, heads = (family.keys[name].name for name in ("width", "num_heads"))
            raise CheckpointError(
                f"{source}: {width} = {config[width]} is not a multiple of {heads} = {config[heads]}; correct one"
            )
    fields |= _special_ids(config, generation or {}, fields["vocab_size"], family)
    try:
        model_config = ModelConfig(**fields)
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from None
    model_config = model_config.replace(**overrides)
    check_flags(model_config, source)
    if model_config.mask_token_id is None:
        raise CheckpointError(
            f"{source}: no mask id: the file has no mask_token_id, there is no tokenizer with a mask "
            f"token and the vocabulary has no id {family.mask_token_id}; add mask_token_id to the file"
        )
    return model_config


def hf_config_from_model(model_config: ModelConfig, original: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Contents of a `config.json` for `model_config`.

    Every key of `original` is kept (remote code, options we do not read); only keys whose meaning differs from
    `model_config` are written. Without `original` a complete new config is made, without remote code.

    Raises:
        CheckpointError: the model has flags that its family's code cannot have.
    """
    c = model_config
    check_flags(c, "config.json")
    family = FAMILIES[c.family]
    if original is None:
        return _new_config(c, family)

    before = model_config_from_hf(original, mask_token_id=c.mask_token_id)
    changed = {name for name in (*family.keys, *_ID_KEYS, "block_size") if getattr(before, name) != getattr(c, name)}
    config = {**original, **_written(c, family, changed), "mask_token_id": c.mask_token_id}
    if "rope_theta" in changed and "rope_parameters" in config:
        config["rope_parameters"] = _rope(original) | {"rope_theta": c.rope_theta}
    return config


def _new_config(c: ModelConfig, family: Family) -> dict[str, Any]:
    implied = family.turn_end_id if c.mask_token_id == family.mask_token_id else None
    ends = [i for i in dict.fromkeys([c.eos_token_id, *c.stop_token_ids]) if i != implied]
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{key: only.accepted[0] for key, only in family.only.items() if only.accepted[0] is not None},
        **{key: value(c) if callable(value) else value for key, value in family.new.items()},
        **_written(c, family, {*family.keys, "block_size"}),
        "mask_token_id": c.mask_token_id,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": c.pad_token_id,
    }


def _written(c: ModelConfig, family: Family, names: set[str]) -> dict[str, Any]:
    """These fields under the keys of the family; ids and a block size it knows nothing of keep their names."""
    keys = {name: family.keys.get(name, Key(name)) for name in sorted(names)}
    written = {key.name: key.write(getattr(c, name)) for name, key in keys.items()}
    return written | {key: getattr(c, name) for key, name in family.same.items() if name in names}


def _refuse_unsupported(config: Mapping[str, Any], family: Family, source: str) -> None:
    def refuse(key: str, why: str) -> None:
        raise CheckpointError(f"{source}: {key} = {config.get(key)!r} is not supported: {why}")

    for key, only in family.only.items():
        if config.get(key, only.default) not in only.accepted:
            refuse(key, only.why)
    for key, name in family.same.items():
        if config.get(key) not in (None, config.get(family.keys[name].name)):
            refuse(key, f"it must be {family.keys[name].name}, {config.get(family.keys[name].name)!r}")
    scaling = config.get("rope_scaling")
    if scaling is not None and scaling.get("rope_type", scaling.get("type")) != "default":
        refuse("rope_scaling", "only null (plain rotary embedding)")
    if _rope(config).get("rope_type", "default") != "default":
        refuse("rope_parameters", "only rope_type default (plain rotary embedding)")


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The newer spelling of rope_theta and rope_scaling in one dict."""
    return dict(config.get("rope_parameters") or {})


def _value(config: Mapping[str, Any], key: Key, family: Family, source: str) -> Any:
    value = config.get(key.name, key.default)
    if value is not REQUIRED:
        try:
            return key.read(value)
        except KeyError:
            known = " or ".join(map(repr, key.ours))
            raise CheckpointError(f"{source}: {key.name} = {value!r} is not supported: only {known}") from None
    others = others_with_keys(config, family)
    remedy = f"its keys are those of model_type {' or '.join(others)}" if others else "add it, or fetch the file again"
    raise CheckpointError(
        f"{source}: the key {key.name} is missing, which model_type {config['model_type']} needs; {remedy}"
    )


def _special_ids(
    config: Mapping[str, Any], generation: Mapping[str, Any], vocab_size: int, family: Family
) -> dict[str, Any]:
    mask = config.get("mask_token_id")
    if mask is None and vocab_size > family.mask_token_id:
        mask = family.mask_token_id
    stops = _as_ids(config.get("eos_token_id")) + _as_ids(generation.get("eos_token_id"))
    eos = stops[0] if stops else None
    pads = (config.get("pad_token_id"), generation.get("pad_token_id"), eos)
    pad = next((pad for pad in pads if pad is not None), None)
    if mask == family.mask_token_id:  # the published vocabulary
        stops += _as_ids(family.turn_end_id)
    return {
        "mask_token_id": mask, "eos_token_id": eos, "stop_token_ids": tuple(dict.fromkeys(stops)), "pad_token_id": pad,
    }  # fmt: skip


def _as_ids(ids: int | list[int] | None) -> list[int]:
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)
