"""Dream, LLaDA and MMaDA against recorded forwards: pads hidden and visible, causal, with a stale prefix cache."""

import jax.numpy as jnp
import numpy as np
import pytest
from golden_utils import FULL_NAMES, load_golden

from tracerl_jax.kernels.decode import KVCache
from tracerl_jax.models import Model
from tracerl_jax.models.visibility import row_intervals


def forward(name, ids, mode="full", first=0):
    """Hidden states, logits, and keys and values; positions count pads too."""
    golden = load_golden(name)
    model, ids = Model(golden.config), ids.astype(np.int32)
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    intervals = jnp.broadcast_to(row_intervals(mode, ids.shape[1], first=first), (*ids.shape, 4))
    hidden, kv = model.hidden_and_kv(golden.params, ids, positions, intervals)
    return hidden, model.logits(golden.params, hidden), kv


def assert_logits(got, want, where=slice(None)):
    np.testing.assert_allclose(np.asarray(got)[where], want[where], atol=5e-4, rtol=0)


@pytest.mark.parametrize("name", FULL_NAMES)
def test_unpadded_rows(name):
    case = load_golden(name).arrays("forward", "plain")
    hidden, logits, _ = forward(name, case["input_ids"])
    assert_logits(logits, case["logits"])
    np.testing.assert_allclose(hidden[1], case["hidden_row1"][-1], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "case", "mode", "visible_pads", "logits"),
    [
        ("dream_tiny", "keymask", "full", False, "logits"),
        ("dream_tiny", "qkmask", "full", False, "logits"),
        ("dream_tiny", "causal", "causal", False, "logits"),
        ("llada_tiny", "leftpad", "full", False, "logits_without_pads"),
        ("llada_tiny", "leftpad", "full", True, "logits"),
        ("mmada_tiny", "leftpad", "full", False, "logits_without_pads"),
        ("mmada_tiny", "leftpad", "full", True, "logits"),
    ],
)
def test_left_padded_rows(name, case, mode, visible_pads, logits):
    """Pads are hidden by default; visible, as in the published code of LLaDA and MMaDA, they are tokens like others."""
    arrays = load_golden(name).arrays
    case = arrays("forward", "keymask" if case == "qkmask" else case) | arrays("forward", case)
    valid = case["valid"]
    first = 0 if visible_pads else valid.argmax(axis=1)
    _, got, _ = forward(name, case["input_ids"], mode, first)
    assert_logits(got, case[logits], valid)


@pytest.mark.parametrize("name", FULL_NAMES)
def test_a_padded_row_is_the_unpadded_one(name):
    ids = load_golden(name).arrays("forward", "plain")["input_ids"][:1]
    padded = np.concatenate([np.full((1, 3), 7), ids], axis=1)
    assert_logits(forward(name, padded, first=3)[1][:, 3:], np.asarray(forward(name, ids)[1]))


@pytest.mark.parametrize("name", FULL_NAMES)
def test_a_window_against_a_stale_prefix_cache(name):
    """The prefix's keys and values were computed while the positions behind it held other tokens."""
    golden = load_golden(name)
    case = golden.arrays("forward", "cache")
    prefix, model = int(case["prefix_len"]), Model(golden.config)
    *_, kv = forward(name, case["input_ids_build"])
    cache = KVCache.from_tokens(*(leaf[:, :, :prefix] for leaf in kv))
    step = case["input_ids_step"].astype(np.int32)
    for end, key in ((step.shape[1], "window_logits_full"), (int(case["window_end"]), "window_logits_short")):
        window = step[:, prefix:end]
        positions = np.broadcast_to(np.arange(prefix, end, dtype=np.int32), window.shape)
        hidden, _ = model.decode(golden.params, window, positions, cache, np.full(len(step), prefix, np.int32))
        assert_logits(model.logits(golden.params, hidden), case[key])
    assert_logits(forward(name, step)[1][:, prefix:], case["exact_logits"])


def test_image_rows_of_the_vocabulary():
    case = load_golden("mmada_tiny").arrays("forward", "image")
    assert case["input_ids"].max() >= load_golden("mmada_tiny").config.text_vocab_size
    assert_logits(forward("mmada_tiny", case["input_ids"])[1], case["logits"])


@pytest.mark.parametrize(("mode", "ends"), [
    ("full", [0, 0, 7, 7, 7, 7, 7]), ("causal", [0, 0, 3, 4, 5, 6, 7]), ("block_causal", [0, 0, 4, 4, 6, 6, 7])])
def test_row_intervals(mode, ends):
    """Two pads, then five tokens; blocks of 2."""
    intervals = np.asarray(row_intervals(mode, 7, first=jnp.array([2, 0]), block_size=2))
    seen = intervals[0, :, 0] < intervals[0, :, 1]
    np.testing.assert_array_equal(seen, [False, False, True, True, True, True, True])
    np.testing.assert_array_equal(intervals[0, seen, :2], [(2, end) for end in ends[2:]])
    assert not intervals[..., 2:].any() and intervals[1, :, 0].tolist() == [0] * 7
