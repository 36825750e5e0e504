"""The learner on sampled traces: one update against a direct dense computation, and the rules around it."""

import copy
from dataclasses import replace
from itertools import chain

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tracerl_jax.config import RLSection, ValueSection
from tracerl_jax.data.prompts import Problem
from tracerl_jax.diffusion.packing import pack
from tracerl_jax.models import Model, ModelConfig
from tracerl_jax.rl.experience import Sample
from tracerl_jax.rl.logprobs import packed_values
from tracerl_jax.rl.loop import with_old_logprobs
from tracerl_jax.rl.update import Learner, merged, plan_replays
from tracerl_jax.rollout.engine import Engine, EngineConfig, Request, SamplingOptions

B, V, MASK, STOPS = 4, 24, 22, (3, 9, 17, 20)
CONFIG = ModelConfig(
    vocab_size=V, width=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=32, block_size=B,
    mask_token_id=MASK, stop_token_ids=STOPS, attention="reference",
)  # fmt: skip
MODEL = Model(CONFIG)
RL = RLSection(row_length=64, rows_per_device=16, kl_coef=0.3, normaliser_constant=11)
VALUE = ValueSection(enabled=True, gamma=0.9, lam=0.8)
TEMPERATURE = 0.8
CANVAS, STATES = 20, 128  # the longest canvas, and more states than the traces went through
PROMPTS = ([5, 1, 7, 2, 9], [8, 8, 2, 0, 4, 6, 1], [11, 12, 13, 14])


