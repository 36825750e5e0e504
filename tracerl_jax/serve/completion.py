"""One completion as it grows: ids in, text out, cut at stop strings."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tracerl_jax.interop.tokenizer import StreamDecoder, decode_all


@dataclass(frozen=True)
class Piece:
    """What is new of a completion. Text may come later than its ids: a character is not whole yet, or what is held
    back may be the beginning of a stop string."""

    text: str
    ids: list[int]
    step_map: list[int]
    logprobs: list[float | None]
    tokens: list[str]  # the text of each id, control tokens too; empty when not asked for
    position: int  # of the first id, counted from the beginning of the prompt
    finish_reason: str | None = None  # "stop", "length"; with the last piece


class Completion:
    """Ids, steps and log-probs of one sample, block by block, into pieces of text. Pure: no clock, no device.

    A stop string ends the completion before its first character, however the text was cut into blocks; the tokens that
    count are those up to the one that completes it.
    """

    def __init__(self, tokenizer, prompt_ids: Sequence[int], stops: Sequence[str] = (), with_tokens: bool = False):
        self._decoder = StreamDecoder(tokenizer)
        self._token_decoder = StreamDecoder(tokenizer, decode_all) if with_tokens else None
        self._prompt_length = len(prompt_ids)
        self._stops = tuple(stops)
        self._held = ""  # text that may be the beginning of a stop string
        self.tokens = 0
        self.finish_reason: str | None = None

    def push(self, ids: np.ndarray, step_map: np.ndarray, logprobs: np.ndarray, end: str | None = None) -> Piece:
        """The next ids; `end` is the trace's stop reason with the last ones. Nothing after a finish reason."""
        texts, count = [], 0
        for i in ids:
            count += 1
            texts.append(self._stopped_at(self._decoder.push([i])))
            if self.finish_reason:
                break
        else:
            if end is not None:
                rest = self._stopped_at(self._decoder.finish())
                texts.append(rest if self.finish_reason else rest + self._held)
                self.finish_reason = self.finish_reason or end
        position = self._prompt_length + self.tokens
        self.tokens += count
        return Piece(
            "".join(texts), ids[:count].tolist(), step_map[:count].tolist(),
            [float(x) if np.isfinite(x) else None for x in logprobs[:count]], self._token_texts(ids[:count]), position,
            self.finish_reason,
        )  # fmt: skip

    def _token_texts(self, ids: np.ndarray) -> list[str]:
        """A character of several tokens belongs to the one that completes it."""
        if self._token_decoder is None:
            return []
        texts = [self._token_decoder.push([i]) for i in ids]
        if self.finish_reason and texts:
            texts[-1] += self._token_decoder.finish()
        return texts

    def _stopped_at(self, text: str) -> str:
        """The text that is certain after `text` has come: up to a stop string, or without what may begin one."""
        if not self._stops:
            return text
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.finish_reason, self._held = "stop", ""
            return text[: min(found)]
        held = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
