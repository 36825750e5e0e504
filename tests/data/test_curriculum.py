"""The curriculum: what it draws, exact resume, and what it refuses."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracerl_jax.config import RLSection
from tracerl_jax.data.curriculum import SuccessRateCurriculum, open_iterator
from tracerl_jax.data.iterator import PromptIterator
from tracerl_jax.errors import DataError


def curriculum(count, seed=0, momentum=0.5, floor=0.1):
    return SuccessRateCurriculum(count, seed, momentum=momentum, floor=floor)


def drawn_by_rate(rates, draws=2000, **kwargs):
    """How often each problem is drawn, one at a time, when its success rate is known."""
    one = curriculum(len(rates), **kwargs)
    one.record(range(len(rates)), rates)
    return np.bincount([one.next(1)[0] for _ in range(draws)], minlength=len(rates)) / draws


def test_problems_solved_half_the_time_are_drawn_most():
    shares = drawn_by_rate([0.0, 0.25, 0.5, 0.75, 1.0], floor=0.1)
    weights = np.array([0.1, 0.775, 1.0, 0.775, 0.1])
    np.testing.assert_allclose(shares, weights / weights.sum(), atol=0.03)
    np.testing.assert_allclose(drawn_by_rate([0.0, 0.5, 1.0], floor=1.0), 1 / 3, atol=0.04)


def test_what_is_not_known_counts_as_half():
    np.testing.assert_allclose(drawn_by_rate([np.nan, 0.5]), 0.5, atol=0.04)


def test_a_batch_repeats_nothing_until_all_are_used():
    one = curriculum(5)
    assert sorted(one.next(5)) == [0, 1, 2, 3, 4]
    batch = one.next(12)
    assert len(batch) == 12 and set(np.bincount(batch, minlength=5)) <= {2, 3}
    assert one.next(0).shape == (0,)


def test_what_is_to_be_avoided_comes_last():
    one = curriculum(6)
    one.record(range(6), [0.5, 0.5, 0.5, 0.0, 0.0, 0.0])
    for _ in range(20):
        assert set(one.next(3, avoid=[0, 1, 2])) == {3, 4, 5}
        assert len(set(one.next(5, avoid=[0, 1, 2])) & {3, 4, 5}) == 3


def test_success_rates_run():
    one = curriculum(3, momentum=0.75)
    one.record([0, 1, 0], [1.0, np.nan, 0.5])
    assert one.state()["rates"] == {"0": 0.75 * 1.0 + 0.25 * 0.5}
    assert one.metrics()["curriculum/seen_fraction"] == pytest.approx(1 / 3)
    assert one.metrics()["curriculum/success_rate"] == 0.875


def test_draws_are_pinned():
    """They are part of what a checkpoint means, so they may never change."""
    one = curriculum(8)
    one.record([0, 1, 2], [0.0, 1.0, 0.5])
    assert [one.next(4).tolist() for _ in range(3)] == [[3, 6, 4, 5], [4, 6, 3, 5], [6, 4, 3, 7]]


@settings(deadline=None)
@given(
    st.integers(1, 12), st.lists(st.tuples(st.integers(0, 15), st.floats(0, 1)), max_size=6), st.integers(0, 6),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_resume_is_exact(count, steps, cut, seed):
    def run(stop):
        one, drawn = curriculum(count, seed), []
        for step, (batch, rate) in enumerate(steps):
            if step == stop:
                state = json.loads(json.dumps(one.state()))
                one = curriculum(count, seed=12345)
                one.restore(state)
            new = one.next(batch)
            one.record(new, (rate + np.arange(batch) / 7) % 1)
            drawn.append(new.tolist())
        return drawn, one.state()

    assert run(cut) == run(None)


def test_no_rows_and_shrunk_data():
    with pytest.raises(DataError, match="no rows"):
        curriculum(0)
    one = curriculum(10)
    one.record([9], [0.5])
    with pytest.raises(DataError, match=r"of 10 rows or more, but the data has 5 rows; resume with the same data"):
        curriculum(5).restore(one.state())


def test_the_config_chooses():
    assert isinstance(open_iterator(3, 0, RLSection()), PromptIterator)
    one = open_iterator(3, 7, RLSection(curriculum="success_rate", curriculum_momentum=0.9, curriculum_floor=0.2))
    assert (one.seed, one.momentum, one.floor) == (7, 0.9, 0.2)
