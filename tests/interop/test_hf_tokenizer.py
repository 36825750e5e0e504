"""Tokenizers of model folders, among them one whose class is published as remote code only."""

import json

import pytest
from tokenizers import pre_tokenizers

from tracerl_jax.data.char_tokenizer import build_char_tokenizer
from tracerl_jax.errors import CheckpointError
from tracerl_jax.interop.tokenizer import decode, load_tokenizer, mask_token_id, render_chat, valid_vocab

ADDED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|MASK|>")
NOT_SPECIAL = ("<think>", "</think>")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}" + (
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_bpe(folder, **settings):
    """A byte-level vocabulary with one merge, in the files SDAR publishes: vocab.json, merges.txt and settings."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "he"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\nh e\n")
    added = {
        str(len(vocabulary) + i): {"content": token, "special": token not in NOT_SPECIAL, "lstrip": False,
                                   "rstrip": False, "normalized": False, "single_word": False}
        for i, token in enumerate(ADDED)
    }  # fmt: skip
    (folder / "added_tokens.json").write_text(json.dumps({added[i]["content"]: int(i) for i in added}))
    config = {"added_tokens_decoder": added, "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
              "chat_template": TEMPLATE, "model_max_length": 131072} | settings  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return vocabulary | {token: len(vocabulary) + i for i, token in enumerate(ADDED)}


REMOTE = {"tokenizer_class": "SDARTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_sdar.SDARTokenizer", None]}}


@pytest.fixture(
    params=[
        {"tokenizer_class": "Qwen2Tokenizer"},
        {"tokenizer_class": "SDARTokenizer"},
        REMOTE,
        REMOTE | {"tokenizer_class": "Qwen2Tokenizer"},
        {},
    ],
    ids=["qwen2", "unknown class", "remote code", "remote qwen2", "no class"],
)
def bpe(request, tmp_path):
    vocabulary = write_bpe(tmp_path, mask_token="<|MASK|>", **request.param)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "sdar"}))
    (tmp_path / "tokenization_sdar.py").write_text("raise RuntimeError('remote code was run')\n")
    return load_tokenizer(tmp_path), vocabulary


def test_ids_and_text(bpe):
    tokenizer, vocabulary = bpe
    assert valid_vocab(tokenizer, 10**6) == len(vocabulary)
    assert valid_vocab(tokenizer, 7) == valid_vocab(None, 7) == 7
    assert mask_token_id(tokenizer) == vocabulary["<|MASK|>"]
    assert tokenizer.eos_token_id == vocabulary["<|endoftext|>"]
    text = "hehe  1 ,2 .\n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids[:2] == [vocabulary["he"]] * 2
    assert decode(tokenizer, ids) == text  # also the spaces before punctuation


def test_decoding_keeps_markup_and_drops_control_tokens(bpe):
    tokenizer, vocabulary = bpe
    text = "<think>he </think>\n\n4<|im_end|><|endoftext|>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert vocabulary["</think>"] in ids and vocabulary["<|im_end|>"] in ids
    assert decode(tokenizer, [*ids, vocabulary["<|MASK|>"], len(tokenizer), 10**6]) == "<think>he </think>\n\n4"


def test_chat_template(bpe):
    tokenizer, _ = bpe
    messages = [{"role": "user", "content": "2+2?"}]
    prompt = "<|im_start|>user\n2+2?<|im_end|>\n"
    assert render_chat(tokenizer, messages) == prompt + "<|im_start|>assistant\n"
    assert render_chat(tokenizer, messages, add_generation_prompt=False) == prompt


def test_mask_token_that_is_not_declared(tmp_path):
    vocabulary = write_bpe(tmp_path, tokenizer_class="Qwen2Tokenizer")
    assert mask_token_id(load_tokenizer(tmp_path)) == vocabulary["<|MASK|>"]


def test_no_mask_token(tmp_path):
    build_char_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert mask_token_id(tokenizer) == 2
    tokenizer.mask_token = None
    tokenizer.get_vocab = lambda: {"a": 0}
    assert mask_token_id(tokenizer) is None


def test_folder_without_tokenizer(tmp_path):
    assert load_tokenizer(tmp_path) is None
    (tmp_path / "config.json").write_text("{}")
    assert load_tokenizer(tmp_path) is None


def test_unreadable_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="the tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)


def test_no_chat_template(tmp_path):
    write_bpe(tmp_path, tokenizer_class="Qwen2Tokenizer", chat_template=None)
    with pytest.raises(CheckpointError, match="no chat template"):
        render_chat(load_tokenizer(tmp_path), [{"role": "user", "content": "hi"}])
