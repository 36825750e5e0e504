"""What a client reads: completions as the dicts of OpenAI's API. Pure functions.

Beyond OpenAI: `seed` of the answer (the one drawn, when the request gave none), and with return_step_map, per choice
or chunk, `token_ids`, `step_map` (the denoise step at which each was revealed), `position` of the first of them and
`block_size`: block g is positions [g B, (g + 1) B), counted from the beginning of the prompt.
"""

import json
import secrets
import time
from collections.abc import Sequence
from itertools import accumulate

from tracerl_jax.serve.completion import Piece
from tracerl_jax.serve.protocol import Call

PREFIXES = {"chat": "chatcmpl", "completions": "cmpl"}
OBJECTS = {"chat": "chat.completion", "completions": "text_completion"}


class Answer:
    """The dicts of one answer, which share its id, time, model and seed."""

    def __init__(self, call: Call, model_name: str, model_block_size: int):
        self._call = call
        self._block_size = call.options[0].block_size or model_block_size
        self._head = {
            "id": f"{PREFIXES[call.kind]}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model_name,
            "seed": call.options[0].seed,
        }  # fmt: skip

    def whole(self, pieces: Sequence[Piece]) -> dict:
        """The answer with one piece per sample, in the order of their index."""
        choices = [self._choice(index, piece, "message") for index, piece in enumerate(pieces)]
        tokens = [len(piece.ids) for piece in pieces]
        return {**self._head, "object": OBJECTS[self._call.kind], "choices": choices, "usage": self._usage(tokens)}

    def opening(self) -> list[dict]:
        """Chunks before the first text: who speaks."""
        if self._call.kind != "chat":
            return []
        delta = {"role": "assistant", "content": ""}
        samples = range(self._call.n)
        return [self._chunk([{"index": i, "delta": delta, "logprobs": None, "finish_reason": None}]) for i in samples]

    def chunk(self, index: int, piece: Piece, offset: int) -> dict:
        """New text of a sample; `offset` characters of it were sent before."""
        return self._chunk([self._choice(index, piece, "delta", offset)])

    def closing(self, tokens: Sequence[int]) -> list[dict]:
        """Chunks after the last text: the usage, if asked for; `tokens` of every sample."""
        return [{**self._chunk([]), "usage": self._usage(tokens)}] if self._call.include_usage else []

    def _chunk(self, choices: list[dict]) -> dict:
        suffix = ".chunk" if self._call.kind == "chat" else ""
        chunk = {**self._head, "object": OBJECTS[self._call.kind] + suffix, "choices": choices}
        return chunk | ({"usage": None} if self._call.include_usage else {})

    def _choice(self, index: int, piece: Piece, content: str, offset: int = 0) -> dict:
        if self._call.kind == "chat":
            said = {"role": "assistant", "content": piece.text, "refusal": None}
            text = {content: said if content == "message" else {"content": piece.text}}
        else:
            text = {"text": piece.text}
        choice = {"index": index, **text, "logprobs": None, "finish_reason": piece.finish_reason}
        if self._call.logprobs:
            choice["logprobs"] = self._logprobs(piece, offset)
        if self._call.return_step_map:
            choice |= {
                "token_ids": piece.ids, "step_map": piece.step_map, "position": piece.position,
                "block_size": self._block_size,
            }  # fmt: skip
        return choice

    def _logprobs(self, piece: Piece, offset: int) -> dict:
        tokens = piece.tokens
        if self._call.kind == "chat":
            content = [
                {"token": token, "logprob": logprob, "bytes": list(token.encode()), "top_logprobs": []}
                for token, logprob in zip(tokens, piece.logprobs, strict=True)
            ]
            return {"content": content, "refusal": None}
        offsets = list(accumulate(map(len, tokens), initial=offset))[:-1]
        return {"tokens": tokens, "token_logprobs": piece.logprobs, "top_logprobs": None, "text_offset": offsets}

    def _usage(self, tokens: Sequence[int]) -> dict:
        prompt, completion = sum(map(len, self._call.prompts)), sum(tokens)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def event(data: dict | str) -> bytes:
    """A server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


def model_card(name: str, created: int, max_length: int, block_size: int) -> dict:
    return {
        "id": name, "object": "model", "created": created, "owned_by": "tracerl", "max_model_len": max_length,
        "block_size": block_size,
    }  # fmt: skip
