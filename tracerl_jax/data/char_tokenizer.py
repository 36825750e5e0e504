"""A tokenizer with one id per character, for the quick start and for tests: built here, nothing is downloaded."""

import os

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tracerl_jax.data.arithmetic import CHARACTERS

SPECIAL_TOKENS = ("<pad>", "<eos>", "<mask>", "<unk>")  # ids 0..3; the characters follow
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def build_char_tokenizer(folder: str | os.PathLike, characters: str = CHARACTERS) -> PreTrainedTokenizerFast:
    """Saves a tokenizer folder that `AutoTokenizer.from_pretrained` loads offline, and returns the tokenizer.

    Ids: 0 pad, 1 eos, 2 mask, 3 unknown character, then `characters` in the given order. The arithmetic task has 15
    characters, so 19 ids; a model may round its vocabulary up (32 is a good size), ids without a token are never
    sampled. The chat template is the bare text of the messages.
    """
    if len(set(characters)) != len(characters):
        raise ValueError(f"characters repeat: {characters!r}")
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *characters))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        mask_token="<mask>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer
