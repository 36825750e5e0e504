"""The reference's training rows, integer for integer."""

import numpy as np
import pytest
from golden_utils import GOLDEN, NAMES, Arrays
from replay_utils import case_names, load_case, target_mask, visible

from tracerl_jax.diffusion.replay import shrunk_steps
from tracerl_jax.diffusion.rounds import pad_response, round_rows, trace_states

PAD, MASK, B, L0, L1 = 0, 99, 4, 5, 10
PROMPTS = [np.array([11, 12, 13]), np.array([10, 11, 12, 13, 14])]
RESPONSES = [np.arange(21, 29), np.arange(31, 41)]
TRACES = [[1, 2, 2, 3, 6, 4, 5, 6], [2, 1, 2, 1, 3, 3, 3, 3, 5, 4]]


def appendix_a(shrink=1, post_num=0):
    padded = [pad_response(r, s, length=L1, pad_id=PAD) for r, s in zip(RESPONSES, TRACES, strict=True)]
    states = [trace_states(len(p), s, block_size=B, shrink=shrink) for p, (_, s) in zip(PROMPTS, padded, strict=True)]
    responses = [r for r, _ in padded]
    return round_rows(PROMPTS, responses, states, block_size=B, mask_id=MASK, pad_id=PAD, post_num=post_num)


def test_published_rows():
    rows = appendix_a()
    noisy = [
        "99 99 99 99 99 99 99 99 99 99",
        "21 99 99 99 99 26 99 99 0 0",
        "21 22 23 99 99 26 27 99 0 0",
        "99 99 99 99 99 99 99 99 99 99",
        "99 32 99 34 35 36 37 38 99 40",
    ]
    assert [" ".join(map(str, row[L0 + L1 :])) for row in rows.ids] == noisy
    np.testing.assert_array_equal(rows.ids[0, : L0 + L1], [0, 0, 11, 12, 13, 21, 22, 23, 24, 25, 26, 27, 28, 0, 0])
    masks = ["1000010000", "0110001000", "0001100100", "0101111101", "1010000010"]
    assert ["".join(str(int(x)) for x in row) for row in target_mask(rows, L1)] == masks
    np.testing.assert_array_equal(rows.target_item[:, 0], [0, 0, 0, 1, 1])
    np.testing.assert_array_equal(rows.positions[0], [1, 1, *range(13), *range(3, 13)])
    np.testing.assert_array_equal(rows.positions[3], [*range(15), *range(5, 15)])


def test_post_num_adds_the_first_pad():
    more = target_mask(appendix_a(post_num=1), L1) & ~target_mask(appendix_a(post_num=0), L1)
    np.testing.assert_array_equal(np.argwhere(more), [[0, 8]])


@pytest.mark.parametrize(("shrink", "count"), [(1, 5), (2, 3), (3, 2), (4, 2)])
def test_row_counts(shrink, count):
    assert len(appendix_a(shrink=shrink).ids) == count


def test_published_mask():
    lines = {
        (0,): "#........................",
        (1, 2, 3, 4): "..###....................",
        (5, 6, 7, 8): "..#######................",
        (9, 10, 11, 12): "..###########............",
        (13, 14): "..#############..........",
        (15, 16, 17, 18): "..###..........####......",
        (19, 20, 21, 22): "..#######..........####..",
        (23, 24): "..###########..........##",
    }
    mask = visible(appendix_a())[0]
    for columns, line in lines.items():
        for column in columns:
            assert "".join(".#"[int(x)] for x in mask[column]) == line


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("file", "case"), [(f, c) for f in ("tracerl", "value", "sft") for c in case_names(f)])
def test_golden_rows(name, file, case):
    case = load_case(Arrays(GOLDEN / name), file, case)
    rows, meta, data = case.rows, case.meta, case.data
    L0, L1 = meta["L0"], meta["L1"]
    np.testing.assert_array_equal(rows.ids, data["ext_ids"])
    np.testing.assert_array_equal(rows.positions, data["positions"])
    np.testing.assert_array_equal(visible(rows), data["attn_mask"])
    np.testing.assert_array_equal(target_mask(rows, L1), data["p_mask"][:, L0:])
    assert not data["p_mask"][:, :L0].any()
    sequences = len(data["input_ids"])
    np.testing.assert_array_equal(rows.target_item[:, 0] % sequences, data["row_seq"])
    real = rows.target_item >= 0
    n = np.nonzero(real)[0]
    labels = data["labels"] if "labels" in data else data["input_ids"][data["row_seq"]]
    np.testing.assert_array_equal(rows.target_ids[real], labels[n, L0 + rows.target_pos[real]])
    np.testing.assert_array_equal(rows.target_index[real], L0 + L1 + rows.target_pos[real])
    if "step_map" in data:
        np.testing.assert_array_equal(np.stack(case.steps[:sequences]), data["step_map"])
    if "step_map_shrunk" in data:
        shrunk = [
            shrunk_steps(len(p), s, meta["block_size"], meta["shrink"], "response")
            for p, s in zip(case.prompts, case.steps, strict=True)
        ]
        np.testing.assert_array_equal(np.stack(shrunk), data["step_map_shrunk"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", case_names("tracerl"))
def test_items_count_the_same_rounds(name, case):
    case = load_case(Arrays(GOLDEN / name), "tracerl", case)
    assert sum(item.rounds for item in case.items()) == case.meta["rows"]
