"""Replay items: which tokens each group shows, hides and trains on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracerl_jax.diffusion.replay import causal_item, masking_item, shrunk_steps, slices_item, trace_item
from tracerl_jax.errors import ConfigError

M = 0  # the mask id
PROMPT, IDS, STEPS = [90, 91, 92, 93, 94], [1, 2, 3, 4, 5, 6, 7], [2, 1, 2, 3, 3, 5, 4]


def targets(item):
    """(group, response index, token, round) of every target."""
    columns = (item.target_group, item.target_pos, item.target_ids, item.target_round)
    return sorted(zip(*(c.tolist() for c in columns), strict=True))


def test_absolute_grid_opens_with_the_prompts_tail():
    item = trace_item(PROMPT, IDS, STEPS, block_size=4, mask_id=M)
    np.testing.assert_array_equal(
        item.group_ids, [[94, M, M, M], [94, M, 2, M], [M, M, M, M], [4, 5, M, M], [4, 5, M, 7]]
    )
    np.testing.assert_array_equal(item.group_start, [4, 4, 8, 8, 8])
    np.testing.assert_array_equal(item.clean, [90, 91, 92, 93, 94, 1, 2, 3])
    assert targets(item) == [
        (0, 1, 2, 0), (1, 0, 1, 1), (1, 2, 3, 1), (2, 3, 4, 0), (2, 4, 5, 0), (3, 6, 7, 1), (4, 5, 6, 2),
    ]  # fmt: skip
    assert item.rounds == 3 and item.size == 8 + 5 * 4
    at = item.group_start[item.target_group] + item.target_offset
    np.testing.assert_array_equal(at, len(PROMPT) + item.target_pos)


def test_response_grid_leaves_the_prompt_out():
    item = trace_item(PROMPT, IDS, STEPS, block_size=4, mask_id=M, alignment="response")
    np.testing.assert_array_equal(
        item.group_ids, [[M, M, M, M], [M, 2, M, M], [1, 2, 3, M], [M, M, M, M], [5, M, M, M], [5, M, 7, M]]
    )
    np.testing.assert_array_equal(item.group_start, [5, 5, 5, 9, 9, 9])
    assert item.grid_offset == 1 and len(item.clean) == 9


def test_shrink_merges_distinct_steps_of_a_block():
    item = trace_item(PROMPT, IDS, STEPS, block_size=4, mask_id=M, shrink=2)
    np.testing.assert_array_equal(item.group_ids, [[94, M, M, M], [M, M, M, M], [4, 5, M, 7]])
    np.testing.assert_array_equal(shrunk_steps(5, STEPS, 4, 2), [2, 2, 2, 4, 4, 5, 4])
    np.testing.assert_array_equal(shrunk_steps(5, STEPS, 4, 1), STEPS)
    np.testing.assert_array_equal(shrunk_steps(5, STEPS, 4, 2, "response"), [2, 2, 2, 3, 4, 5, 4])


def test_tail_is_visible_once_revealed():
    """The stop token (6) came last; the token behind it (70) came with step 4 and was seen when 6 was revealed."""
    item = trace_item(PROMPT, IDS[:6], STEPS[:6], block_size=4, mask_id=M, tail_ids=[70], tail_step_map=[4])
    np.testing.assert_array_equal(item.group_ids, [[94, M, M, M], [94, M, 2, M], [M, M, M, M], [4, 5, M, 70]])
    same_step = trace_item(PROMPT, IDS[:6], STEPS[:6], block_size=4, mask_id=M, tail_ids=[70], tail_step_map=[5])
    np.testing.assert_array_equal(same_step.group_ids[-1], [4, 5, M, M])


def test_tail_is_hidden_in_a_merged_group_it_belongs_to():
    tail = dict(tail_ids=[70], tail_step_map=[4])
    item = trace_item(PROMPT, IDS[:6], STEPS[:6], block_size=4, mask_id=M, shrink=4, **tail)
    np.testing.assert_array_equal(item.group_ids, [[94, M, M, M], [M, M, M, M]])


def test_training_block_may_be_larger_or_smaller_than_the_traces():
    prompt, ids, steps = [90, 91, 92, 93], np.arange(1, 9), [1, 1, 2, 2, 3, 4, 3, 4]  # blocks of 4
    larger = trace_item(prompt, ids, steps, block_size=8, mask_id=M, alignment="response")
    np.testing.assert_array_equal(
        larger.group_ids, [[M] * 8, [1, 2] + [M] * 6, [1, 2, 3, 4] + [M] * 4, [1, 2, 3, 4, 5, M, 7, M]]
    )
    smaller = trace_item(prompt, ids[:3], steps[:3], block_size=2, mask_id=M, tail_ids=[4], tail_step_map=[1])
    np.testing.assert_array_equal(smaller.group_ids, [[M, M], [M, 4]])


def test_masking_item():
    masked = np.array([0, 1, 1, 0, 0, 0, 1], bool)
    weights = np.array([1, 2, 0, 1, 1, 1, 4], np.float32)
    item = masking_item(PROMPT, IDS, masked, block_size=4, mask_id=M, weights=weights)
    np.testing.assert_array_equal(item.group_ids, [[94, 1, M, M], [4, 5, 6, M]])
    assert targets(item) == [(0, 1, 2, 0), (1, 6, 7, 0)]  # a hidden token of weight 0 stays hidden
    np.testing.assert_array_equal(item.target_weight, [2, 4])
    other = masking_item(PROMPT, IDS, ~masked, block_size=4, mask_id=M)
    np.testing.assert_array_equal(other.group_ids, [[94, M, 2, 3], [M, M, M, 7]])
    assert len(masking_item(PROMPT, IDS, masked & False, block_size=4, mask_id=M).group_ids) == 0


def test_group_without_a_target_is_dropped():
    weights = np.array([1, 0, 1, 0, 0, 0, 0], np.float32)
    item = trace_item(PROMPT, IDS, STEPS, block_size=4, mask_id=M, weights=weights)
    np.testing.assert_array_equal(item.group_ids, [[94, M, 2, M]])
    np.testing.assert_array_equal(item.clean, PROMPT[:4])
    assert targets(item) == [(0, 0, 1, 1), (0, 2, 3, 1)]


def test_empty_response():
    item = trace_item(PROMPT, [], [], block_size=4, mask_id=M)
    assert item.size == 0 and item.rounds == 0 and item.response_len == 0


@pytest.mark.parametrize("wrong", [dict(shrink=0), dict(alignment="left")])
def test_refuses(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        trace_item(PROMPT, IDS, STEPS, block_size=4, mask_id=M, **wrong)


@st.composite
def traces(draw):
    steps = draw(st.lists(st.integers(1, 12), min_size=1, max_size=40))
    return draw(st.integers(0, 20)), np.array(steps)


@settings(max_examples=200, deadline=None)
@given(traces(), st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 5), st.sampled_from(["absolute", "response"]))
def test_every_token_is_a_target_once_in_the_state_before_its_step(trace, B, shrink, alignment):
    p, steps = trace
    r = len(steps)
    prompt, ids = 1000 + np.arange(p), 1 + np.arange(r)
    item = trace_item(prompt, ids, steps, block_size=B, mask_id=M, shrink=shrink, alignment=alignment)
    np.testing.assert_array_equal(np.sort(item.target_pos), np.arange(r))
    shrunk = shrunk_steps(p, steps, B, shrink, alignment)
    canvas = np.concatenate([prompt, ids])
    for group, start in enumerate(item.group_start):
        mine = item.target_pos[item.target_group == group]
        (step,) = set(shrunk[mine])
        for column, token in enumerate(item.group_ids[group]):
            position = start + column
            if position < p:
                assert token == canvas[position]
            elif position < p + r:
                assert token == (canvas[position] if shrunk[position - p] < step else M)
            else:
                assert token == M
    np.testing.assert_array_equal(item.clean, canvas[: item.group_start[-1]])
    np.testing.assert_array_equal((item.group_start - item.grid_offset) % B, 0)
    assert (shrunk >= steps).all() and set(shrunk) <= set(steps)


def test_full_attention_is_one_block_as_long_as_the_canvas():
    """Prompt of 5, response of 8, two more positions on the canvas."""
    item = trace_item(PROMPT, IDS, STEPS, block_size=len(PROMPT) + len(IDS) + 2, mask_id=M)
    assert len(item.clean) == 0 and not item.group_start.any()
    for ids, state in zip(item.group_ids, np.unique(STEPS), strict=True):
        hidden = np.asarray(STEPS) >= state
        np.testing.assert_array_equal(ids, [*PROMPT, *np.where(hidden, M, IDS), M, M])
    np.testing.assert_array_equal(np.unique(STEPS)[item.target_round], np.asarray(STEPS)[item.target_pos])


def test_slices():
    masked = np.isin(np.arange(len(IDS)), [1, 3, 4])
    slices = np.arange(len(IDS)) // 3
    item = slices_item(PROMPT, IDS, masked, slices, canvas=len(PROMPT) + len(IDS), mask_id=M)
    p = len(PROMPT)
    first, second = (ids[p:].tolist() for ids in item.group_ids)
    assert first == [IDS[0], M, IDS[2], *[M] * (len(IDS) - 3)]
    assert second == [*IDS[:3], M, M, IDS[5], *[M] * (len(IDS) - 6)]
    assert list(item.target_pos) == [1, 3, 4] and list(item.target_round) == [0, 1, 1]
    one = slices_item(PROMPT, IDS, masked, slices, canvas=len(PROMPT) + len(IDS), mask_id=M, chosen=[1])
    assert list(one.target_pos) == [3, 4] and one.group_ids[0, p:].tolist() == second


def test_causal_item_trains_the_clean_stream():
    weights = np.ones(len(IDS))
    weights[2] = 0
    item = causal_item(PROMPT, IDS, weights=weights)
    assert list(item.clean) == [*PROMPT, *IDS] and item.block_size == 1 and len(item.group_ids) == 0
    np.testing.assert_array_equal(item.clean[item.target_column], item.target_ids)
    assert 2 not in item.target_pos and len(item.target_pos) == len(IDS) - 1
