"""ModelConfig refuses what cannot work, and counts parameters."""

import math

import jax
import pytest

from tracerl_jax.errors import ConfigError
from tracerl_jax.models import PRESETS, Model

TINY = PRESETS["sdar_tiny"]


@pytest.mark.parametrize("changes, words", [
    ({"width": 0}, ["model.width = 0", "positive integer"]),
    ({"num_layers": 2.5}, ["model.num_layers = 2.5", "positive integer"]),
    ({"num_heads": 5}, ["model.num_heads = 5", "num_kv_heads (2)"]),
    ({"head_dim": 15}, ["model.head_dim = 15", "even"]),
    ({"norm_eps": 0.0}, ["model.norm_eps = 0.0", "positive"]),
    ({"remat": "some"}, ["model.remat = 'some'", "'none', 'full', 'dots'"]),
    ({"dtype": "float16"}, ["model.dtype = 'float16'", "'float32', 'bfloat16'"]),
    ({"mask_token_id": 384}, ["model.mask_token_id = 384", "vocab_size - 1 (383)"]),
    ({"stop_token_ids": (1, -1)}, ["model.stop_token_ids = (1, -1)", "383"]),
    ({"num_experts": 4, "expert_width": 8, "experts_per_token": 5}, ["model.experts_per_token = 5", "num_experts (4)"]),
    ({"num_experts": 4, "experts_per_token": 2}, ["model.expert_width = 0"]),
    ({"experts_per_token": 2}, ["model.experts_per_token = 2", "num_experts"]),
])
def test_unusable_values_name_field_value_and_remedy(changes, words):
    with pytest.raises(ConfigError) as error:
        TINY.replace(**changes)
    for word in words:
        assert word in str(error.value)


def test_config_is_hashable_with_stop_ids_given_as_a_list():
    config = TINY.replace(stop_token_ids=[1, 2])
    assert hash(config) == hash(TINY.replace(stop_token_ids=(1, 2)))


@pytest.mark.parametrize("name", PRESETS)
def test_num_params_counts_the_tree(name):
    config = PRESETS[name]
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(Model(config).abstract_params())]
    assert config.num_params() == sum(sizes)


@pytest.mark.parametrize("changes", [
    {"tie_embeddings": True}, {"qkv_bias": True, "out_bias": True, "qk_norm": False},
    {"num_experts": 4, "experts_per_token": 2, "expert_width": 24},
])
def test_num_params_follows_flags(changes):
    config = TINY.replace(**changes)
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(Model(config).abstract_params())]
    assert config.num_params() == sum(sizes)


def test_presets_have_published_sizes():
    billions = {name: config.num_params() / 1e9 for name, config in PRESETS.items()}
    assert 4.3 < billions["sdar_4b"] < 4.5  # 4.02 of Qwen3-4B plus the untied head
    assert 8.1 < billions["sdar_8b"] < 8.3
    assert 30 < billions["sdar_30b_a3b"] < 31
    assert 1e-3 < billions["sdar_demo"] < 3e-3