def random_params(seed, head="lm"):
    """Far enough from zero for every part to matter."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        return (rng.normal(size=shape.shape) / 8 + (path[-1].key == "scale")).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, Model(CONFIG, head).abstract_params())


PARAMS, OTHER = random_params(0), random_params(1)
VALUE_PARAMS = random_params(2, "value")
PROGRAMS = Learner(MODEL, RL, VALUE, optax.sgd(1.0), optax.inject_hyperparams(optax.sgd)(learning_rate=1.0))


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def samples():
    """Groups of 4 with tails, early stops, several tokens per step, and filters that change the distribution."""
    options = SamplingOptions("dynamic", threshold=0.12, max_tokens=9, temperature=TEMPERATURE, top_k=6)
    requests = [Request(prompt, options, index) for prompt in PROMPTS for index in range(4)]
    traces = list(Engine(MODEL, jax.tree.map(jnp.array, PARAMS), EngineConfig(len(requests))).generate(requests))
    assert {trace.stop_reason for trace in traces} == {"stop", "length"}
    assert any(len(trace.tail_ids) for trace in traces)
    assert any(trace.denoise_forwards < len(trace.ids) for trace in traces)
    advantages = np.random.default_rng(0).normal(size=len(traces)).astype(np.float32)
    return [
        Sample(Problem(i // 4, "", trace.prompt_ids, {}), trace, "", i // 4, 0.0, {}, 0.5, float(advantages[i]))
        for i, trace in enumerate(traces)
    ]


def plan(samples, config=RL, step=1):
    return plan_replays(samples, config, mask_id=MASK, block_size=B, seed=0, step=step)


@pytest.fixture(scope="module")
def replays(samples):
    """All samples in one update, with old log-probs of a somewhat different policy, so that ratios leave the bounds."""
    (part,) = plan(samples)
    rng = np.random.default_rng(1)
    return [
        replace(
            r,
            old_logp=r.sample.trace.logprobs + 0.3 * rng.normal(size=len(r.sample.trace.ids)).astype(np.float32),
            advantages=r.sample.advantage,
        )
        for r in part
    ]


def start(value=None, **changes):
    """A learner on PARAMS that shares its programs with all others: what is changed must not be compiled in."""
    learner = copy.copy(PROGRAMS)
    learner.config, learner.value_config = replace(RL, **changes), value or VALUE
    head = {"value_head": VALUE_PARAMS["value_head"]}
    learner.start(*jax.tree.map(jnp.array, (PARAMS, head if learner.value_config.shared_trunk else VALUE_PARAMS)))
    return learner


def means(result):
    return {name: float(total / count) for name, (total, count) in result.metrics.items()}


def gradient(before, after):
    """What SGD with a learning rate of 1 took away."""
    return jax.tree.map(lambda x, y: np.asarray(x) - np.asarray(y), before, after)


def assert_close(got, want, tolerance):
    """Leaf by leaf, relative to the largest entry of the leaf."""
    for (path, x), y in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(np.abs(y).max(), 1e-3), err_msg=str(path))


# --- direct dense computation -----------------------------------------------------------------------------------------


def dense_states(samples):
    """Every canvas the decodes went through [STATES,CANVAS], and per response token its (state, position, id)."""
    states, tokens = np.zeros((STATES, CANVAS), np.int32), []
    used = 0
    for sample in samples:
        trace, p = sample.trace, len(sample.trace.prompt_ids)
        canvas = np.concatenate([trace.prompt_ids, trace.ids, trace.tail_ids])
        steps = np.concatenate([np.zeros(p, int), trace.step_map, trace.tail_step_map])
        for step in range(1, trace.denoise_forwards + 1):
            states[used + step - 1, : len(canvas)] = np.where(steps < step, canvas, MASK)
        tokens.append(np.stack([used + trace.step_map - 1, p + np.arange(len(trace.ids)), trace.ids]))
        used += trace.denoise_forwards
    return states, np.concatenate(tokens, axis=1)


@jax.jit
def dense_outputs(params, states, state, position, ids, cotangent):
    """Log-prob or, with a value head, value of every response token, and the gradient of sum(cotangent * them)."""
    positions = np.broadcast_to(np.arange(CANVAS), states.shape)
    end = (positions // B + 1) * B

    def forward(params):
        hidden = MODEL.hidden(params, states, positions, np.stack([0 * end, end, 0 * end, 0 * end], -1))
        hidden = hidden[state, position]
        if "value_head" in params:
            return hidden @ params["value_head"]["kernel"][:, 0]
        return jax.nn.log_softmax(MODEL.logits(params, hidden) / TEMPERATURE)[jnp.arange(len(ids)), ids]

    outputs, pull_back = jax.vjp(forward, params)
    return outputs, *pull_back(cotangent)


def dense_forward(params, replays):
    states, tokens = dense_states([r.sample for r in replays])
    return dense_outputs(params, states, *tokens, jnp.zeros(tokens.shape[1]))[0]


def dense_loss_and_gradient(params, replays, loss):
    """`loss` maps the outputs of all response tokens to a scalar; the chain rule does the rest."""
    states, tokens = dense_states([r.sample for r in replays])
    total, cotangent = jax.value_and_grad(loss)(dense_forward(params, replays))
    return total, dense_outputs(params, states, *tokens, cotangent)[1]


def norm(tree):
    return np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in map(np.asarray, jax.tree.leaves(tree))))


def per_token(replays, get):
    return np.concatenate([np.broadcast_to(get(r), len(r.sample.trace.ids)) for r in replays])


def rounds(trace):
    """Training rows the reference makes of a response: the n-th distinct step of every block is in row n."""
    block = (len(trace.prompt_ids) + np.arange(len(trace.ids))) // B
    return max(len(set(trace.step_map[block == b])) for b in block)


def normalised(normaliser, replays, loss):
    """Scalar loss from the losses of all response tokens, by the written definitions."""
    lengths = [len(r.sample.trace.ids) for r in replays]
    if normaliser == "tokens":
        return loss.sum() / sum(lengths)
    if normaliser == "sequences":
        return sum(part.mean() for part in jnp.split(loss, np.cumsum(lengths)[:-1])) / len(replays)
    if normaliser == "constant":
        return loss.sum() / RL.normaliser_constant / len(replays)
    return loss.sum() / max(lengths) / sum(rounds(r.sample.trace) for r in replays)


def importance_ratios(replays, level):
    """Of all response tokens, by the written definitions."""
    ratios = [np.exp(r.old_logp - r.sample.trace.behaviour_logprobs) for r in replays]
    if level == "sequence":
        ratios = [np.full(len(r), np.prod(r)) for r in ratios]
    return np.concatenate(ratios)


def policy_loss(replays, normaliser="tokens", reference=None, importance=1.0):
    """The loss as a function of the log-probs of all response tokens."""

    def loss(logp):
        old, advantages = per_token(replays, lambda r: r.old_logp), per_token(replays, lambda r: r.advantages)
        ratio = jnp.exp(logp - old)
        surrogate = jnp.minimum(ratio * advantages, jnp.clip(ratio, 0.8, 1.2) * advantages)
        surrogate *= importance
        d = logp - (old if reference is None else reference)
        return normalised(normaliser, replays, -surrogate + RL.kl_coef * (jnp.exp(-d) - 1 + d))

    return loss


def check_policy_update(learner, replays, loss):
    result, _ = learner.update_policy(replays)
    total, want = dense_loss_and_gradient(PARAMS, replays, loss)
    np.testing.assert_allclose(result.loss, total, rtol=1e-5)
    np.testing.assert_allclose(result.grad_norm, norm(want), rtol=1e-5)
    assert_close(gradient(PARAMS, learner.policy.params), want, 1e-4)
    return result


@pytest.mark.parametrize("normaliser", ["tokens", "sequences", "constant", "reference"])
def test_policy_update_is_the_dense_gradient(replays, normaliser):
    result = check_policy_update(start(normaliser=normaliser), replays, policy_loss(replays, normaliser))
    assert result.metrics["clip_fraction"][0] > 5


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weights_and_kl_to_the_reference(replays, level):
    ratios = importance_ratios(replays, level)
    cap = float(np.median(ratios))
    learner = start(kl_to="reference", importance_sampling=level, importance_cap=cap)
    assert_close(learner.reference, PARAMS, 0)
    learner.reference = jax.tree.map(jnp.array, OTHER)
    scored = [
        replace(r, reference_logp=logp)
        for r, logp in zip(replays, learner.logprobs(learner.reference, replays), strict=True)
    ]
    reference = dense_forward(OTHER, replays)
    np.testing.assert_allclose(per_token(scored, lambda r: r.reference_logp), reference, atol=1e-4)
    check_policy_update(learner, scored, policy_loss(replays, reference=reference, importance=np.minimum(ratios, cap)))
    assert_close(learner.reference, OTHER, 0)  # an update leaves it alone


def test_micro_batches_do_not_matter(replays):
    """Everything at once, or three rows at a time of which the last ones are padding; the metrics agree as well."""
    rows = len(pack([r.item for r in replays], row_length=RL.row_length).ids)
    assert 6 < rows <= RL.rows_per_device and rows % 3
    whole, parts = start(), start(rows_per_device=3)
    scored = whole.with_values(replays)
    for one, two in zip(scored, parts.with_values(replays), strict=True):
        np.testing.assert_allclose(one.old_values, two.old_values, atol=1e-5)
    for update in ("update_policy", "update_value"):
        one, two = (getattr(learner, update)(scored)[0] for learner in (whole, parts))
        for result in (one, two):
            result.metrics.pop("packing_efficiency", None)  # padding is counted there
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), one, two)
    assert_close(parts.policy.params, whole.policy.params, 1e-6)
    assert_close(parts.value.params, whole.value.params, 1e-6)


def test_first_update_sees_the_policy_that_sampled(samples):
    """Old log-probs of the sampler or recomputed: the same numbers, ratio 1, nothing clipped."""
    (part,) = plan(samples)
    sampled, gap = with_old_logprobs(start(), part)
    recomputed, whole_gap = with_old_logprobs(start(old_logprobs="recompute"), part)
    np.testing.assert_allclose(
        per_token(sampled, lambda r: r.old_logp), per_token(recomputed, lambda r: r.old_logp), atol=1e-4
    )
    for metrics in (gap, whole_gap):
        assert 0 <= metrics["replay/logprob_gap_mean"] <= metrics["replay/logprob_gap_max"] < 1e-4
    other = start()
    other.policy = other.policy._replace(params=jax.tree.map(jnp.array, OTHER))
    assert with_old_logprobs(other, part)[1]["replay/logprob_gap_max"] > 0.1  # another policy is noticed
    assert with_old_logprobs(other, part, stale=True)[1] == {}  # unless it is known to be another

    for old in (sampled, recomputed):
        result, _ = start().update_policy([replace(r, advantages=r.sample.advantage) for r in old])
        assert means(result)["clip_fraction"] == 0
        np.testing.assert_allclose(means(result)["ratio"], 1, atol=1e-5)
        np.testing.assert_allclose(means(result)["approx_kl"], 0, atol=1e-6)


def test_states_the_sampler_never_visited_are_scored_before_the_update(samples):
    """The gap is measured in those that it did visit."""
    learner = start(method="coupled", old_logprobs="recompute")
    (part,) = plan(samples, learner.config)
    old, metrics = with_old_logprobs(learner, part)
    assert 0 < metrics["replay/logprob_gap_max"] < 1e-4
    assert with_old_logprobs(learner, part, stale=True)[1] == {}
    for changes, block_size in (({"shrink": 2}, B), ({}, 2 * B)):
        other = start(old_logprobs="recompute", **changes)
        (others,) = plan_replays(samples, other.config, mask_id=MASK, block_size=block_size, seed=0, step=1)
        assert 0 < with_old_logprobs(other, others)[1]["replay/logprob_gap_max"] < 1e-4
    old = [replace(r, advantages=r.sample.advantage) for r in old]
    first, second = (means(learner.update_policy(old)[0]) for _ in range(2))
    assert first["clip_fraction"] == 0 and abs(first["ratio"] - 1) < 1e-5
    assert second["approx_kl"] > 1e-4  # the old log-probs are those of the start of the step


def test_states_of_the_sampler_are_those_of_a_micro_batch(samples):
    (part,) = plan(samples, replace(RL, method="coupled", old_logprobs="recompute"))
    few, one, short = start(rows_per_device=4), start(rows_per_device=1), start(row_length=1, rows_per_device=9**9)
    for learner, count in ((few, 2), (one, 1)):
        learner.rows_per_micro_batch = learner.config.rows_per_device
        chosen = learner.as_sampled(part)
        assert [r.sample for r in chosen] == list(dict.fromkeys(r.sample for r in part))[: len(chosen)]
        assert len(chosen) >= count and sum(r.item.size for r in chosen) <= 64 * learner.rows_per_micro_batch
        for r in chosen:
            assert r.item.rounds == rounds(r.sample.trace) and len(r.item.target_ids) == len(r.sample.trace.ids)
    assert all(r.item.size <= 16 for r in short.as_sampled(part))  # the longest row


def test_the_two_views_of_a_response_count_as_one(samples):
    """The weights of their targets add up to those of the whole response, over the same denominator."""
    config = replace(RL, method="coupled", old_logprobs="recompute")
    both = [replace(r, old_logp=r.sample.trace.logprobs) for r in plan(samples, config)[0]]
    whole = [replace(r, old_logp=r.sample.trace.logprobs) for r in plan(samples)[0]]
    assert len(both) > len(whole)
    for normaliser in ("tokens", "sequences", "constant"):
        sums = []
        for replays in (both, whole):
            batches, denominator = start(normaliser=normaliser)._batches(replays, {})
            sums.append((sum(batch["weights"].sum() for batch in batches), denominator))
        np.testing.assert_allclose(*sums, rtol=1e-6)


# --- values -----------------------------------------------------------------------------------------------------------


def test_values_and_advantages(replays):
    """Values belong to the states that revealed the tokens; the sample's advantage is the reward of its last step."""
    values = dense_forward(VALUE_PARAMS, replays)
    reward = per_token(replays, lambda r: r.sample.advantage)
    plain = start(replace(VALUE, gamma=1.0, lam=1.0)).with_values(replays)
    np.testing.assert_allclose(per_token(plain, lambda r: r.old_values), values, atol=1e-5)
    np.testing.assert_allclose(per_token(plain, lambda r: r.returns), reward, atol=1e-5)
    np.testing.assert_allclose(per_token(plain, lambda r: r.advantages), reward - values, atol=1e-5)

    discounted = start(replace(VALUE, gamma=0.9)).with_values(replays)
    steps_left = per_token(replays, lambda r: steps_after(r.sample.trace.step_map))
    np.testing.assert_allclose(per_token(discounted, lambda r: r.returns), reward * 0.9**steps_left, atol=1e-5)

    whitened = per_token(start(replace(VALUE, whiten=True)).with_values(replays), lambda r: r.advantages)
    np.testing.assert_allclose([whitened.mean(), whitened.std()], [0, 1], atol=1e-5)


