"""Rows of samples.jsonl: a trace, its text and its verdict, with what the trace viewer needs."""

from collections.abc import Mapping, Sequence
from typing import Any

from tracerl_jax.diffusion.trace import Trace
from tracerl_jax.interop.tokenizer import StreamDecoder


def sample_row(
    trace: Trace, *, step: int, phase: str, prompt: str, text: str, reward: float | None,
    rewards: Mapping[str, float | None] | None = None, accuracy: float | None = None, ground_truth: Any = None,
    tokenizer=None,
) -> dict[str, Any]:  # fmt: skip
    """One row of samples.jsonl: `Trace.to_row` (so `tracerl score` reads it), text and verdict.

    `tokens` holds the decoded piece of each id of `ids`, `tail_tokens` those of `tail_ids`, and `prompt_tail` those of
    the last p mod B prompt tokens, which share a block with the response. `reward` None means "no verdict".
    """
    canvas = [*trace.prompt_ids.tolist(), *trace.ids.tolist(), *trace.tail_ids.tolist()]
    p, r = len(trace.prompt_ids), len(trace.ids)
    head = p - p % trace.block_size
    pieces = decode_pieces(tokenizer, canvas[head:])
    return {
        "step": step, "phase": phase, "prompt": prompt, "text": text, **trace.to_row(), "reward": reward,
        "rewards": dict(rewards or {}), "accuracy": accuracy, "ground_truth": ground_truth,
        "prompt_tail": pieces[: p - head], "tokens": pieces[p - head : p - head + r],
        "tail_tokens": pieces[p - head + r :],
    }  # fmt: skip


def decode_pieces(tokenizer, ids: Sequence[int]) -> list[str]:
    """The text each id adds: the pieces join to the decoded text; [r] strings, in linear time.

    A character made of several byte tokens goes to the token that completes it, "" to the others. Without a tokenizer
    each piece is the id and a space.
    """
    if tokenizer is None:
        return [f"{i} " for i in ids]

    stream = StreamDecoder(tokenizer, _decode_all)
    pieces = [stream.push([i]) for i in ids]
    if pieces:
        pieces[-1] += stream.finish()
    return pieces


def _decode_all(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
