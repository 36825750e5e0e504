"""Trace: what the sampler returns and everything downstream takes. Never re-tokenised."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tracerl_jax.errors import DataError

STOP_REASONS = ("stop", "length")


@dataclass(frozen=True, eq=False)
class Trace:
    """One sample: its token ids and, for each, when it was revealed and with which log-prob.

        canvas   [ prompt_ids | ids | tail_ids ]      p + r + tail is a multiple of B
                               ^     ^ the end of the last block
                               the completion is cut after the first stop id or at max_tokens

    The tail is no part of the completion, but its tokens were visible while the rest of their block was denoised, so
    replay needs them. A full-attention model has also seen the MASKs of the blocks to come, up to `canvas_len`, and its
    blocks begin behind the prompt: there r + tail is a multiple of B. `step_map` numbers are 1-based denoise forwards
    counted over the whole sequence; prefill and commit forwards are not counted. A trace that was not made by our
    sampler may lack log-probs (NaN) and tail (empty).
    """

    prompt_ids: np.ndarray  # [p] int32
    ids: np.ndarray  # [r] int32
    step_map: np.ndarray  # [r] int32
    logprobs: np.ndarray  # [r] f32, policy: log-softmax of logits / temperature over the full vocabulary
    behaviour_logprobs: np.ndarray  # [r] f32, the distribution drawn from: after bans, top-k and top-p
    tail_ids: np.ndarray  # [tail] int32
    tail_step_map: np.ndarray  # [tail] int32
    block_size: int
    temperature: float  # 0 is greedy; the log-probs are then those of temperature 1
    denoise_forwards: int
    stop_reason: str  # one of STOP_REASONS
    sample_index: int = 0
    canvas_len: int = 0  # of a full-attention model: prompt and completion at full length; 0 = block-causal
    forwards: int = 0  # that ran: denoise steps, less those that a draft guessed, and commits; 0 = not known

    @property
    def replay_block(self) -> int:
        """Tokens of a replay group: the whole canvas where all of it was visible."""
        return self.canvas_len or self.block_size

    def to_row(self) -> dict:
        """The trace as a JSON-able dict; unknown (NaN) log-probs become null."""
        return {
            "prompt_ids": self.prompt_ids.tolist(),
            "ids": self.ids.tolist(),
            "step_map": self.step_map.tolist(),
            "logprobs": _floats_to_row(self.logprobs),
            "behaviour_logprobs": _floats_to_row(self.behaviour_logprobs),
            "tail_ids": self.tail_ids.tolist(),
            "tail_step_map": self.tail_step_map.tolist(),
            "block_size": self.block_size,
            "temperature": self.temperature,
            "denoise_forwards": self.denoise_forwards,
            "stop_reason": self.stop_reason,
            "sample_index": self.sample_index,
            "canvas_len": self.canvas_len,
            "forwards": self.forwards,
        }

    @classmethod
    def from_row(cls, row: dict, where: str = "trace") -> "Trace":
        """Read a dict such as `to_row` makes; keys it does not know are ignored.

        Needed: prompt_ids, ids, step_map, block_size. Missing others: log-probs NaN, empty tail, temperature 1,
        denoise_forwards = the last step, stop_reason "length", sample_index 0, canvas_len 0, forwards 0.
        Raises DataError naming `where` (say "in.jsonl:3") and the field.
        """
        prompt_ids = _ints(row, "prompt_ids", where, minimum=0)
        ids = _ints(row, "ids", where, minimum=0)
        step_map = _ints(row, "step_map", where, minimum=1, length=("ids", len(ids)))
        tail_ids = _ints(row, "tail_ids", where, minimum=0, default=[])
        tail_step_map = _ints(row, "tail_step_map", where, minimum=1, default=[], length=("tail_ids", len(tail_ids)))
        block_size = _int(row, "block_size", where, minimum=1)
        canvas_len = _int(row, "canvas_len", where, minimum=0, default=0)
        end = len(prompt_ids) + len(ids) + len(tail_ids)
        on_grid = end - len(prompt_ids) if canvas_len else end
        if len(tail_ids) >= block_size or (len(tail_ids) and on_grid % block_size):
            raise DataError(
                f"{where}: field 'tail_ids' holds {len(tail_ids)} ids but must end the last block of {block_size}: "
                f"{'' if canvas_len else f'prompt_ids ({len(prompt_ids)}) + '}ids ({len(ids)}) + tail_ids must be a "
                "multiple of block_size"
            )
        if canvas_len and canvas_len < end:
            raise DataError(f"{where}: field 'canvas_len' is {canvas_len}, but {end} ids are given; it must hold them")
        last_step = max([0, *step_map.tolist(), *tail_step_map.tolist()])
        stop_reason = row.get("stop_reason", "length")
        if stop_reason not in STOP_REASONS:
            raise DataError(f"{where}: field 'stop_reason' is {stop_reason!r}; use one of {', '.join(STOP_REASONS)}")
        return cls(
            prompt_ids=prompt_ids,
            ids=ids,
            step_map=step_map,
            logprobs=_floats(row, "logprobs", where, len(ids)),
            behaviour_logprobs=_floats(row, "behaviour_logprobs", where, len(ids)),
            tail_ids=tail_ids,
            tail_step_map=tail_step_map,
            block_size=block_size,
            temperature=_temperature(row, where),
            denoise_forwards=_int(row, "denoise_forwards", where, minimum=last_step, default=last_step),
            stop_reason=stop_reason,
            sample_index=_int(row, "sample_index", where, minimum=0, default=0),
            canvas_len=canvas_len,
            forwards=_int(row, "forwards", where, minimum=0, default=0),
        )


def broken_traces(traces: Iterable[Trace]) -> list[Trace]:
    """Those of our sampler for which the model's numbers were not finite; their ids mean nothing."""
    return [trace for trace in traces if not np.isfinite(trace.logprobs).all()]