def steps_after(step_map):
    """How many later denoise steps revealed something of the response."""
    return [len({later for later in step_map if later > step}) for step in step_map]


@pytest.mark.parametrize("shared_trunk", [False, True])
def test_value_update_is_the_dense_gradient(replays, shared_trunk):
    """Of all value parameters, or of the head alone on the policy's features, which stay as they are."""
    learner = start(replace(VALUE, shared_trunk=shared_trunk))
    params = merged(VALUE_PARAMS, None)
    if shared_trunk:
        params = {**{k: v for k, v in PARAMS.items() if k != "lm_head"}, "value_head": VALUE_PARAMS["value_head"]}
    scored = learner.with_values(replays)
    returns = per_token(scored, lambda r: r.returns)
    # Old values of a while ago, so that some values have left the clipping range.
    rng = np.random.default_rng(0)
    scored = [replace(r, old_values=r.old_values + rng.normal(size=len(r.old_values)) / 4) for r in scored]
    old = per_token(scored, lambda r: r.old_values)

    def loss(values):
        clipped = old + jnp.clip(values - old, -VALUE.clip, VALUE.clip)
        return normalised("tokens", replays, 0.5 * jnp.maximum((values - returns) ** 2, (clipped - returns) ** 2))

    result, _ = learner.update_value(scored)
    total, want = dense_loss_and_gradient(params, replays, loss)
    assert result.metrics["value_clip_fraction"][0] > 5
    np.testing.assert_allclose(result.loss, total, rtol=1e-5)
    if shared_trunk:
        params, want = ({"value_head": tree["value_head"]} for tree in (params, want))
    assert_close(gradient(params, learner.value.params), want, 1e-4)
    np.testing.assert_allclose(result.grad_norm, norm(want), rtol=1e-5)
    assert_close(learner.policy.params, PARAMS, 0)


