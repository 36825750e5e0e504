"""The policy gradient of the whole pipeline against the exact gradient of the expected reward of a toy problem.

The toy has 3 tokens (one of them EOS) and MASK, blocks of 3, a prompt of 4 ids and completions of up to 4:

    p0 p1 p2 | p3  a  b |  c  d  -        S = 2 denoise steps per block: two reveals, then what is left

so every way a decode can go is listed, with all its proposals, revealed or not:

    J = sum over paths of R(completion) prod over proposals of pi(token | state)

Which proposals are revealed depends on comparisons of probabilities, which do not change in a small neighbourhood of
the weights, so `jax.grad(J)` with the reveals held fixed is the exact gradient. TraceRL's estimate is

    G = sum over paths of P(path) R(completion) grad sum over the completion's tokens of log pi(token | state at reveal)

It leaves out the proposals that were drawn and thrown away, and the tail behind the completion. With `sequential`
nothing depends on either, and G = grad J. With an order by confidence both have a say in what is revealed next, and G
is biased; the pipeline must still estimate G itself without error, and the bias is measured.

The proposals are drawn from the policy after the ban of MASK. Where the policy gives MASK a noticeable probability, the
gradient of the unbanned log-prob is another one; the toy of the exact test gives it none.
"""

from functools import lru_cache
from itertools import product
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from tracerl_jax.config import ModelSection, RLSection, RolloutSection, RunConfig, ValueSection
from tracerl_jax.data.prompts import Problem
from tracerl_jax.models import Model, ModelConfig
from tracerl_jax.report.metrics import PhaseTimer
from tracerl_jax.rl.experience import Sample, select
from tracerl_jax.rl.loop import update
from tracerl_jax.rl.update import Learner
from tracerl_jax.rollout.engine import Engine, EngineConfig, Request, SamplingOptions
from tracerl_jax.training.guard import NonFiniteGuard

B, V, EOS, MASK, LIMIT = 3, 4, 2, 3, 4
PROMPT = np.array([0, 1, 2, 1], np.int32)
ENDS = (2, 5)  # of the two blocks, counted from the end of the prompt
FREE = ENDS[-1]
MODEL = Model(
    ModelConfig(vocab_size=V, width=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, mlp_width=8,
                block_size=B, mask_token_id=MASK, stop_token_ids=(EOS,))
)  # fmt: skip
ORACLE = Model(MODEL.config.replace(attention="reference"))
UNRAVEL = ravel_pytree(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), MODEL.abstract_params()))[1]
STATES = np.array(list(product(range(V), repeat=FREE)))  # every content of the canvas behind the prompt
ZERO = STATES.size * V  # index of the last entry of a table
MOST = 400  # paths of one case


def case(strategy, **fields):
    return SamplingOptions(strategy, denoising_steps=2, max_tokens=LIMIT, **fields)


COUNT = 8192
SEQUENTIAL, STATIC, DYNAMIC = case("sequential"), case("static", temperature=1.3), case("dynamic", threshold=0.6)


@lru_cache
def toy(mask_probability: bool):
    """Weights with their own, far from uniform, distribution in every state; MASK as probable as the rest, or never."""
    params = jax.tree.map(np.asarray, MODEL.init(jax.random.key(3)))
    params = jax.tree.map(lambda x: x if (x == 1).all() else 10 * x, params)
    if not mask_probability:
        params["embed"]["embedding"][:, 0] = 2
        params["lm_head"]["kernel"][0, MASK] = -20
    return params


def reward(ids) -> float:
    """Any function of the completion will do."""
    return _reward(tuple(map(int, ids)))


@lru_cache
def _reward(ids):
    return np.random.default_rng([7, *ids]).normal()


