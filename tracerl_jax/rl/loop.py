"""The RL loop: rollout, reward, values and advantages, value update, policy update, evaluation, save."""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from tracerl_jax.config import RunConfig
from tracerl_jax.data.curriculum import open_iterator
from tracerl_jax.interop.tokenizer import decode_each
from tracerl_jax.models import Model
from tracerl_jax.parallel.peers import own_share
from tracerl_jax.report.flops import FORWARD, TRAINED, replay_work
from tracerl_jax.report.metrics import MetricLog, PhaseTimer, merge
from tracerl_jax.report.profile import Profiler
from tracerl_jax.report.samples import sample_row
from tracerl_jax.report.speed import Speed
from tracerl_jax.rl.experience import Sample, experience_metrics, select
from tracerl_jax.rl.importance import importance_metrics
from tracerl_jax.rl.objectives import explained_variance
from tracerl_jax.rl.rollouts import open_rollouts
from tracerl_jax.rl.update import Learner, Replay, plan_replays
from tracerl_jax.rollout.engine import Engine
from tracerl_jax.training.guard import NonFiniteGuard
from tracerl_jax.training.interrupt import Interrupted
from tracerl_jax.training.optimizer import make_optimizer, make_schedule
from tracerl_jax.training.run import Progress, Run
from tracerl_jax.training.step import UpdateResult

log = logging.getLogger(__name__)

PHASES = (
    "save", "eval", "rollout", "reward", "exchange", "replay", "values", "update_value", "update_policy", "wait",
    "sync",
)  # fmt: skip


def make_learner(model: Model, config: RunConfig) -> Learner:
    """The learner of a run with this config, and of its plan."""
    return Learner(
        model,
        dataclasses.replace(
            config.rl, normaliser_constant=config.rl.normaliser_constant or config.rollout.longest
        ),
        config.value,
        make_optimizer(config.rl.optimizer, policy_updates(config)),
        make_optimizer(config.value.optimizer, value_updates(config)),
    )


def policy_updates(config: RunConfig) -> int:
    """Of the whole run, for the learning rate's schedule."""
    return config.rl.steps * config.rl.minibatches * config.rl.epochs


def value_updates(config: RunConfig) -> int:
    return config.rl.steps // config.value.train_every * config.rl.minibatches * config.rl.epochs


def train_rl(
    run: Run, progress: Progress, learner: Learner, evaluate: Callable[[Engine, int, MetricLog], None],
    ahead: dict | None = None,
) -> Progress:
    """The RL steps from `progress.rl_step` to `rl.steps`. `ahead`: the document of that name of the checkpoint.

    `evaluate(engine, step, log)` is called before the first step, every `eval.every` steps, and after the last; a run
    that goes on repeats the call of the step it stopped at.
    """
    config = run.config
    iterator = open_iterator(len(run.train_problems), config.seed, config.rl)
    if progress.data is not None:
        iterator.restore(progress.data)
    guard = NonFiniteGuard(run.path, config.rl.max_skipped_updates, progress.skipped_in_a_row)
    engine = run.engine(learner.policy.params)
    rollouts = open_rollouts(run, engine, iterator, learner.policy.params, ahead)
    metric_log = run.open_log("rl", config.rl.steps, progress.rl_step)
    timer = PhaseTimer()
    speed = Speed(run.folder, "rl", phases=PHASES, chips=run.mesh.size, product="rollout")
    profiler = Profiler(config.report.profiled, run.path / "profile")
    saved = progress.rl_step

    def save():
        nonlocal saved
        if saved != progress.rl_step:
            with timer("save"):
                run.save(progress, learner.trees(), rollouts.ahead())
            saved = progress.rl_step

    def settle():
        """Save and evaluate what the last step left, if it is time. Its metric row is already written: a run that is
        killed from now on must find there what the checkpoint has behind it."""
        step, last = progress.rl_step, progress.rl_step >= config.rl.steps
        if step % config.checkpoint.every == 0 or last:
            save()
        if step == 0 or last or (config.eval.every and step % config.eval.every == 0):
            with timer("eval"):
                evaluate(engine, step, metric_log)

    def give_step_up():
        """In its middle, if that loses nothing else: the step is made again from the checkpoint at its start. A notice
        of pre-emption may leave half a minute, and updates of a large model take longer."""
        if saved == progress.rl_step:
            run.stop.check_together()

    learner.before_micro_batch = give_step_up
    try:
        while progress.rl_step < config.rl.steps:
            step, updates = progress.rl_step + 1, int(learner.policy.updates)
            profiler.at(step)
            with timer.step(step):
                settle()
                experience = rollouts.take(step, updates, timer)
                timer.count("rollout", dataclasses.replace(experience.work, seconds=experience.rollout_seconds))
                kept = select(experience.samples, learner.config, config.reward.process.normalise)
                if not kept:
                    guard.check_rollout(experience.traces, f"rl step {step}")
                rollouts.before_update(step, updates)
                metrics = experience_metrics(experience.samples, kept, experience.rollout_seconds)
                metrics |= rollouts.metrics(experience, updates)
                stale = updates > experience.policy_updates
                metrics |= update(run, learner, kept, step, timer, guard, stale=stale)
                rollouts.after_update(learner.policy.params, timer)
                progress = Progress("rl", progress.sft_step, step, iterator.state(), dict(guard.skipped_in_a_row))
                write_samples(run, experience.samples, step)
                run.checkpointer.seal_finished()
            metric_log.write(step, metrics | speed.row(step, timer.seconds(), timer.work))
        settle()
    except Interrupted:
        save()
        raise
    finally:
        profiler.close()
        rollouts.close()
        metric_log.close()
    return progress