def test_value_updates_bring_values_closer_to_the_returns(replays):
    learner = start()
    slowly = learner.value.opt_state._replace(hyperparams={"learning_rate": jnp.float32(0.01)})
    learner.value = learner.value._replace(opt_state=slowly)
    scored = learner.with_values(replays)
    returns = per_token(scored, lambda r: r.returns)
    errors = []
    for _ in range(4):
        errors.append(((np.concatenate(learner.values(replays)) - returns) ** 2).mean())
        learner.update_value(scored)
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.9 * errors[0]


def test_shared_trunk_gives_the_policy_no_gradient(replays):
    """The policy moves as if there were no value model, and the values are of its features as they now are."""
    rows = pack([r.item for r in replays], row_length=RL.row_length)
    head = {"value_head": VALUE_PARAMS["value_head"]}

    @jax.jit
    @jax.grad
    def gradient_of_trunk(trunk):
        return packed_values(PROGRAMS.value_model, merged(head, trunk), rows).sum()

    assert norm(gradient_of_trunk(PARAMS)) == 0

    shared, alone = start(replace(VALUE, shared_trunk=True)), start()
    before = np.concatenate(shared.values(replays))
    shared.update_value(shared.with_values(replays))
    shared.update_policy(replays)
    alone.update_policy(replays)
    assert_close(shared.policy.params, alone.policy.params, 0)
    shared.value = shared.value._replace(params=jax.tree.map(jnp.array, head))
    assert np.abs(np.concatenate(shared.values(replays)) - before).max() > 1e-3


