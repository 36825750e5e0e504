"""Group statistics and GAE over trace steps against worked numbers of the published code and brute force."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracerl_jax.rl.advantages import accuracy_filter, group_zscore, leave_one_out, reward_array, trace_gae, whiten

GOLDEN = Path(__file__).parents[1] / "golden"


# --- groups -----------------------------------------------------------------------------------------------------------


def test_zscore_uses_the_population_deviation_per_group():
    advantages = group_zscore([1.0, 7.0, 0.0, 0.0, 5.0], [3, 0, 3, 3, 0])
    np.testing.assert_allclose(advantages, [np.sqrt(2), 1.0, -np.sqrt(0.5), -np.sqrt(0.5), -1.0], rtol=1e-6)
    assert advantages.dtype == np.float32


@pytest.mark.parametrize("reward", [0.0, 0.1, 1.0, 1e6 + 0.1])
def test_zscore_of_equal_rewards_is_zero(reward):
    np.testing.assert_array_equal(group_zscore([reward] * 7, [0] * 7), np.zeros(7))


def test_zscore_keeps_small_but_real_differences():
    np.testing.assert_allclose(group_zscore([1.0, 1.0 + 1e-6], [0, 0]), [-1, 1], rtol=1e-5)


def test_leave_one_out_is_the_reward_minus_the_mean_of_the_others():
    np.testing.assert_allclose(leave_one_out([1.0, 0.0, 0.5, 2.0], [0, 0, 0, 1]), [0.75, -0.75, 0.0, 0.0])


@pytest.mark.parametrize("estimator", [group_zscore, leave_one_out])
def test_no_verdict_takes_no_part(estimator):
    rewards, groups = [1.0, 0.0, 0.0], [0, 0, 0]
    with_gaps = estimator([None, 1.0, 0.0, float("nan"), 0.0, None], [0, 0, 0, 0, 0, 1])
    np.testing.assert_array_equal(with_gaps[[1, 2, 4]], estimator(rewards, groups))
    np.testing.assert_array_equal(with_gaps[[0, 3, 5]], 0)


def test_reward_array_marks_missing_verdicts():
    np.testing.assert_array_equal(reward_array([1, None, 0.5]), [1.0, np.nan, 0.5])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_accuracy_filter_includes_its_bounds(dtype):
    accuracy = np.array([0.0, 0.1, 0.2, 0.5, 0.8, 0.85, 1.0, np.nan], dtype)
    np.testing.assert_array_equal(accuracy_filter(accuracy, 0.2, 0.8), [0, 0, 1, 1, 1, 0, 0, 0])


def test_whiten_uses_trainable_tokens_of_the_whole_update():
    rng = np.random.default_rng(0)
    advantages = [rng.normal(3, 2, n).astype(np.float32) for n in (5, 1, 9)]
    trainable = [np.ones(5, bool), np.ones(1, bool), np.arange(9) % 2 == 0]
    out = whiten(advantages, trainable)
    tokens = np.concatenate([a[t] for a, t in zip(out, trainable, strict=True)])
    assert abs(tokens.mean()) < 1e-6 and abs(tokens.std() - 1) < 1e-6
    np.testing.assert_array_equal(out[2][1::2], 0)


def test_whiten_of_equal_advantages_only_centres():
    np.testing.assert_allclose(whiten([np.full(3, 0.7)], [np.ones(3, bool)])[0], np.zeros(3), atol=1e-12)
    assert whiten([], []) == []


# --- worked GAE numbers (two traces, value of response index i = 0.1 (i + 1)) ----------------------------------------

STEPS_A, TRAINABLE_A, REWARD_A = [1, 2, 2, 3, 6, 4, 5, 6, 7, 7], [True] * 8 + [False] * 2, 1.5
STEPS_B, TRAINABLE_B, REWARD_B = [2, 1, 2, 1, 3, 3, 3, 3, 5, 4], [True] * 10, -0.5
VALUES = 0.1 * np.arange(1, 11)
VECTOR_A = [0, 0, 0.5, 0, 0, 0, -1, 1, 0, 0]
VECTOR_B = [0, 0, 0, 0, 0, 0.2, 0, 0, 1, 0]

A = (STEPS_A, TRAINABLE_A)
B = (STEPS_B, TRAINABLE_B)
R_09_A = [0.88573, 0.98415, 0.98415, 1.0935, 1.5, 1.215, 1.35, 1.5, 0, 0]
A_09_A = [0.42154, 0.46186, 0.36186, 0.41924, 1.0, 0.38784, 0.497, 0.7, 0, 0]
R_09_B = [-0.3645, -0.32805, -0.3645, -0.32805, -0.405, -0.405, -0.405, -0.405, -0.5, -0.45]
A_09_B = [0.04396, -0.06035, -0.15604, -0.26035, -0.46256, -0.56256, -0.66256, -0.76256, -1.4, -1.198]
R_099_A = [1.42649, 1.44089, 1.44089, 1.45545, 1.5, 1.47015, 1.485, 1.5, 0, 0]
A_099_A = [1.32649, 1.24089, 1.14089, 1.05545, 1.0, 0.87015, 0.785, 0.7, 0, 0]
R_VEC_A = [-0.13585, -0.40095, 0.09905, -0.4455, 0, -0.495, -0.55, 1, 0, 0]
A_VEC_A = [0.13931, -0.18013, 0.21987, -0.4724, -0.5, -0.85056, -1.223, 0.2, 0, 0]
R_VEC_B = [0.774, 0.6966, 0.774, 0.6966, 0.81, 1.01, 0.81, 0.81, 1, 0.9]
A_VEC_B = [0.63983, 0.36868, 0.43983, 0.16868, 0.31504, 0.41504, 0.11504, 0.01504, 0.1, -0.118]


@pytest.mark.parametrize(
    ("trace", "reward", "gamma", "lam", "returns", "advantages"),
    [
        (A, REWARD_A, 1, 1, [1.5] * 8 + [0, 0], [1.4, 1.3, 1.2, 1.1, 1.0, 0.9, 0.8, 0.7, 0, 0]),
        (B, REWARD_B, 1, 1, [-0.5] * 10, [-0.6, -0.7, -0.8, -0.9, -1.0, -1.1, -1.2, -1.3, -1.4, -1.5]),
        (A, REWARD_A, 1, 0, [1.5] * 8 + [0, 0], [0.15, 0.2, 0.1, 0.2, 1.0, 0.1, -0.05, 0.7, 0, 0]),
        (B, REWARD_B, 1, 0, [-0.5] * 10, [0.55, 0, 0.35, -0.2, 0.5, 0.4, 0.3, 0.2, -1.4, -0.1]),
        (A, REWARD_A, 0.9, 0.8, R_09_A, A_09_A),
        (B, REWARD_B, 0.9, 0.8, R_09_B, A_09_B),
        (A, REWARD_A, 0.99, 1, R_099_A, A_099_A),
        (A, VECTOR_A, 0.9, 0.8, R_VEC_A, A_VEC_A),
        (B, VECTOR_B, 0.9, 0.8, R_VEC_B, A_VEC_B),
    ],
)
def test_worked_numbers(trace, reward, gamma, lam, returns, advantages):
    got_returns, got_advantages = trace_gae(trace[0], VALUES, reward, trace[1], gamma, lam)
    np.testing.assert_allclose(got_returns, returns, atol=6e-6)  # the numbers are given to five digits
    np.testing.assert_allclose(got_advantages, advantages, atol=6e-6)


def test_reward_on_an_untrainable_last_token():
    """Seven tokens, then an end token alone in the last step that is not trained: a vector reward there is lost."""
    steps, trainable = [1, 1, 2, 2, 3, 3, 4, 5], [True] * 7 + [False]
    lost, _ = trace_gae(steps, np.zeros(8), [0.0] * 7 + [1.0], trainable, 1.0, 1.0)
    np.testing.assert_array_equal(lost, np.zeros(8))
    kept, _ = trace_gae(steps, np.zeros(8), 1.0, trainable, 1.0, 1.0)
    np.testing.assert_array_equal(kept, [1.0] * 7 + [0.0])


def test_nothing_trainable():
    returns, advantages = trace_gae([1, 2], [0.5, 0.5], 1.0, [False, False], 1.0, 1.0)
    np.testing.assert_array_equal(np.stack([returns, advantages]), np.zeros((2, 2)))


# --- golden files -----------------------------------------------------------------------------------------------------


def _value_cases():
    for folder in ("sdar_tiny", "sdar_tied"):
        meta = json.loads(str(np.load(GOLDEN / folder / "value.npz")["meta"]))
        yield from ((folder, case) for case in meta)


@pytest.mark.parametrize(("folder", "case"), list(_value_cases()))
def test_golden_returns_and_advantages(folder, case):
    z = np.load(GOLDEN / folder / "value.npz")
    meta = json.loads(str(z["meta"]))[case]
    start, length = meta["L0"], meta["L1"]
    steps = z[f"{case}.step_map_shrunk"]
    row_seq, targets = z[f"{case}.row_seq"], z[f"{case}.p_mask"][:, start:]
    for k, (gamma, lam) in enumerate(meta["gammas_lambdas"]):
        want = [z[f"{case}.g{k}.{name}"][:, start:] for name in ("returns", "advantages")]
        for s in range(len(steps)):
            rows = row_seq == s
            trainable = targets[rows].any(axis=0)  # every trainable position is a target of exactly one row
            values = np.where(targets[rows], z[f"{case}.old_values"][rows, start:], 0).sum(axis=0)
            if meta["vector_reward"]:
                reward = np.zeros(length)
                given = z[f"{case}.reward_vec"][s, : min(length, int(z[f"{case}.reward_len"][s]))]
                reward[: len(given)] = given
            else:
                reward = z[f"{case}.reward"][s]
            got = trace_gae(steps[s], values, reward, trainable, gamma, lam)
            for ours, theirs in zip(got, want, strict=True):
                expected = np.where(targets[rows], theirs[rows], 0).sum(axis=0)
                np.testing.assert_allclose(ours, expected, atol=5e-6, err_msg=f"{case} g{k} sequence {s}")


# --- laws -------------------------------------------------------------------------------------------------------------

traces = st.integers(1, 12).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(1, 8), min_size=n, max_size=n),
        st.lists(st.floats(-3, 3), min_size=n, max_size=n),
        st.lists(st.booleans(), min_size=n, max_size=n).filter(any),
        st.floats(-2, 2),
    )
)


@given(traces)
def test_undiscounted_scalar_reward_reaches_every_token(trace):
    steps, values, trainable, reward = trace
    returns, advantages = trace_gae(steps, values, reward, trainable, 1.0, 1.0)
    np.testing.assert_allclose(returns, np.where(trainable, reward, 0), atol=1e-6)
    np.testing.assert_allclose(advantages, np.where(trainable, reward - np.array(values), 0), atol=1e-5)


@given(traces, st.floats(0, 1))
def test_lambda_one_is_return_minus_value(trace, gamma):
    """Telescoping: with lam = 1 the token's advantage is its own return minus its own value, for any discount."""
    steps, values, trainable, reward = trace
    returns, advantages = trace_gae(steps, values, reward, trainable, gamma, 1.0)
    np.testing.assert_allclose(advantages, np.where(trainable, returns - np.array(values), 0), atol=1e-5)


@given(traces, st.floats(0, 1), st.floats(0, 1))
def test_only_the_order_of_steps_matters(trace, gamma, lam):
    steps, values, trainable, reward = trace
    stretched = [3 * step**2 + 7 for step in steps]
    for a, b in zip(
        trace_gae(steps, values, reward, trainable, gamma, lam),
        trace_gae(stretched, values, reward, trainable, gamma, lam),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=10), st.floats(0, 1), st.floats(0, 1))
def test_one_token_per_step_is_textbook_gae(values, gamma, lam):
    n = len(values)
    rewards = np.linspace(-1, 1, n)
    following = np.append(values[1:], 0.0)
    deltas = rewards + gamma * following - values
    expected = [sum((gamma * lam) ** (j - i) * deltas[j] for j in range(i, n)) for i in range(n)]
    _, advantages = trace_gae(np.arange(1, n + 1), values, rewards, np.ones(n, bool), gamma, lam)
    np.testing.assert_allclose(advantages, expected, atol=1e-5)
