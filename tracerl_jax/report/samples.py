"""Samples as the trace viewer needs them: a trace, its text piece by piece and, where there is one, its verdict."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tracerl_jax.diffusion.trace import Trace
from tracerl_jax.interop.tokenizer import StreamDecoder, decode_all

MAX_SAMPLES = 300  # of a page
MAX_SAMPLE_BYTES = 16 * 2**20

# Of a sample the page needs these; ids of the prompt alone can be thousands.
SAMPLE_KEYS = (
    "name", "step", "phase", "prompt", "text", "ids", "step_map", "logprobs", "tail_ids", "tail_step_map", "block_size",
    "reward", "rewards", "accuracy", "stop_reason", "ground_truth", "tokens", "prompt_tail", "tail_tokens", "forwards",
    "canvas_len",
)  # fmt: skip


def sample_row(
    trace: Trace, *, step: int, phase: str, prompt: str, text: str, reward: float | None,
    rewards: Mapping[str, float | None] | None = None, accuracy: float | None = None, ground_truth: Any = None,
    steps: Sequence[tuple[int, float]] = (), tokenizer=None,
) -> dict[str, Any]:  # fmt: skip
    """One row of samples.jsonl: a `trace_row` (so `tracerl score` reads it) and its verdict; `reward` None means "no
    verdict". `steps`: (end in tokens, reward) of each step, where steps are rewarded."""
    return {
        "step": step, "phase": phase, **trace_row(trace, prompt, text, tokenizer), "reward": reward,
        "rewards": dict(rewards or {}), "accuracy": accuracy, "ground_truth": ground_truth,
        **({"steps": [list(pair) for pair in steps]} if steps else {}),
    }  # fmt: skip


def trace_row(trace: Trace, prompt: str, text: str, tokenizer=None) -> dict[str, Any]:
    """`Trace.to_row` with its text and that of its tokens.

    `tokens` holds the decoded piece of each id of `ids`, `tail_tokens` those of `tail_ids`, and `prompt_tail` those of
    the last p mod B prompt tokens, which share a block with the response (none of a full-attention model).
    """
    canvas = [*trace.prompt_ids.tolist(), *trace.ids.tolist(), *trace.tail_ids.tolist()]
    p, r = len(trace.prompt_ids), len(trace.ids)
    head = p if trace.canvas_len else p - p % trace.block_size
    pieces = decode_pieces(tokenizer, canvas[head:])
    return {
        "prompt": prompt, "text": text, **trace.to_row(), "prompt_tail": pieces[: p - head],
        "tokens": pieces[p - head : p - head + r], "tail_tokens": pieces[p - head + r :],
    }  # fmt: skip


def shown_sample(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the page needs of a row, which may lack much of it."""
    shown = {key: row[key] for key in SAMPLE_KEYS if key in row}
    return {"ids": [], "step_map": [], **shown, "prompt_length": len(row.get("prompt_ids", ()))}


def pick(total: int, size: int) -> set[int]:
    """Which of `total` samples of `size` bytes a page shows: at most MAX_SAMPLES and about MAX_SAMPLE_BYTES, spread
    evenly."""
    limit = min(total, MAX_SAMPLES, max(total * MAX_SAMPLE_BYTES // max(size, 1), 1))
    return {round(i * (total - 1) / max(limit - 1, 1)) for i in range(limit)}


def decode_pieces(tokenizer, ids: Sequence[int], decode: Callable = decode_all) -> list[str]:
    """The text each id adds: the pieces join to the text that `decode` gives; [r] strings, in linear time.

    A character made of several byte tokens goes to the token that completes it, "" to the others. Without a tokenizer
    each piece is the id and a space.
    """
    if tokenizer is None:
        return [f"{i} " for i in ids]

    stream = StreamDecoder(tokenizer, decode)
    pieces = [stream.push([i]) for i in ids]
    if pieces:
        pieces[-1] += stream.finish()
    return pieces
