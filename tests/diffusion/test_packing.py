"""Packed rows: layout, sizes, and equality with the reference's one row per round."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replay_utils import fill_up, pack_to, visible

from tracerl_jax.diffusion.grid import round_up
from tracerl_jax.diffusion.packing import pack
from tracerl_jax.diffusion.replay import causal_item, masking_item, trace_item
from tracerl_jax.diffusion.rounds import round_rows, trace_states
from tracerl_jax.errors import DataError
from tracerl_jax.models import Model, ModelConfig
from tracerl_jax.rl.logprobs import packed_logprobs
from tracerl_jax.rl.objectives import policy_loss

MASK, PAD, V = 30, 31, 32


def item(p=3, r=3, B=2, **options):
    steps = options.pop("steps", np.arange(1, r + 1))
    return trace_item(np.arange(p), 10 + np.arange(r), steps, block_size=B, mask_id=MASK, **options)


def test_the_drawing():
    rows = pack([item()], row_length=12)
    np.testing.assert_array_equal(rows.ids, [[0, 1, 2, 10, 2, MASK, MASK, MASK, 11, MASK, 0, 0]])
    np.testing.assert_array_equal(rows.positions, [[0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 0, 0]])
    lines = [
        "##..........", "##..........", "####........", "####........", "##..##......", "##..##......", "####..##....",
        "####..##....", "####....##..", "####....##..", "............", "............",
    ]  # fmt: skip
    assert ["".join(".#"[int(x)] for x in line) for line in visible(rows)[0]] == lines
    np.testing.assert_array_equal(rows.target_index, [[5, 6, 9]])
    np.testing.assert_array_equal(rows.target_ids, [[10, 11, 12]])
    np.testing.assert_array_equal(rows.target_round, [[0, 0, 1]])
    assert (rows.token_count, rows.target_count) == (10, 3)


def written_out(items, rows):
    """(ids, positions, intervals) of rows with one item each, token by token."""
    N, T = rows.shape
    ids, positions, intervals = np.zeros((N, T), int), np.zeros((N, T), int), np.zeros((N, T, 4), int)
    for n, item in enumerate(items):
        B, c = item.block_size, len(item.clean)
        tokens = [(token, at, (0, ((at - item.grid_offset) // B + 1) * B + item.grid_offset, 0, 0))
                  for at, token in enumerate(item.clean)]  # fmt: skip
        for g, (start, group) in enumerate(zip(item.group_start, item.group_ids, strict=True)):
            tokens += [(token, start + i, (0, start, c + g * B, c + g * B + B)) for i, token in enumerate(group)]
        for column, (token, position, seen) in enumerate(tokens):
            ids[n, column], positions[n, column], intervals[n, column] = token, position, seen
    return ids, positions, intervals


FORMS = {
    "trace": lambda rng, p, r, B: item(p, r, B, steps=rng.integers(1, 5, r), shrink=int(rng.integers(1, 4)),
                                       tail_ids=[7, 8], tail_step_map=[2, 9]),
    "response": lambda rng, p, r, B: item(p, r, B, steps=rng.integers(1, 5, r), alignment="response"),
    "canvas": lambda rng, p, r, B: item(p, r, p + r + B, steps=rng.integers(1, 5, r), shrink=2),
    "masks": lambda rng, p, r, B: masking_item(np.arange(p), 10 + np.arange(r), rng.random(r) < 0.7, block_size=B,
                                               mask_id=MASK),
    "causal": lambda rng, p, r, B: causal_item(np.arange(p), 10 + np.arange(r)),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_rows_made_by_the_device_are_those_written_out(form):
    """On the host, inside a jitted function, and token by token."""
    rng = np.random.default_rng(0)
    items = [FORMS[form](rng, *map(int, rng.integers(1, 12, 2)), int(rng.integers(1, 6))) for _ in range(24)]
    single = [piece for i in items for piece in i.pieces() if piece.size]
    rows = [pack([piece], row_length=96) for piece in single]
    assert all(len(row.ids) == 1 for row in rows)
    for piece, row in zip(single, rows, strict=True):
        for got, want in zip((row.ids, row.positions, row.intervals), written_out([piece], row), strict=True):
            assert got.dtype == np.int32
            np.testing.assert_array_equal(got, want)
    together = pack(items, row_length=96)
    on_device = jax.jit(lambda rows: (rows.ids, rows.positions, rows.intervals))(together)
    for got, want in zip(on_device, (together.ids, together.positions, together.intervals), strict=True):
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, want)


def test_whole_canvases_are_sent_once_with_few_targets():
    """256 states of one response: the host has its ids and steps in each row, not the states."""
    rows = pack([item(p=100, r=256, B=512)], row_length=1024)
    assert rows.shape == (128, 1024) and rows.target_ids.shape == (128, 16)
    sent, written = sum(x.nbytes for x in jax.tree.leaves(rows)), sum(x.nbytes for x in (rows.ids, rows.intervals))
    assert sent < 0.45 * written


def test_items_of_a_row_do_not_see_each_other():
    rows = pack([item(), item(p=5, r=4)], row_length=64)
    mask = visible(rows)[0]
    first = item(p=5, r=4).size  # the larger one comes first
    assert not mask[:first, first:].any() and not mask[first:, :first].any()
    alone = visible(pack([item()], row_length=10))[0]
    np.testing.assert_array_equal(mask[first : first + 10, first : first + 10], alone)


def test_first_fit_by_size_is_deterministic():
    items = [item(r=r) for r in (2, 7, 4, 7, 1)]
    rows = pack(items, row_length=40)
    again = pack(items, row_length=40)
    placed = [list(dict.fromkeys(row[row >= 0].tolist())) for row in rows.target_item]
    assert [i.size for i in items] == [8, 22, 14, 22, 4]
    assert placed == [[1, 2, 4], [3, 0]]
    jax.tree.map(np.testing.assert_array_equal, rows, again)


def test_shapes_come_from_few_buckets():
    shapes = set()
    for r in range(1, 60):
        rows = pack([item(p=2, r=r)] * 3, row_length=(64, 256, 1024), rows_multiple=4)
        N, T = rows.ids.shape
        assert T == min(t for t in (64, 256, 1024) if item(p=2, r=r).size <= t) and N % 4 == 0
        assert rows.target_ids.shape[1] % (T // 4) == 0
        shapes.add((T, *(x.shape for x in jax.tree.leaves(rows))))
    assert len(shapes) <= 20


def test_too_long_an_item_names_the_knobs():
    with pytest.raises(DataError, match=r"response 1 needs 22 tokens .* row_length is 16.*at least 22.*max_tokens"):
        pack([item(), item(r=7)], row_length=16)


def test_items_without_targets_take_no_room():
    empty = trace_item([1, 2], [], [], block_size=2, mask_id=MASK)
    hidden = masking_item([1, 2], [3, 4], [False, False], block_size=2, mask_id=MASK)
    rows = pack([empty, item(), hidden], row_length=10, targets_multiple=1)
    assert len(rows.ids) == 1 and set(rows.target_item.ravel()) == {1}
    assert [len(x) for x in rows.scatter(rows.target_weight)] == [0, 3, 2]
    nothing = pack([], row_length=16, rows_multiple=2)
    assert nothing.ids.shape == (2, 16) and nothing.token_count == 0 and nothing.scatter(nothing.target_weight) == []


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=8), st.integers(1, 5), st.randoms(use_true_random=False))
def test_scatter_undoes_gather_also_through_split(lengths, n, random):
    items = [item(r=r, steps=np.array([random.randint(1, 5) for _ in range(r)], int)) for r in lengths]
    rows = pack(items, row_length=128)
    per_item = [np.arange(r, dtype=np.float32) + 100 * i for i, r in enumerate(lengths)]
    for got, want in zip(rows.scatter(rows.gather(per_item)), per_item, strict=True):
        np.testing.assert_array_equal(got, want)
    parts = rows.split(n)
    assert all(len(part.ids) == n for part in parts)
    together = np.concatenate([part.gather(per_item) for part in parts])
    np.testing.assert_array_equal(together[: len(rows.ids)], rows.gather(per_item))
    assert not together[len(rows.ids) :].any()
    assert sum(part.target_count for part in parts) == rows.target_count == sum(lengths)
    assert sum(part.token_count for part in parts) == rows.token_count == sum(i.size for i in items)
    scalars = rows.gather(range(len(lengths)))
    np.testing.assert_array_equal(scalars[rows.target_item >= 0], rows.target_item[rows.target_item >= 0])


def test_response_lens_do_not_enter_compilation():
    traced = []
    count = jax.jit(lambda rows: traced.append(1) or rows.ids.sum())
    count(pack([item(r=2)], row_length=32))
    count(pack([item(r=1), item(r=1)], row_length=32))
    assert len(traced) == 1


# Packed rows against one row per round

MODEL = Model(
    ModelConfig(vocab_size=V, width=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=24,
                mask_token_id=MASK)
)  # fmt: skip
MAX_P, MAX_R = 18, 9
ROUNDS_SHAPE = (3 * MAX_R, 96, MAX_R)  # at most one round per token


@jax.jit
def loss_and_gradient(params, rows, old, advantages):
    def loss(params):
        logp = packed_logprobs(MODEL, params, rows)[0]
        return policy_loss(logp, old, advantages, rows.target_weight, clip_low=0.2, clip_high=0.2, kl_coef=0.1)[0]

    return jax.value_and_grad(loss)(params)


def with_last_block(p, ids, tail_ids, tail_steps, steps, states, B, alignment):
    """ids and states with the positions behind the response that its last training block still covers."""
    offset = p % B if alignment == "response" else 0
    r = len(ids)
    last_start = (p + r - 1 - offset) // B * B + offset
    room = last_start + B - (p + r)
    tail_ids, tail_steps = tail_ids[:room], tail_steps[:room]
    in_last = p + np.arange(r) >= last_start
    extended = []
    for hidden, selected in states:
        step = steps[selected & in_last].min(initial=99)
        tail_hidden = np.pad(np.asarray(tail_steps, int) >= step, (0, room - len(tail_ids)))
        extended.append((np.append(hidden, tail_hidden), np.pad(selected, (0, room))))
    return np.concatenate([ids, tail_ids, np.full(room - len(tail_ids), MASK)]).astype(int), extended


@st.composite
def problems(draw):
    B = draw(st.sampled_from([1, 2, 4, 8, 16]))
    common = dict(block_size=B, mask_id=MASK, alignment=draw(st.sampled_from(["absolute", "response"])))
    shrink = draw(st.integers(1, 4))
    method = draw(st.sampled_from(["tracerl", "tracerl", "masking"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    items, prompts, responses, states = [], [], [], []
    for _ in range(draw(st.integers(1, 3))):
        p, r = draw(st.integers(1, MAX_P)), draw(st.integers(1, MAX_R))
        prompt, ids = rng.integers(0, MASK, p), rng.integers(0, MASK, r)
        if method == "masking":
            mask = rng.random(r) < 0.5
            items.append(masking_item(prompt, ids, mask, **common))
            rounds, steps, tail = [(mask, mask)], np.ones(r, int), 0
        else:
            steps = rng.integers(1, draw(st.integers(2, 9)), r)
            tail = draw(st.integers(0, 3))
            rounds = trace_states(p, steps, block_size=B, shrink=shrink, alignment=common["alignment"])
        tail_ids, tail_steps = rng.integers(0, MASK, tail), rng.integers(1, 9, tail)
        if method == "tracerl":
            items.append(
                trace_item(prompt, ids, steps, shrink=shrink, tail_ids=tail_ids, tail_step_map=tail_steps, **common)
            )
        response, rounds = with_last_block(p, ids, tail_ids, tail_steps, steps, rounds, B, common["alignment"])
        prompts.append(prompt)
        responses.append(response)
        states.append(rounds)
    return items, round_rows(prompts, responses, states, pad_id=PAD, **common), rng


@settings(max_examples=40, deadline=None)
@given(problems(), st.sampled_from([256, 768]))
def test_packed_rows_equal_rounds(problem, row_length):
    items, rounds, rng = problem
    N = round_up(3 * 256, row_length) // row_length
    packed = pack_to(items, (N, row_length, 3 * MAX_R))
    assert packed.target_count == rounds.target_count and len(packed.ids) == N
    rounds = fill_up(rounds, ROUNDS_SHAPE)
    params = MODEL.init(jax.random.key(rng.integers(1000)))
    params = jax.tree.map(lambda x: x * 8 if x.ndim > 2 else x, params)  # sharp enough for attention to matter
    # The rounds' responses include the rest of their last block: the packed ones are prefixes of them.
    old = [-3.5 + 0.3 * rng.normal(size=r) for r in rounds.response_lens]
    advantages = [rng.normal(size=r) for r in rounds.response_lens]
    results = []
    for rows in (packed, rounds):
        own = [[x[:r] for x, r in zip(xs, rows.response_lens, strict=True)] for xs in (old, advantages)]
        results.append(loss_and_gradient(params, rows, *map(rows.gather, own)))
    (loss, gradient), (want_loss, want_gradient) = results
    np.testing.assert_allclose(loss, want_loss, rtol=1e-5, atol=1e-5)
    scale = max(np.abs(g).max() for g in jax.tree.leaves(want_gradient))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale), gradient, want_gradient)
