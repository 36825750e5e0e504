"""Tokenizers of model folders, among them one whose class is published as remote code only."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tracerl_jax.data.char_tokenizer import build_char_tokenizer
from tracerl_jax.errors import CheckpointError
from tracerl_jax.interop.tokenizer import (
    StreamDecoder,
    decode,
    load_tokenizer,
    mask_token_id,
    render_chat,
    valid_vocab,
)

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


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    write_bpe(folder, tokenizer_class="Qwen2Tokenizer")
    return load_tokenizer(folder)


def bytes_to_tokens():
    """The token of every byte, as byte-level vocabularies spell them: printable bytes as they are, the others moved."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [i for i in range(256) if i not in plain]
    return {i: chr(i) for i in plain} | {i: chr(256 + n) for n, i in enumerate(moved)}


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


@pytest.mark.parametrize(
    "text",
    ["", "he  said\n", "é € 𝄞𝄞 他們", "<think>𝄞</think> 4<|im_end|>", "he<|im_end|> he", "\ufffd\ufffd x \ufffd"],
)
@pytest.mark.parametrize("size", [1, 3, 100])
def test_streamed_text_is_the_decoded_text_and_never_takes_a_character_back(bpe, text, size):
    tokenizer, _ = bpe
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream, pieces = StreamDecoder(tokenizer), []
    for start in range(0, len(ids), size):
        pieces.append(stream.push(ids[start : start + size]))
        assert "\ufffd" in text or "\ufffd" not in pieces[-1]
    assert "".join([*pieces, stream.finish()]) == decode(tokenizer, ids)


@given(st.lists(st.sampled_from([*b"a \n", *"é€𝄞".encode(), 0xFF, 0xC3, 0xF0, "<|im_end|>", 10**6]), max_size=40))
def test_streamed_text_of_any_bytes(byte_tokenizer, items):
    tokenizer, byte_tokens = byte_tokenizer, bytes_to_tokens()
    ids = [i if i == 10**6 else tokenizer.convert_tokens_to_ids(byte_tokens.get(i, i)) for i in items]
    stream = StreamDecoder(tokenizer)
    assert "".join([*(stream.push([i]) for i in ids), stream.finish()]) == decode(tokenizer, ids)


def test_streamed_text_keeps_the_spaces_that_a_lone_token_would_lose():
    words = Tokenizer(models.WordLevel({"▁he": 0, "▁said": 1, "</s>": 2, "<unk>": 3}, unk_token="<unk>"))
    words.decoder = decoders.Metaspace()
    words.add_special_tokens(["</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    stream = StreamDecoder(tokenizer)
    assert [stream.push([i]) for i in (2, 0, 2, 2, 1, 1)] == ["", "he", "", "", " said", " said"]


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