def update(
    run: Run, learner: Learner, kept: Sequence[Sample], step: int, timer: PhaseTimer, guard: NonFiniteGuard,
    *, stale: bool = False,
) -> dict[str, float]:
    """Value and policy updates of one step on the kept samples; returns their metrics.

    `stale`: the policy has been updated since it sampled them.
    """
    config = run.config
    block_size = config.rl.block_size or config.rollout.at(step).block_size or run.model.config.block_size
    plan = plan_replays(
        kept, config.rl, mask_id=run.model.config.mask_token_id, block_size=block_size, seed=config.seed, step=step
    )
    if not plan:
        log.warning(
            "rl step %d: no usable group (see groups/kept_fraction), nothing is updated; a reward that is not 0 or 1 "
            "needs rl.accuracy_low=0.0 and rl.accuracy_high=1.0", step,
        )  # fmt: skip
        return {"updates/skipped": 1.0}
    with timer("replay"):
        everything = [replay for part in plan for replay in part]
        everything, metrics = with_old_logprobs(learner, everything, stale)
        if config.rl.importance_sampling != "none":
            ratios = learner.importance_ratios(everything)
            metrics |= importance_metrics(ratios, config.rl.importance_cap, config.rl.importance_sampling)
        if config.rl.kl_to == "reference":
            reference = learner.logprobs(learner.reference, everything)
            everything = [
                dataclasses.replace(r, reference_logp=logp) for r, logp in zip(everything, reference, strict=True)
            ]
    if config.value.enabled:
        with timer("values"):
            everything = learner.with_values(everything)
    else:
        everything = [dataclasses.replace(r, advantages=r.sample.advantage) for r in everything]
    count_work(timer, learner, everything, step)
    sizes = np.cumsum([len(part) for part in plan])[:-1]
    plan = [list(part) for part in np.split(np.array(everything, object), sizes)]

    value_results = []
    if config.value.enabled and step % config.value.train_every == 0:
        with timer("update_value"):
            value_results = guarded(learner.update_value, plan, guard, f"rl step {step}", "value")
            metrics |= value_metrics(config, value_results, learner)
    with timer("update_policy"):
        policy_results = guarded(learner.update_policy, plan, guard, f"rl step {step}", "policy")
        metrics |= policy_metrics(config, policy_results, learner)
    return metrics | {"updates/skipped": float(sum(bool(r.skipped) for r in (*value_results, *policy_results)))}


def count_work(timer: PhaseTimer, learner: Learner, replays: Sequence[Replay], step: int) -> None:
    """This process's share of the phases of `update`. That of `replay` leaves out the check of the log-probs, which no
    update needs."""
    model, config, value = learner.model.config, learner.config, learner.value_config
    items = [replay.item for replay in own_share(replays)]
    passes = (config.old_logprobs == "recompute") + (config.kl_to == "reference")
    if passes:
        timer.count("replay", replay_work(model, items, trunk=passes, heads=passes))
    if value.enabled:
        timer.count("values", replay_work(model, items, head="value"))
        if step % value.train_every == 0:
            trunk = FORWARD if value.shared_trunk else TRAINED
            timer.count("update_value", replay_work(model, items, trunk=trunk, heads=TRAINED, head="value"))
    timer.count("update_policy", replay_work(model, items, trunk=TRAINED, heads=TRAINED))


def guarded(update: Callable, plan: list[list[Replay]], guard: NonFiniteGuard, *where: str) -> list[UpdateResult]:
    """One update after the other, each looked at by `guard`."""
    results = []
    for part in plan:
        result, batch = update(part)
        guard.check(result, batch, *where)
        results.append(result)
    return results