def test_value_model_starts_from_the_policy_with_a_zero_head(replays):
    for shared_trunk in (False, True):
        learner = start(replace(VALUE, shared_trunk=shared_trunk))
        params = learner.initial_value_params(learner.policy.params)
        assert set(params) == {"value_head"} | (set() if shared_trunk else set(PARAMS) - {"lm_head"})
        assert norm(params["value_head"]) == 0
        assert_close(params | {"value_head": 0}, {k: PARAMS.get(k, 0) for k in params}, 0)
        learner.start(learner.policy.params, params)
        assert np.abs(np.concatenate(learner.values(replays))).max() == 0


# --- which states are replayed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("minibatches", "epochs"), [(1, 1), (3, 2), (5, 3), (99, 1)])
def test_every_epoch_covers_each_sample_once(samples, minibatches, epochs):
    config = replace(RL, minibatches=minibatches, epochs=epochs)
    parts = [[r.sample.trace for r in part] for part in plan(samples, config)]
    per_epoch = min(minibatches, len(samples))
    assert len(parts) == epochs * per_epoch
    sizes = {len(part) for part in parts}
    assert max(sizes) - min(sizes) <= 1 and min(sizes) > 0
    orders = [list(chain(*parts[i : i + per_epoch])) for i in range(0, len(parts), per_epoch)]
    for order in orders:
        assert sorted(map(id, order)) == sorted(id(sample.trace) for sample in samples)
    assert len({tuple(map(id, order)) for order in orders}) == epochs  # a new order every epoch
    if minibatches == 3:  # the same again, but not in another step
        again, later = plan(samples, config), plan(samples, config, step=2)
        assert [[r.sample.trace for r in part] for part in again] == parts
        assert [[r.sample.trace for r in part] for part in later] != parts


