"""The reveal strategies against their definitions written as loops."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracerl_jax.diffusion.reveal import SCORES, STRATEGIES, choose_reveals, schedule, score_of, strategy_code
from tracerl_jax.diffusion.sampling import Proposal
from tracerl_jax.errors import ConfigError

B = 5
GOLDEN = Path(__file__).parents[1] / "golden"


def expected(masked, confidence, entropy, strategy, count, threshold, bound):
    positions = [i for i in range(B) if masked[i]]
    surest = sorted(positions, key=lambda i: (-confidence[i], i))
    if strategy in ("static", "linspace"):
        return set(surest[:count])
    if strategy == "dynamic":
        above = {i for i in positions if confidence[i] > threshold}
        return above if len(above) >= count else set(surest[:count])
    if strategy == "sequential":
        return set(positions[:count])
    chosen, total = set(), 0.0
    for i in sorted(positions, key=lambda i: (entropy[i], i)):
        total += entropy[i]
        if total >= bound and chosen:
            break
        chosen.add(i)
    return chosen


# Few distinct values, exact in fp32, so that ties are common and sums do not round.
values = st.lists(st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.75]), min_size=B, max_size=B)
row = st.tuples(
    st.lists(st.booleans(), min_size=B, max_size=B), values, values, st.sampled_from(STRATEGIES),
    st.integers(1, B + 1), st.sampled_from([0.0, 0.25, 0.5, 0.9]), st.sampled_from([0.125, 0.375, 1.0]),
)  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(st.lists(row, min_size=4, max_size=4))
def test_strategies_of_a_mixed_batch(rows):
    masked, confidence, entropy, strategy, count, threshold, bound = zip(*rows, strict=True)
    got = jax.jit(choose_reveals)(
        jnp.array(masked), jnp.array(confidence), jnp.array(entropy), jnp.array([strategy_code(s) for s in strategy]),
        jnp.array(count), jnp.array(threshold), jnp.array(bound),
    )  # fmt: skip
    for n, one in enumerate(rows):
        assert set(np.flatnonzero(got[n])) == expected(*one)
        assert np.asarray(got[n]).any() == any(one[0])


@pytest.mark.parametrize("block_size", [1, 3, 4, 8])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 9])
def test_schedule(block_size, steps):
    counts = schedule("static", block_size, steps)
    want = [block_size // steps + (s < block_size % steps) for s in range(steps)]
    assert counts[:steps].tolist() == [max(1, n) for n in want][:block_size]
    assert sum(want) == block_size
    first = schedule("static", block_size, steps, first_token=True)
    assert first[0] == 1
    assert first[: max(steps, 2)].sum() >= block_size


@pytest.mark.parametrize("folder", ["llada_tiny", "mmada_tiny"])
def test_lladas_transfer_schedule_is_static(folder):
    arrays = np.load(GOLDEN / folder / "sampler.npz")
    for row, length in zip(arrays["transfer_schedule"], arrays["transfer_schedule_len"], strict=True):
        (n, steps), counts = row[:2], row[2:length]
        counts = counts[counts > 0]
        assert schedule("static", int(n), int(steps))[: len(counts)].tolist() == counts.tolist()


def test_dreams_static_schedule():
    arrays = np.load(GOLDEN / "dream_tiny" / "sampler.npz")
    for row, length in zip(arrays["static_counts"], arrays["static_counts_len"], strict=True):
        (steps, n), counts = row[:2], row[2:length]
        counts = counts[counts > 0]  # the others take a forward of the reference and change nothing
        got = schedule("linspace", int(n), int(steps), first_token=True)
        assert got[: len(counts)].tolist() == counts.tolist(), (steps, n)


def test_scores():
    ids = np.array([[3, 4, 5]])
    confidence, entropy, margin = (np.array([x], np.float32) for x in ([0.5, 0.4, 0.3], [1, 2, 3], [0.1, 0.2, 0.0]))
    proposal = Proposal(ids, confidence, confidence, confidence, entropy, margin)

    def score(name, **pad):
        pad = {name: np.array([value]) if name == "pad_penalty" else value for name, value in pad.items()}
        return np.asarray(score_of(proposal, np.array([SCORES.index(name)]), **pad))[0]

    np.testing.assert_array_equal(score("confidence"), confidence[0])
    np.testing.assert_array_equal(score("margin"), margin[0])
    np.testing.assert_array_equal(score("entropy"), -entropy[0])
    np.testing.assert_array_equal(score("uncertainty"), entropy[0])
    # A penalty makes a proposal of the pad token worse, whatever the sign of the score.
    np.testing.assert_allclose(score("confidence", pad_id=4, pad_penalty=4.0), [0.5, 0.1, 0.3])
    np.testing.assert_allclose(score("entropy", pad_id=4, pad_penalty=4.0), [-1, -8, -3])


def test_names():
    assert [strategy_code(s) for s in STRATEGIES] == [0, 1, 2, 3, 4]
    assert strategy_code("low_confidence_static") == 0
    assert strategy_code("low_confidence_dynamic") == 1
    for name in ("low_confidence_sequential", "Dynamic", ""):
        with pytest.raises(ConfigError, match="static, dynamic, sequential, entropy_bounded, linspace"):
            strategy_code(name)
