"""Supervised examples, their replay items, and the objective."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from tracerl_jax.config import RunConfig, SFTSection
from tracerl_jax.config_io import from_dict
from tracerl_jax.data.char_tokenizer import build_char_tokenizer
from tracerl_jax.data.prompts import Example
from tracerl_jax.data.tasks import load_task
from tracerl_jax.diffusion.packing import pack
from tracerl_jax.errors import ConfigError, DataError
from tracerl_jax.models import PRESETS, Model
from tracerl_jax.sft.examples import (
    Layout,
    check_method,
    drop_long,
    fill_last_block,
    load_examples,
    make_items,
)
from tracerl_jax.sft.loop import sft_objective

EOS, MASK = 1, 2
BLOCKS = Layout(MASK, block_size=4)
FULL = Layout(MASK, block_size=4, canvas=20)


def example(prompt_len, response_len, step_map=None):
    response = np.arange(10, 10 + response_len, dtype=np.int32)
    response[-1] = EOS
    return Example(0, np.arange(5, 5 + prompt_len, dtype=np.int32), response, step_map)


@pytest.mark.parametrize(("prompt_len", "response_len", "missing"), [(4, 4, 0), (4, 5, 3), (3, 4, 1), (1, 1, 2)])
def test_the_last_block_is_filled_with_eos_revealed_last(prompt_len, response_len, missing):
    filled = fill_last_block(example(prompt_len, response_len), BLOCKS, EOS, ())
    assert (len(filled.prompt_ids) + len(filled.response_ids)) % 4 == 0
    assert list(filled.response_ids[response_len:]) == [EOS] * missing
    assert list(filled.step_map) == [*range(1, response_len + 1), *[response_len + 1] * missing]


def test_a_step_map_of_the_row_is_kept():
    filled = fill_last_block(example(2, 3, np.array([2, 1, 7], np.int32)), BLOCKS, EOS, ())
    assert list(filled.step_map) == [2, 1, 7, 8, 8, 8]


def test_behind_a_response_that_was_cut_off_nothing_is_known():
    cut = dataclasses.replace(example(4, 5), response_ids=np.arange(10, 15, dtype=np.int32))
    assert list(fill_last_block(cut, BLOCKS, EOS, (14,)).response_ids) == [*range(10, 15), EOS, EOS, EOS]
    filled = fill_last_block(cut, BLOCKS, EOS, ())
    assert list(filled.response_ids) == [*range(10, 15)] and list(filled.step_map) == [1, 2, 3, 4, 5]
    (item,) = make_items([filled], SFTSection(method="trace"), BLOCKS, seed=0, update=1)
    last = item.group_ids[item.group_start == 8]
    assert [list(block) for block in last] == [[MASK] * 4]  # before the reveal of the fifth token
    assert list(item.target_pos) == [0, 1, 2, 3, 4]


def masks(items):
    """Response positions that are targets, per item."""
    return [set(item.target_pos.tolist()) for item in items]


def items_of(config, seed, update, count=64, layout=BLOCKS):
    examples = [fill_last_block(example(5, 7), layout, EOS, ())] * count
    return make_items(examples, config, layout, seed=seed, update=update)


def test_masks_are_fresh_for_every_update_and_place_and_repeat_with_the_seed():
    config = SFTSection(mask_low=0.3, mask_high=0.7)
    first = masks(items_of(config, seed=1, update=1))
    assert first == masks(items_of(config, seed=1, update=1))
    assert first != masks(items_of(config, seed=1, update=2))
    assert first != masks(items_of(config, seed=2, update=1))
    assert len({frozenset(mask) for mask in first}) > 16  # the same example, another place


def test_the_share_of_masked_tokens_is_the_mean_ratio():
    config = SFTSection(mask_low=0.2, mask_high=0.6)
    shares = [len(mask) / 7 for update in range(40) for mask in masks(items_of(config, 0, update))]
    assert np.mean(shares) == pytest.approx(0.4, abs=4 * np.std(shares) / np.sqrt(len(shares)))


def test_eos_is_trained():
    (item,) = items_of(SFTSection(mask_low=1.0, mask_high=1.0), 0, 0, count=1)
    assert list(item.target_ids) == [*range(10, 16), EOS]
    assert set(item.target_weight) == {1.0}


def test_inverse_ratio_weights_are_those_of_the_block():
    config = SFTSection(mask_low=0.2, mask_high=1.0, inverse_ratio_weight=True)
    for item in items_of(config, 3, 1):
        weights = dict(zip(item.target_pos.tolist(), item.target_weight.tolist(), strict=True))
        assert all(1 <= weight <= 5 for weight in weights.values())
        by_block = [{w for pos, w in weights.items() if (5 + pos) // 4 == block} for block in (1, 2)]
        assert all(len(block) <= 1 for block in by_block)


def test_trace_items_replay_the_step_map_without_chance():
    config = SFTSection(method="trace")
    first, second = items_of(config, 0, 1, count=1) + items_of(config, 9, 9, count=1)
    assert list(first.target_pos) == list(second.target_pos) == [*range(7)]
    assert len(first.group_ids) == 7  # one state before each of the seven reveals


def test_the_objective_is_the_weighted_sum_of_cross_entropies():
    config = PRESETS["sdar_tiny"].replace(
        vocab_size=32, mask_token_id=MASK, eos_token_id=EOS, pad_token_id=EOS, stop_token_ids=(EOS,)
    )
    model = Model(config)
    params = model.init(jax.random.key(0))
    sft = SFTSection(mask_low=0.2, mask_high=1.0, inverse_ratio_weight=True)
    rows = pack(items_of(sft, 0, 0, count=4), row_length=128)
    total, metrics = sft_objective(model, params, {"rows": rows})
    hidden = model.hidden(params, rows.ids, rows.positions, rows.intervals)
    logp = np.asarray(jax.nn.log_softmax(model.logits(params, hidden)), np.float64)
    n = np.arange(len(rows.ids))[:, None]
    expected = -np.sum(rows.target_weight * logp[n, rows.target_index, rows.target_ids])
    assert float(total) == pytest.approx(expected, rel=1e-5)
    assert metrics


# Full attention: every state is a whole canvas, here prompt 5 and 20 response positions


def masked_somewhere(item):
    return len(item.target_pos) > 0


def test_random_masking_draws_one_ratio_per_response_and_keeps_the_canvas_behind_it_masked():
    config = SFTSection(method="random_masking", mask_low=0.2, mask_high=1.0, inverse_ratio_weight=True)
    items, blocks = items_of(config, 1, 1, layout=FULL), 0
    for item in filter(masked_somewhere, items):
        assert item.group_ids.shape == (1, 5 + 20) and len(item.clean) == 0
        canvas = item.group_ids[0]
        assert list(canvas[:5]) == [5, 6, 7, 8, 9] and (canvas[13:] == MASK).all()
        assert set(np.flatnonzero(canvas[5:13] == MASK)) == set(item.target_pos)
        assert len(set(item.target_weight)) == 1
        blocks += len(set(item.target_pos // 4)) == 2
    assert blocks > 16 and len({tuple(item.target_pos) for item in items}) > 16
    assert masks(items) != masks(items_of(config, 1, 2, layout=FULL))


def test_semi_ar_of_full_attention_trains_chosen_blocks_with_later_ones_masked():
    config = SFTSection(mask_low=0.5, mask_high=1.0)
    chosen = set()
    for item in filter(masked_somewhere, items_of(config, 2, 1, layout=FULL)):
        (block,) = set((item.target_pos // 4).tolist())
        chosen.add(block)
        canvas = item.group_ids[0, 5:]
        assert (canvas[: 4 * block] != MASK).all() and (canvas[4 * block + 4 :] == MASK).all()
    assert chosen == {0, 1}
    every = dataclasses.replace(config, mask_low=1.0, mask_high=1.0, blocks_per_response=0)
    (item,) = items_of(every, 2, 1, count=1, layout=FULL)
    assert len(item.group_ids) == 2 and list(item.target_pos) == [*range(8)]
    assert list(item.group_ids[1, 5:9]) == [10, 11, 12, 13]


def test_a_trace_of_full_attention_replays_the_whole_canvas():
    (item,) = items_of(SFTSection(method="trace", shrink=3), 0, 1, count=1, layout=FULL)
    assert item.group_ids.shape == (3, 25) and list(item.target_round) == [0, 0, 0, 1, 1, 1, 2, 2]
    assert list(item.group_ids[1, 5:9]) == [10, 11, 12, MASK]


def test_blocks_of_full_attention_start_at_the_response():
    assert len(fill_last_block(example(3, 5), FULL, EOS, ()).response_ids) == 8
    assert len(fill_last_block(example(3, 5), BLOCKS, EOS, ()).response_ids) == 5


def test_next_token_training_sees_the_clean_sequence_and_one_eos():
    row = example(5, 7)
    (item,) = make_items([row], SFTSection(method="ar"), BLOCKS, seed=0, update=1)
    assert list(item.clean) == [*row.prompt_ids, *row.response_ids]
    rows = pack([item], row_length=16)
    assert list(rows.target_index[0, :7]) == [*range(5, 12)] and list(rows.target_ids[0, :7]) == list(row.response_ids)
    np.testing.assert_array_equal(rows.intervals[0, :12, :2], [(0, t + 1) for t in range(12)])


@pytest.mark.parametrize(
    ("method", "preset", "message"),
    [
        ("random_masking", "sdar_tiny", "sees no block behind the one it decodes: set sft.method=semi_ar"),
        ("ar", "llada_demo", "the logits of this model .llada. belong to their own position"),
        ("ar", "sdar_tiny", "the logits of this model .sdar. belong to their own position"),
    ],
)
def test_a_method_that_does_not_go_with_the_model_is_refused(method, preset, message):
    with pytest.raises(ConfigError, match=message):
        check_method(method, PRESETS[preset])
    check_method("ar", PRESETS["dream_demo"])
    check_method("random_masking", PRESETS["llada_demo"])


def test_a_canvas_must_fit_into_a_row():
    row = fill_last_block(example(5, 7), FULL, EOS, ())
    assert drop_long([row], SFTSection(method="random_masking", row_length=25), FULL) == [row]
    with pytest.raises(DataError, match=r"take up to 25 tokens of a training row, sft\.row_length is 24"):
        drop_long([row], SFTSection(method="random_masking", row_length=24), FULL)


# Rows


def load(tmp_path, lines, **changes):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    tokenizer = build_char_tokenizer(tmp_path / "tokenizer")
    values = {"model": {"preset": "sdar_tiny"}, "sft": {"path": str(path), "max_response_tokens": 6}} | changes
    task = load_task("arithmetic", options={"train_count": 3, "test_count": 1})
    return tokenizer, task, load_examples(task, tokenizer, from_dict(RunConfig, values))


def test_rows_of_a_file_get_eos_and_rows_of_ids_are_taken_as_they_are(tmp_path):
    tokenizer, _, (text, ids) = load(
        tmp_path,
        [
            {"prompt": "1+1=", "response": "2"},
            {"prompt_ids": [5, 6], "ids": [7, 8, 1], "step_map": [2, 1, 3]},
        ],
    )
    assert tokenizer.decode(text.prompt_ids) == "1+1="
    assert list(text.response_ids) == [*tokenizer("2")["input_ids"], tokenizer.eos_token_id]
    assert (list(ids.prompt_ids), list(ids.response_ids), list(ids.step_map)) == ([5, 6], [7, 8, 1], [2, 1, 3])


def test_without_a_file_the_task_s_solutions_are_the_examples(tmp_path):
    tokenizer, task, examples = load(tmp_path, [], sft={"max_response_tokens": 64})
    assert [tokenizer.decode(e.response_ids, skip_special_tokens=True) for e in examples] == [
        row["response"] for row in task.train
    ]


def test_traces_without_a_step_map_in_any_row_are_said_to_be_left_to_right(tmp_path, caplog):
    row = {"prompt": "1+1=", "response": "2"}
    trace = {"path": str(tmp_path / "rows.jsonl"), "max_response_tokens": 6, "method": "trace"}
    load(tmp_path, [row, row | {"step_map": [1]}], sft=trace)
    assert "step_map" not in caplog.text
    load(tmp_path, [row], sft=trace)
    assert "no row has a step_map: responses are replayed left to right" in caplog.text


@pytest.mark.parametrize(("method", "need"), [("semi_ar", 4 + 4 + 8), ("trace", 4 + 4 + 8 * 4)])
def test_an_example_that_may_not_fit_into_a_row_is_a_bad_row(method, need):
    """Prompt 4, response 8: at most 8 clean tokens, and two masked blocks or one group a token."""
    rows = [fill_last_block(dataclasses.replace(example(4, r), source=f"rows.jsonl:{r}"), BLOCKS, EOS, ())
            for r in (4, 8)]  # fmt: skip
    config = SFTSection(method=method, row_length=need)
    assert drop_long(rows, config, BLOCKS) == rows
    config = dataclasses.replace(config, row_length=need - 1)
    message = rf"rows\.jsonl:8: .* up to {need} tokens .* sft\.row_length to at least {need}"
    with pytest.raises(DataError, match=message):
        drop_long(rows, config, BLOCKS)
    assert drop_long(rows, config, BLOCKS, on_bad_row="skip") == rows[:1]
    with pytest.raises(DataError, match="none of the 1 rows can be used"):
        drop_long(rows[1:], config, BLOCKS, on_bad_row="skip")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"prompt": "1+1="}, "'response'"),
        ({"prompt": "1+1=", "response": "123456"}, "7 tokens with EOS, the limit is 6"),
        ({"prompt": "1+1=", "response": "12", "step_map": [1]}, "'step_map' must hold 2"),
        ({"prompt_ids": [5], "ids": [99]}, "'ids' must be a list of token ids below 19"),
        ("{", "JSON"),
    ],
)
def test_a_bad_row_is_named_or_skipped(tmp_path, caplog, line, reason):
    good = {"prompt": "1+1=", "response": "2"}
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: .*{reason}"):
        load(tmp_path, [good, line])
    _, _, examples = load(tmp_path, [good, line], task={"on_bad_row": "skip"})
    assert len(examples) == 1 and "skipped 1 bad rows, kept 1" in caplog.text