def log_tables(params, temperature, states):  # [params], [], [n,FREE] -> two of [n * FREE * V + 1]
    """Log-probs of every token at every place of every state, before and after the ban of MASK, and a 0 to point to."""
    params = UNRAVEL(params)
    canvas = jnp.concatenate([jnp.broadcast_to(PROMPT, (len(states), len(PROMPT))), states], axis=1)
    positions = np.broadcast_to(np.arange(canvas.shape[1]), canvas.shape)
    end = (positions // B + 1) * B
    hidden = ORACLE.hidden(params, canvas, positions, np.stack([0 * end, end, 0 * end, 0 * end], -1))
    logits = ORACLE.logits(params, hidden[:, len(PROMPT) :]) / temperature
    banned = logits.at[..., MASK].set(-np.inf)
    return tuple(jnp.append(jax.nn.log_softmax(x), 0.0) for x in (logits, banned))


@jax.jit
def gradient_of_reward(params, temperature, proposals, rewards):  # [params], [], [n,6], [n] -> [params]
    def expected_reward(params):
        return jnp.exp(log_tables(params, temperature, STATES)[1][proposals].sum(-1)) @ rewards

    return jax.grad(expected_reward)(params)


@jax.jit
def token_scores(params, temperature, entries):  # [params], [], [n] -> [n,params]
    """Gradients of entries of the first table. One by one: XLA:CPU of jax 0.10 miscomputes the backward pass of RMSNorm
    when it is vmapped over many tokens.
    """

    @jax.grad
    def score(params, entry):
        state, place = jnp.asarray(STATES)[entry // (FREE * V)], entry % (FREE * V)
        return log_tables(params, temperature, state[None])[0][place]

    return jax.lax.map(lambda entry: score(params, entry), entries)


class Path(NamedTuple):
    ids: tuple  # the completion
    proposals: tuple  # (state, place, token) of everything drawn
    trained: tuple  # (state, place, token) of the completion's tokens


def list_paths(banned: np.ndarray, options: SamplingOptions) -> list[Path]:
    """Walks through every draw of every denoise step, by the written rules of the strategies."""
    found = []

    def visit(free, block, step, proposals, reveals):
        start, end = (0, *ENDS)[block], ENDS[block]
        masked = [i for i in range(start, end) if free[i] == MASK]
        if not masked:
            completion = free[: min(end, LIMIT)]
            if EOS in completion:
                completion = completion[: completion.index(EOS) + 1]
            elif block + 1 < len(ENDS):
                return visit(free, block + 1, 0, proposals, reveals)
            trained = tuple(r for r in reveals if r[1] < len(completion))
            return found.append(Path(completion, proposals, trained))
        state = int(np.ravel_multi_index(free, (V,) * FREE))
        for drawn in product(range(MASK), repeat=len(masked)):
            token = dict(zip(masked, drawn, strict=True))
            confidence = {i: np.exp(banned[state, i, token[i]]) for i in masked}
            order = masked if options.strategy == "sequential" else sorted(masked, key=lambda i: -confidence[i])
            count = (2, 1)[step]
            if options.strategy == "dynamic":
                count = max(count, sum(c > options.threshold for c in confidence.values()))
            chosen = order[:count]
            visit(
                tuple(token[i] if i in chosen else free[i] for i in range(FREE)), block, step + 1,
                proposals + tuple((state, i, token[i]) for i in masked),
                reveals + tuple((state, i, token[i]) for i in chosen),
            )  # fmt: skip

    visit((MASK,) * FREE, 0, 0, (), ())
    return found


def flat(entries, width, length=MOST):
    """(state, place, token) lists as indices [length,width] into a table; what is missing points to the 0."""
    index = np.full((length, width), ZERO)
    for row, entry in zip(index, entries, strict=False):
        row[: len(entry)] = [np.ravel_multi_index(e, (len(STATES), FREE, V)) for e in entry]
    return index


class Exact(NamedTuple):
    gradient: np.ndarray  # [params] of J
    traces: np.ndarray  # [n] probability of each distinct trace
    rewards: np.ndarray  # [n]
    scores: np.ndarray  # [n,params], what TraceRL takes for the gradient of the trace's log-probability

    @property
    def estimate(self):
        """[params] expectation of TraceRL's estimate"""
        return (self.traces * self.rewards) @ self.scores


@lru_cache
def enumerate_exactly(options: SamplingOptions, mask_probability: bool, importance_cap: float = 0.0) -> Exact:
    params, temperature = ravel_pytree(toy(mask_probability))[0], options.temperature
    full, banned = map(np.asarray, jax.jit(log_tables)(params, temperature, STATES))
    paths = list_paths(banned[:ZERO].reshape(-1, FREE, V), options)
    proposals = flat([p.proposals for p in paths], width=6)
    chances = np.exp(banned[proposals].sum(-1, dtype=np.float64))[: len(paths)]
    assert abs(chances.sum() - 1) < 1e-5
    rewards = np.zeros(MOST)
    rewards[: len(paths)] = [reward(p.ids) for p in paths]
    gradient = gradient_of_reward(params, temperature, proposals, rewards)

    distinct = {}
    of_path = [distinct.setdefault((p.ids, p.trained), len(distinct)) for p in paths]
    trained = flat([trained for _, trained in distinct], LIMIT, len(distinct))
    weights = np.minimum(np.exp(full - banned), importance_cap)[trained] if importance_cap else np.ones(trained.shape)
    used, place = np.unique(trained, return_inverse=True)
    scores = np.asarray(token_scores(params, temperature, np.pad(used, (0, MOST - len(used)))), np.float64)
    scores[: len(used)][used == ZERO] = 0
    return Exact(
        gradient=np.asarray(gradient, np.float64),
        traces=np.bincount(of_path, chances),
        rewards=np.array([reward(ids) for ids, _ in distinct]),
        scores=(weights[..., None] * scores[place.reshape(trained.shape)]).sum(1),
    )


@lru_cache
def make_learner(importance_cap: float) -> Learner:
    section = RLSection(
        steps=1, advantage="leave_one_out", accuracy_low=0, accuracy_high=1, kl_coef=0,
        importance_sampling="token" if importance_cap else "none", importance_cap=importance_cap,
        normaliser="constant", normaliser_constant=LIMIT, row_length=64, rows_per_device=4096,
    )  # fmt: skip
    return Learner(MODEL, section, ValueSection(), optax.sgd(1.0), optax.sgd(1.0))


def pipeline_gradient(tmp_path, options, params, count, importance_cap, group_size) -> np.ndarray:
    """[params]: rollout, reward, advantage, selection, replay, packing, loss and update, as `tracerl rl` does them."""
    learner = make_learner(importance_cap)
    learner.start(jax.tree.map(jnp.array, params), None)
    traces = Engine(MODEL, learner.policy.params, EngineConfig(4096)).generate(
        [Request(PROMPT, options, index) for index in range(count)]
    )
    problem = Problem(0, "", PROMPT, {})
    samples = [
        Sample(problem, trace, "", i // max(group_size, 1), reward(trace.ids), {}, 0.5, advantage=reward(trace.ids))
        for i, trace in enumerate(traces)
    ]
    # Dropped groups have no gradient but no longer count in the denominator.
    kept = select(samples, learner.config) if group_size else samples
    config = RunConfig(
        model=ModelSection(preset="sdar_tiny"), rl=learner.config,
        rollout=RolloutSection(block_size=B, max_tokens=LIMIT),
    )  # fmt: skip
    timer = PhaseTimer()
    with timer.step(1):
        metrics = update(
            SimpleNamespace(config=config, model=MODEL), learner, kept, 1, timer, NonFiniteGuard(tmp_path, 1, {})
        )
    assert metrics["replay/logprob_gap_max"] < 1e-4
    moved = jax.tree.map(lambda new, old: np.asarray(new) - old, learner.policy.params, params)
    return np.asarray(ravel_pytree(moved)[0], np.float64) * LIMIT * len(kept) / len(samples)


def standard_errors(exact: Exact, count: int, group_size: int) -> np.ndarray:
    """[params] of the mean over `count` samples, from the enumerated traces."""

    def moment(r, s):
        return (exact.traces * exact.rewards**r) @ exact.scores**s

    if group_size == 0:
        return np.sqrt((moment(2, 2) - moment(1, 1) ** 2) / count)
    assert group_size == 2  # then leave-one-out is (R1 - R2) (s1 - s2) / 2 per pair
    second = (
        moment(2, 2) - 2 * moment(2, 1) * moment(0, 1) + moment(2, 0) * moment(0, 2)
        - 2 * moment(1, 2) * moment(1, 0) + 2 * moment(1, 1) ** 2
    ) / 2  # fmt: skip
    mean = moment(1, 1) - moment(1, 0) * moment(0, 1)
    return np.sqrt((second - mean**2) / (count // 2))


def relative(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def cosine(one, two):
    return one @ two / np.linalg.norm(one) / np.linalg.norm(two)


def test_sequential_estimate_is_the_exact_gradient():
    exact = enumerate_exactly(SEQUENTIAL, False)
    assert len(exact.traces) == 31  # distinct: EOS first, a then EOS, and 4 openings with 7 endings
    assert relative(exact.estimate, exact.gradient) < 1e-5
    # Scores have mean 0, so a baseline that does not look at the sample itself changes nothing.
    assert np.abs(exact.traces @ exact.scores).max() < 1e-6


@pytest.mark.parametrize(("options", "bias"), [(STATIC, 0.07), (DYNAMIC, 0.05)], ids=["static", "dynamic"])
def test_bias_of_confidence_orders(options, bias):
    """How far TraceRL's expectation lies from grad J, as a fraction of it: known, small, and still uphill."""
    exact = enumerate_exactly(options, False)
    np.testing.assert_allclose(relative(exact.estimate, exact.gradient), bias, atol=0.005)
    assert cosine(exact.estimate, exact.gradient) > 0.998
    assert np.abs(exact.traces @ exact.scores).max() > 0.01  # hence a baseline is not for free either


@pytest.mark.parametrize(
    ("options", "mask_probability", "importance_cap", "group_size"),
    [(SEQUENTIAL, False, 0.0, 2), (STATIC, False, 0.0, 0), (DYNAMIC, True, 0.8, 0)],
    ids=["sequential-leave_one_out", "static-raw_reward", "dynamic-importance_weights"],
)
def test_pipeline_estimates_it(tmp_path, options, mask_probability, importance_cap, group_size):
    exact = enumerate_exactly(options, mask_probability, importance_cap)
    errors = standard_errors(exact, COUNT, group_size)
    got = pipeline_gradient(tmp_path, options, toy(mask_probability), COUNT, importance_cap, group_size)
    # MASK's own weights have no variance where it has no probability; rounding is all that may differ.
    z = (got - exact.estimate) / (errors + 1e-6)
    assert np.abs(z).max() < 4.5
    spread = np.linalg.norm(errors) / np.linalg.norm(exact.estimate)
    assert spread < 0.07
    assert relative(got, exact.estimate) < 2.5 * spread