def with_old_logprobs(
    learner: Learner, replays: list[Replay], stale: bool = False
) -> tuple[list[Replay], dict[str, float]]:
    """Old log-probs (the sampler's or recomputed), and how far rollout is from replay of the same states with the same
    weights, unless they are others (`stale`).

    That is the error of the rollout's cache and of rounding, and of nothing else. Where the training replays other
    states than the sampler visited (merged steps, random masks, other blocks), the sampler's own are replayed for it,
    of one micro-batch's worth of samples; so they are where nothing has to be recomputed.
    """
    config, gaps = learner.config, None
    if config.old_logprobs == "recompute":
        recomputed = learner.logprobs(learner.policy.params, replays)
        same_blocks = all(r.item.block_size == r.sample.trace.replay_block for r in replays)
        if config.method == "tracerl" and config.shrink == 1 and same_blocks:
            gaps = logprob_gaps(replays, recomputed)
        replays = [dataclasses.replace(r, old_logp=logp) for r, logp in zip(replays, recomputed, strict=True)]
    else:
        replays = [dataclasses.replace(r, old_logp=r.sample.trace.logprobs) for r in replays]
    if stale:
        return replays, {}
    if gaps is None:
        sampled = learner.as_sampled(replays)
        if not sampled:
            return replays, {}
        gaps = logprob_gaps(sampled, learner.logprobs(learner.policy.params, sampled))
    return replays, {"replay/logprob_gap_max": float(gaps.max()), "replay/logprob_gap_mean": float(gaps.mean())}


def logprob_gaps(replays: Sequence[Replay], logprobs: Sequence[np.ndarray]) -> np.ndarray:
    """|replay - rollout| of all response tokens, [sum of r]."""
    return np.abs(np.concatenate([lp - r.sample.trace.logprobs for r, lp in zip(replays, logprobs, strict=True)]))


def policy_metrics(config: RunConfig, results: Sequence[UpdateResult], learner: Learner) -> dict[str, float]:
    means = merge([r.metrics for r in results])
    results, updates = jax.device_get((list(results), learner.policy.updates))
    schedule = make_schedule(config.rl.optimizer, policy_updates(config))
    reference = {"policy/kl_reference": means["kl_loss"]} if config.rl.kl_to == "reference" else {}
    return reference | {
        "policy/loss": float(np.mean([r.loss for r in results])),
        "policy/grad_norm": float(np.mean([r.grad_norm for r in results])),
        "policy/kl": means["approx_kl"],
        "policy/clip_fraction": means["clip_fraction"],
        "policy/ratio_mean": means["ratio"],
        "policy/entropy": means["entropy"],
        "replay/packing_efficiency": means["packing_efficiency"],
        "policy/lr": float(schedule(max(0, int(updates) - 1))),
    }


def value_metrics(config: RunConfig, results: Sequence[UpdateResult], learner: Learner) -> dict[str, float]:
    means = merge([r.metrics for r in results])
    results, updates = jax.device_get((list(results), learner.value.updates))
    schedule = make_schedule(config.value.optimizer, value_updates(config))
    return {
        "value/loss": means["value_loss"],
        "value/explained_variance": explained_variance(means),
        "value/grad_norm": float(np.mean([r.grad_norm for r in results])),
        "value/lr": float(schedule(max(0, int(updates) - 1))),
    }


def write_samples(run: Run, samples: Sequence[Sample], step: int) -> None:
    """The first samples of the step, from as many groups as possible, but for those that the tokenizer cannot take."""
    section = run.config.rollout
    limit = run.config.report.samples_per_step
    spread = sorted(range(len(samples)), key=lambda i: (i % section.samples_per_prompt, i))[:limit]

    def row(sample: Sample) -> dict[str, Any]:
        return sample_row(
            sample.trace, step=step, phase="rl", prompt=sample.problem.prompt_text, text=sample.text,
            reward=_known(sample.reward), rewards={k: _known(v) for k, v in sample.rewards.items()},
            accuracy=_known(sample.correct), ground_truth=sample.problem.columns.get("ground_truth_answer"),
            steps=sample.steps, tokenizer=run.tokenizer,
        )  # fmt: skip

    def rows() -> Iterator[dict[str, Any]]:  # which only process 0 of a job goes through
        chosen = [samples[i] for i in sorted(spread) if samples[i].text is not None]
        yield from (found for found in decode_each(row, chosen) if found is not None)

    run.folder.append_samples(rows())


def _known(value: float) -> float | None:
    return None if np.isnan(value) else value
