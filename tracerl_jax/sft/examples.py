"""Supervised examples and the replay items an update trains on; fresh masks every time an example comes up."""

import dataclasses
import logging
from collections.abc import Collection, Sequence

import numpy as np

from tracerl_jax.config import RunConfig, SFTSection
from tracerl_jax.data.jsonl import BadRows
from tracerl_jax.data.prompts import Example, encode_sft
from tracerl_jax.data.tasks import Task, load_rows
from tracerl_jax.diffusion.corruption import draw_masks, sample_rng
from tracerl_jax.diffusion.grid import round_up
from tracerl_jax.diffusion.replay import ReplayItem, causal_item, masking_item, slices_item, trace_item
from tracerl_jax.errors import ConfigError, DataError
from tracerl_jax.models import ModelConfig

log = logging.getLogger(__name__)


def load_examples(task: Task, tokenizer, config: RunConfig) -> list[Example]:
    """Examples of `sft.path`, or the solutions of the task's training rows. Raises DataError for bad rows."""
    bad = config.task.on_bad_row
    rows = load_rows(config.sft.path, one_of=("response", "ids"), on_bad_row=bad) if config.sft.path else task.train
    examples = encode_sft(
        rows, tokenizer, task.template, max_prompt_tokens=config.task.max_prompt_tokens,
        max_response_tokens=config.sft.max_response_tokens, on_bad_row=bad,
    )  # fmt: skip
    if config.sft.method == "trace" and all(example.step_map is None for example in examples):
        log.warning("sft.method=trace, but no row has a step_map: responses are replayed left to right, token by token")
    return examples


def check_method(method: str, model: ModelConfig) -> None:
    """Raises ConfigError when the model cannot be trained by `sft.method`."""
    if method == "random_masking" and model.attention_mode != "full":
        raise ConfigError(
            f"sft.method=random_masking hides tokens all over a response, and this model ({model.family}, attention "
            f"{model.attention_mode}) sees no block behind the one it decodes: set sft.method=semi_ar"
        )
    if method == "ar" and model.logit_alignment != "shifted":
        raise ConfigError(
            f"sft.method=ar reads each token at the position before it, and the logits of this model ({model.family}) "
            "belong to their own position: set sft.method=random_masking or semi_ar"
        )


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the model reads a response."""

    mask_id: int
    block_size: int
    canvas: int | None = None  # response positions a model with full attention sees; None: attention by blocks

    @classmethod
    def of(cls, model: ModelConfig, config: RunConfig) -> "Layout":
        sft, full = config.sft, model.attention_mode == "full"
        canvas = (sft.canvas_tokens or sft.max_response_tokens) if full and sft.method != "ar" else None
        return cls(model.mask_token_id, config.rollout.block_size or model.block_size, canvas)

    def grid_start(self, prompt_len: int) -> int:
        """Position of the response's first token on the grid: with full attention blocks are counted from there."""
        return prompt_len if self.canvas is None else 0

    def whole(self, example: Example) -> int:
        """Positions of the canvas that a model with full attention sees."""
        return len(example.prompt_ids) + max(self.canvas, len(example.response_ids))


def fill_last_block(example: Example, layout: Layout, eos_id: int, stop_ids: Collection[int]) -> Example:
    """Continue a response that ends in EOS or another stop id with EOS to the end of its last block.

    Decoding always denoises whole blocks, so the model must know what comes behind its EOS; without these targets it
    would guess, and a low confidence there would cost denoise steps. Behind a response that was cut off nothing is
    known: there the last block stays masked. A missing step map becomes left to right in any case.
    """
    length, ended = len(example.response_ids), {eos_id, *stop_ids}
    end = layout.grid_start(len(example.prompt_ids)) + length
    missing = round_up(end, layout.block_size) - end if int(example.response_ids[-1]) in ended else 0
    step_map = np.arange(1, length + 1) if example.step_map is None else example.step_map
    return dataclasses.replace(
        example,
        response_ids=np.concatenate([example.response_ids, np.full(missing, eos_id)]).astype(np.int32),
        step_map=np.concatenate([step_map, np.full(missing, step_map.max() + 1)]).astype(np.int32),
    )


def drop_long(
    examples: Sequence[Example], config: SFTSection, layout: Layout, on_bad_row: str = "fail"
) -> list[Example]:
    """The examples that fit into a packed row whatever is masked; the others are bad rows. Raises DataError for them
    with on_bad_row="fail", and when none is left."""
    bad, kept = BadRows(on_bad_row), []
    for example in examples:
        size = _tokens_of_row(example, config, layout)
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


def _tokens_of_row(example: Example, config: SFTSection, layout: Layout) -> int:
    """The most tokens of a row that a piece of the example may take; more where that fits into a row as well."""
    if layout.canvas is not None:
        return layout.whole(example)
    if config.method == "ar":
        return len(example.prompt_ids) + len(example.response_ids)
    # No item is larger than this; few examples come near it.
    bound = len(example.prompt_ids) + (layout.block_size + 1) * (len(example.response_ids) + layout.block_size)
    if bound <= config.row_length:
        return bound
    everything = dataclasses.replace(config, mask_low=1.0, mask_high=1.0)
    return make_item(example, everything, layout, sample_rng(0)).size


def make_items(
    examples: Sequence[Example], config: SFTSection, layout: Layout, *, seed: int, update: int
) -> list[ReplayItem]:
    """Replay items of one update. Masks depend on (seed, update, place in the update) only."""
    return [
        make_item(example, config, layout, sample_rng(seed, update, place)) for place, example in enumerate(examples)
    ]


def make_item(example: Example, config: SFTSection, layout: Layout, rng: np.random.Generator) -> ReplayItem:
    """What `sft.method` makes of an example, with masks drawn from `rng`."""
    prompt, ids, mask_id, canvas = example.prompt_ids, example.response_ids, layout.mask_id, layout.canvas
    if config.method == "ar":
        return causal_item(prompt, ids)
    seen = layout.block_size if canvas is None else layout.whole(example)  # the block, as replay understands it
    if config.method == "trace":
        return trace_item(prompt, ids, example.step_map, block_size=seen, mask_id=mask_id, shrink=config.shrink)

    by_block = config.method == "semi_ar"
    masked, ratio = draw_masks(
        rng, layout.grid_start(len(prompt)) if by_block else len(prompt), len(ids),
        block_size=layout.block_size if by_block else seen, low=config.mask_low, high=config.mask_high,
    )  # fmt: skip
    weights = 1.0 / ratio if config.inverse_ratio_weight else None
    if not by_block or canvas is None:
        return masking_item(prompt, ids, masked, block_size=seen, mask_id=mask_id, weights=weights)
    blocks = np.arange(len(ids)) // layout.block_size
    count = int(blocks[-1]) + 1
    chosen = rng.choice(count, min(config.blocks_per_response or count, count), replace=False)
    return slices_item(prompt, ids, masked, blocks, canvas=seen, mask_id=mask_id, weights=weights, chosen=chosen)
