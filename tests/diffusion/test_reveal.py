"""The reveal strategies against their definitions written as loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracerl_jax.diffusion.reveal import STRATEGIES, choose_reveals, scheduled_count, strategy_code
from tracerl_jax.errors import ConfigError

B = 5


def expected(masked, confidence, entropy, strategy, count, threshold, bound):
    positions = [i for i in range(B) if masked[i]]
    surest = sorted(positions, key=lambda i: (-confidence[i], i))
    if strategy == "static":
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
    counts = [int(scheduled_count(jnp.int32(s), jnp.int32(steps), block_size)) for s in range(steps)]
    want = [block_size // steps + (s < block_size % steps) for s in range(steps)]
    assert counts == [max(1, n) for n in want]
    assert sum(want) == block_size


def test_names():
    assert [strategy_code(s) for s in STRATEGIES] == [0, 1, 2, 3]
    assert strategy_code("low_confidence_static") == 0
    assert strategy_code("low_confidence_dynamic") == 1
    for name in ("low_confidence_sequential", "Dynamic", ""):
        with pytest.raises(ConfigError, match="static, dynamic, sequential, entropy_bounded"):
            strategy_code(name)
