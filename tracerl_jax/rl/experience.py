"""From problems to judged samples with advantages. A sample stays one record from rollout to update."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tracerl_jax.config import RLSection
from tracerl_jax.config_rewards import ProcessSection
from tracerl_jax.data.prompts import Problem
from tracerl_jax.diffusion.trace import Trace, tokens_per_denoise_step, tokens_per_forward
from tracerl_jax.interop.tokenizer import decode_each
from tracerl_jax.rewards import rewards_of_steps, score
from tracerl_jax.rewards.steps import step_ends, tokens_of_steps
from tracerl_jax.rl.advantages import accuracy_filter, group_zscore, leave_one_out
from tracerl_jax.rl.process import normalised_steps


@dataclass(frozen=True, eq=False)
class Sample:
    """One response and everything known about it."""

    problem: Problem
    trace: Trace
    text: str | None  # None: the tokenizer failed
    group: int  # samples of one problem of a step share it
    reward: float  # NaN: no verdict
    rewards: Mapping[str, float]  # by reward function, before weighting
    correct: float  # 1, 0, or NaN without verdict
    advantage: float = 0.0
    # (end in tokens, reward) of every step that a reward of steps judged; as `select` gives them, normalised and with
    # what else makes up the advantage at the end of the response.
    steps: tuple[tuple[int, float], ...] = ()
    reward_of_whole: float = 0.0  # the part of `reward` that is not of steps


def judge(
    problems: Sequence[Problem],
    groups: Sequence[int],
    traces: Sequence[Trace],
    decode: Callable[[np.ndarray], str],
    *,
    rewards: Mapping[str, float],
    accuracy_reward: str,
    truncated_is_wrong: bool,
    process: ProcessSection,
    pieces: Callable[[np.ndarray], Sequence[str]],
) -> list[Sample]:
    """Score traces.

    Args:
        problems, groups, traces: [n], a problem and its group for every trace.
        decode: response ids to text.
        rewards: name -> weight.
        accuracy_reward: the reward that decides correctness: 1 is correct.
        truncated_is_wrong: a response that ran into the length limit gets reward 0 and counts as wrong, whatever it
            says (the reference's rule).
        process: where steps end, for rewards of steps.
        pieces: response ids to the text of each, which join to what `decode` gives.
    """
    of_steps = rewards_of_steps(rewards)

    def read(ids: np.ndarray) -> tuple[str, list[int]]:
        return decode(ids), [len(piece) for piece in pieces(ids)] if of_steps else []

    decoded = decode_each(read, [trace.ids for trace in traces])
    texts = [None if found is None else p.prefix + found[0] for p, found in zip(problems, decoded, strict=True)]
    token_ends = ends = None
    if of_steps:
        token_ends = [
            len(p.prefix) + np.cumsum(found[1] if found else []) for p, found in zip(problems, decoded, strict=True)
        ]
        ends = [step_ends(text or "", of_tokens, process) for text, of_tokens in zip(texts, token_ends, strict=True)]
    result = score(rewards, [p.prompt_text for p in problems], texts, [p.columns for p in problems], ends)
    correct = np.where(np.isnan(result.by_name[accuracy_reward]), np.nan, result.by_name[accuracy_reward] >= 1)
    cut = np.array([truncated_is_wrong and trace.stop_reason == "length" for trace in traces], bool)
    total = np.where(cut, 0.0, result.total)
    correct = np.where(cut, 0.0, correct)

    def steps(i: int) -> tuple[tuple[int, float], ...]:
        judged = result.steps[i] and not cut[i] and len(traces[i].ids)
        return tokens_of_steps(result.steps[i], token_ends[i]) if judged else ()

    return [
        Sample(
            problem=owner,
            trace=traces[i],
            text=texts[i],
            group=groups[i],
            reward=float(total[i]),
            rewards={name: float(values[i]) for name, values in result.by_name.items()},
            correct=float(correct[i]),
            steps=steps(i),
            reward_of_whole=0.0 if cut[i] else float(result.whole[i]),
        )
        for i, owner in enumerate(problems)
    ]


def select(samples: Sequence[Sample], config: RLSection, normalise: str = "total") -> list[Sample]:
    """The samples to train on, with their advantages. `normalise`: of steps, see `ProcessSection`.

    Groups whose accuracy lies outside [accuracy_low, accuracy_high] are dropped whole, and so are groups whose rewards
    all agree (every advantage would be 0), samples without verdict, and empty responses.
    """
    groups = np.array([s.group for s in samples])
    rewards = np.array([s.reward for s in samples])
    baseline = group_zscore if config.advantage == "group_zscore" else leave_one_out
    advantages = baseline(rewards, groups)
    steps = [s.steps for s in samples]
    if any(steps):
        steps = normalised_steps(samples, advantages, config.advantage, normalise)
    kept = []
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        verdicts = [samples[i].correct for i in members if not np.isnan(samples[i].correct)]
        if not verdicts or not (np.any(advantages[members]) or any(reward for i in members for _, reward in steps[i])):
            continue
        if accuracy_filter([np.mean(verdicts)], config.accuracy_low, config.accuracy_high)[0]:
            kept += [i for i in members if not np.isnan(rewards[i]) and len(samples[i].trace.ids)]
    return [dataclasses.replace(samples[i], advantage=float(advantages[i]), steps=steps[i]) for i in kept]


def experience_metrics(samples: Sequence[Sample], kept: Sequence[Sample], seconds: float) -> dict[str, float]:
    """Metrics of a rollout (docs/metrics.md). `seconds` is the wall time of decoding."""
    rewards = np.array([s.reward for s in samples])
    judged = rewards[~np.isnan(rewards)]
    lengths = np.array([len(s.trace.ids) for s in samples])
    groups = {s.group for s in samples}
    correct = np.array([s.correct for s in samples])
    traces = [s.trace for s in samples]
    steps = [len(s.steps) for s in samples if s.steps]
    process = {"process/steps_per_response": float(np.mean(steps))} if steps else {}
    return process | {
        "reward": float(judged.mean()) if judged.size else float("nan"),
        "reward_std": float(judged.std()) if judged.size else float("nan"),
        "no_verdict": float(len(rewards) - judged.size),
        "groups/kept_fraction": len({s.group for s in kept}) / max(1, len(groups)),
        "response_length/mean": float(lengths.mean()),
        "response_length/min": float(lengths.min()),
        "response_length/max": float(lengths.max()),
        "rollout/tokens_per_second": float(lengths.sum() / seconds),
        "response_length/truncated_fraction": float(np.mean([s.trace.stop_reason == "length" for s in samples])),
        "accuracy": float(np.nanmean(correct)) if not np.isnan(correct).all() else float("nan"),
        "rollout/tokens_per_denoise_step": tokens_per_denoise_step(traces),
        "rollout/tokens_per_forward": tokens_per_forward(traces),
    }
