"""Supervised examples and the replay items an update trains on; fresh masks every time an example comes up."""

import dataclasses
import logging
from collections.abc import Collection, Sequence

import numpy as np

from tracerl_jax.config import RunConfig, SFTSection
from tracerl_jax.data.jsonl import BadRows
from tracerl_jax.data.prompts import Example, encode_sft
from tracerl_jax.data.rows import load_rows
from tracerl_jax.data.tasks import Task
from tracerl_jax.diffusion.corruption import draw_masks, sample_rng
from tracerl_jax.diffusion.grid import round_up
from tracerl_jax.diffusion.replay import ReplayItem, masking_item, trace_item
from tracerl_jax.errors import DataError

log = logging.getLogger(__name__)


def load_examples(task: Task, tokenizer, config: RunConfig) -> list[Example]:
    """Examples of `sft.path`, or the solutions of the task's training rows. Raises DataError for bad rows."""
    bad = config.task.on_bad_row
    rows = load_rows(config.sft.path, one_of=("response", "ids"), on_bad_row=bad) if config.sft.path else task.train
    examples = encode_sft(
        rows, tokenizer, task.template, max_prompt_tokens=config.task.max_prompt_tokens,
        max_response_tokens=config.sft.max_response_tokens, on_bad_row=bad, prefix=config.task.prefix,
    )  # fmt: skip
    if config.sft.method == "trace" and all(example.step_map is None for example in examples):
        log.warning("sft.method=trace, but no row has a step_map: responses are replayed left to right, token by token")
    return examples


def fill_last_block(example: Example, block_size: int, eos_id: int, stop_ids: Collection[int]) -> Example:
    """Continue a response that ends in EOS or another stop id with EOS to the end of its last block.

    Decoding always denoises whole blocks, so the model must know what comes behind its EOS; without these targets it
    would guess, and a low confidence there would cost denoise steps. Behind a response that was cut off nothing is
    known: there the last block stays masked. A missing step map becomes left to right in any case.
    """
    length, ended = len(example.response_ids), {eos_id, *stop_ids}
    missing = round_up(len(example.prompt_ids) + length, block_size) - len(example.prompt_ids) - length
    missing = missing if int(example.response_ids[-1]) in ended else 0
    step_map = np.arange(1, length + 1) if example.step_map is None else example.step_map
    return dataclasses.replace(
        example,
        response_ids=np.concatenate([example.response_ids, np.full(missing, eos_id)]).astype(np.int32),
        step_map=np.concatenate([step_map, np.full(missing, step_map.max() + 1)]).astype(np.int32),
    )


def drop_long(
    examples: Sequence[Example], config: SFTSection, *, block_size: int, mask_id: int, on_bad_row: str = "fail"
) -> list[Example]:
    """The examples that fit into a packed row whatever is masked; the others are bad rows. Raises DataError for them
    with on_bad_row="fail", and when none is left."""
    everything = dataclasses.replace(config, mask_low=1.0, mask_high=1.0)
    bad, kept = BadRows(on_bad_row), []
    for example in examples:
        # No item is larger than this; few examples come near it.
        size = len(example.prompt_ids) + (block_size + 1) * (len(example.response_ids) + block_size)
        if size > config.row_length:
            (item,) = make_items([example], everything, block_size=block_size, mask_id=mask_id, seed=0, update=0)
            size = item.size
        if size <= config.row_length:
            kept.append(example)
            continue
        bad.add(
            f"{example.source}: prompt and response ({len(example.prompt_ids)} and {len(example.response_ids)} tokens) "
            f"take up to {size} tokens of a training row, sft.row_length is {config.row_length}",
            f"set sft.row_length to at least {size}, or a lower sft.max_response_tokens",
        )
    bad.report(len(kept))
    if not kept:
        raise DataError(f"none of the {len(examples)} rows can be used: {bad.reasons[0]}")
    return kept


def make_items(
    examples: Sequence[Example], config: SFTSection, *, block_size: int, mask_id: int, seed: int, update: int
) -> list[ReplayItem]:
    """Replay items of one update. Masks depend on (seed, update, place in the update) only."""
    items = []
    for place, example in enumerate(examples):
        if config.method == "trace":
            item = trace_item(
                example.prompt_ids, example.response_ids, example.step_map,
                block_size=block_size, mask_id=mask_id, shrink=config.shrink,
            )  # fmt: skip
        else:
            masked, ratio = draw_masks(
                sample_rng(seed, update, place), len(example.prompt_ids), len(example.response_ids),
                block_size=block_size, low=config.mask_low, high=config.mask_high,
            )  # fmt: skip
            item = masking_item(
                example.prompt_ids, example.response_ids, masked, block_size=block_size, mask_id=mask_id,
                weights=1.0 / ratio if config.inverse_ratio_weight else None,
            )  # fmt: skip
        items.append(item)
    return items