def test_trace_replay_trains_every_token_of_every_response(samples):
    for replay in plan(samples)[0]:
        trace = replay.sample.trace
        order = np.argsort(replay.item.target_pos)
        np.testing.assert_array_equal(replay.item.target_ids[order], trace.ids)
        np.testing.assert_array_equal(replay.item.target_pos[order], np.arange(len(trace.ids)))


def test_coupled_views_complement_each_other_in_the_same_update(samples):
    config = replace(RL, method="coupled", old_logprobs="recompute", minibatches=4, epochs=2)
    views = {}
    for number, part in enumerate(plan(samples, config)):
        for replay in part:
            views.setdefault((number, id(replay.sample)), []).append(replay)
    assert len(views) == 2 * len(samples)
    masks = {}
    for (_, sample), pair in views.items():
        trace = pair[0].sample.trace
        positions = np.concatenate([replay.item.target_pos for replay in pair])
        np.testing.assert_array_equal(np.sort(positions), np.arange(len(trace.ids)))
        assert len(pair) == 2 or len(pair[0].item.target_pos) == len(trace.ids)  # unless one of them hides nothing
        masks.setdefault(sample, set()).add(frozenset(pair[0].item.target_pos.tolist()))
    assert sum(len(drawn) == 2 for drawn in masks.values()) > len(samples) / 2  # fresh masks every epoch


def test_random_masking_hides_some_tokens_and_shows_the_rest(samples):
    config = replace(RL, method="random_masking", old_logprobs="recompute", epochs=4)
    hidden = total = 0
    for replay in chain(*plan(samples, config)):
        trace, item = replay.sample.trace, replay.item
        hidden, total = hidden + len(item.target_pos), total + len(trace.ids)
        for start_at, block in zip(item.group_start, item.group_ids, strict=True):
            for position, token in enumerate(block, start=start_at - len(trace.prompt_ids)):
                masked = position in item.target_pos or position >= len(trace.ids)
                assert token == (MASK if masked else [*trace.prompt_ids, *trace.ids][position + len(trace.prompt_ids)])
    assert 0.3 < hidden / total < 0.7
