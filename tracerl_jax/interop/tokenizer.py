"""Tokenizers of model folders, offline and without remote code."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tracerl_jax.errors import CheckpointError, in_one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Text = TypeVar("Text")

_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "*.tiktoken")
_MASK_TOKENS = ("<|MASK|>", "<|mask|>", "<MASK>", "<mask>", "[MASK]", "<|mdm_mask|>")  # the last: LLaDA
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what the bytes of an incomplete character decode to
_MAX_UTF8 = 4  # a character spans at most so many byte tokens


def load_tokenizer(folder: str | os.PathLike) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model folder, None when it has none.

    Code in the folder is never run. A class that only exists as such code (SDAR publishes its tokenizer that way) is
    replaced by the one its files describe: tokenizer.json as it stands, or vocab.json and merges.txt read as Qwen2's.

    Raises:
        CheckpointError: there are tokenizer files and they cannot be read.
    """
    folder = Path(folder)
    if not any(path for pattern in _VOCABULARIES for path in folder.glob(pattern)):
        return None
    from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2TokenizerFast  # takes seconds

    try:
        with _no_remarks():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises whatever its parts raise
        if (folder / "tokenizer.json").exists():
            fallback = PreTrainedTokenizerFast
        elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            fallback = Qwen2TokenizerFast
        else:
            raise _unreadable(folder, error) from error
    try:
        return fallback.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise _unreadable(folder, error) from error


@contextlib.contextmanager
def _no_remarks() -> Iterator[None]:
    """AutoTokenizer also reads the model's config.json and remarks on a type and keys that are ours to judge."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)


def _unreadable(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{folder}: the tokenizer cannot be loaded ({in_one_line(error)}); fetch its files again, or "
        "save it with tokenizer.json"
    )


def mask_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Id of the declared mask token, else of a token spelled like one, else None."""
    if tokenizer.mask_token is not None:
        return tokenizer.mask_token_id
    vocabulary = tokenizer.get_vocab()
    return next((vocabulary[token] for token in _MASK_TOKENS if token in vocabulary), None)


def valid_vocab(tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> int:
    """How many ids may be sampled: those of the model's vocabulary that have a token (all without a tokenizer)."""
    return vocab_size if tokenizer is None else min(len(tokenizer), vocab_size)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> str:
    """Text of ids: control tokens (end of text, mask, pad) are left out, markup such as `</think>` or tool tags stays,
    no space is added or removed, ids without a token are skipped."""
    known = [int(i) for i in ids if 0 <= i < len(tokenizer)]
    return tokenizer.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def decode_each(decode: Callable[[Any], Text], each: Sequence[Any]) -> list[Text | None]:
    """`decode` of each; None, and one warning for all, where it fails: what a tokenizer cannot take must not end a
    run."""
    texts: list[Text | None] = []
    errors = []
    for ids in each:
        try:
            texts.append(decode(ids))
        except Exception as error:
            texts.append(None)
            errors.append(error)
    if errors:
        logger.warning("the tokenizer failed on %d of %d answers (no verdict for them): %r",
                       len(errors), len(each), errors[0])  # fmt: skip
    return texts


def decode_all(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Text of ids, control tokens included."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


class StreamDecoder:
    """Text of ids that arrive bit by bit: what `push` and `finish` return joins to `decode` of all ids.

    A character made of several byte tokens is given by the token that completes it; bytes that are no character are
    given, as U+FFFD, once that is sure. Linear time: only a short window is decoded again, whose start is context
    (the piece of an id may depend on its left neighbour).

        ids   . . . [context | new]        window = context + new, of whose text `given` characters were returned
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        decode: Callable[[PreTrainedTokenizerBase, list[int]], str] = decode,
    ):
        self._decode = lambda ids: decode(tokenizer, ids)
        self._window: list[int] = []
        self._context = 0  # ids of the window that are context
        self._given = 0

    def push(self, ids: Iterable[int]) -> str:
        """The text that has become certain with these ids, which follow those pushed before."""
        return "".join(self._push(int(i)) for i in ids)

    def finish(self) -> str:
        """The rest: the bytes of a character that was never completed. Nothing may be pushed afterwards."""
        return self._decode(self._window)[self._given :]

    def _push(self, i: int) -> str:
        self._window.append(i)
        text = self._decode(self._window)
        if text.endswith(_REPLACEMENT):
            return self._give_up() if len(self._window) == 2 * _MAX_UTF8 else ""
        piece = text[self._given :]
        if piece:
            self._window = self._window[self._context :]
            self._context, self._given = len(self._window), len(self._decode(self._window))
        else:  # a control token; as context it would hide the one before
            self._window.pop()
        return piece

    def _give_up(self) -> str:
        """The text before the ids that may still become a character, which stay."""
        text = self._decode(self._window)
        # A cut through the bytes of one character, also of an incomplete one, does not join to the same text.
        last = len(self._window) - (_MAX_UTF8 - 1)
        cuts = ((cut, self._decode(self._window[:cut])) for cut in range(last, 0, -1))
        cut, head = next((c, h) for c, h in cuts if c == 1 or h + self._decode(self._window[c:]) == text)
        piece = head[self._given :]
        self._window = self._window[cut:]
        self._context, self._given = max(self._context - cut, 0), max(self._given - len(head), 0)
        return piece


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True,
    **variables: object,
) -> str:  # fmt: skip
    """The text of a conversation in the tokenizer's own template.

    Args:
        messages: dicts with `role` and `content`.
        add_generation_prompt: end with the opening of the assistant's turn.
        variables: of the template, such as `enable_thinking`; one that it does not know changes nothing.

    Raises:
        CheckpointError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise CheckpointError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template; add chat_template.jinja to the folder, or "
            "give a prompt template"
        )
    return tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **variables
    )