def tokens_per_denoise_step(traces: Iterable[Trace]) -> float:
    """Completion tokens per denoise forward over all traces; 0 when there are none."""
    tokens = forwards = 0
    for trace in traces:
        tokens += len(trace.ids)
        forwards += trace.denoise_forwards
    return tokens / forwards if forwards else 0.0


def tokens_per_forward(traces: Iterable[Trace]) -> float:
    """Completion tokens per denoise or commit forward over all traces; 0 when there are none."""
    tokens = forwards = 0
    for trace in traces:
        tokens += len(trace.ids)
        forwards += trace.forwards
    return tokens / forwards if forwards else 0.0


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _field(row: dict, name: str, where: str, default):
    if name in row:
        return row[name]
    if default is None:
        raise DataError(f"{where}: field {name!r} is missing; a trace needs prompt_ids, ids, step_map and block_size")
    return default


def _int(row: dict, name: str, where: str, *, minimum: int, default: int | None = None) -> int:
    value = _field(row, name, where, default)
    if not _is_int(value) or value < minimum:
        raise DataError(f"{where}: field {name!r} is {value!r}; it must be an integer of at least {minimum}")
    return value


def _ints(
    row: dict,
    name: str,
    where: str,
    *,
    minimum: int,
    default: list | None = None,
    length: tuple[str, int] | None = None,  # the field it must be as long as, and that length
) -> np.ndarray:
    values = _field(row, name, where, default)
    if not isinstance(values, list) or not all(_is_int(v) and minimum <= v < 2**31 for v in values):
        raise DataError(f"{where}: field {name!r} must be a list of integers of at least {minimum}")
    if length is not None and len(values) != length[1]:
        raise DataError(f"{where}: field {name!r} has {len(values)} entries but {length[0]!r} has {length[1]}")
    return np.array(values, np.int32)


def _floats(row: dict, name: str, where: str, length: int) -> np.ndarray:
    values = row.get(name)
    if values is None:
        return np.full(length, np.nan, np.float32)
    if not isinstance(values, list) or not all(_is_number(v) for v in values):
        raise DataError(f"{where}: field {name!r} must be a list of numbers, or null when unknown")
    if len(values) != length:
        raise DataError(f"{where}: field {name!r} has {len(values)} entries but 'ids' has {length}")
    return np.array(values, np.float32)


def _floats_to_row(values: np.ndarray) -> list[float] | None:
    return None if np.isnan(values).any() else values.tolist()


def _temperature(row: dict, where: str) -> float:
    value = row.get("temperature", 1.0)
    if not _is_number(value) or not 0 <= value < float("inf"):
        raise DataError(f"{where}: field 'temperature' is {value!r}; it must be a number of at least 0 (0 is greedy)")
    return float(value)
