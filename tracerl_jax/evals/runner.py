"""Evaluation: decode the held-out problems, judge the answers, and measure how many tokens a forward gave."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tracerl_jax.data.prompts import Problem
from tracerl_jax.diffusion.trace import Trace, broken_traces, tokens_per_denoise_step, tokens_per_forward
from tracerl_jax.errors import ConfigError
from tracerl_jax.rewards import score
from tracerl_jax.rollout.engine import Engine
from tracerl_jax.rollout.options import Request, SamplingOptions

logger = logging.getLogger(__name__)

PROTOCOLS = ("dynamic", "static")


def protocol(
    name: str,
    *,
    max_tokens: int,
    block_size: int | None = None,
    threshold: float = 0.9,
    temperature: float = 1.0,
    seed: int = 0,
) -> SamplingOptions:
    """The two ways of the TraceRL paper to decode for its tables (arXiv 2509.06949, section 5).

    dynamic: reveal what is more confident than `threshold`, sample at `temperature`.
    static: greedy, one token per denoise step; `threshold` and `temperature` do not matter.
    """
    if name == "dynamic":
        own = {"strategy": "dynamic", "threshold": threshold, "temperature": temperature}
    elif name == "static":
        own = {"strategy": "static", "temperature": 0.0}
    else:
        raise ConfigError(f"unknown evaluation strategy {name!r}; use one of {', '.join(PROTOCOLS)}")
    return SamplingOptions(max_tokens=max_tokens, block_size=block_size, seed=seed, **own)


@dataclass(frozen=True, eq=False)
class EvalResult:
    accuracy: float  # right answers / judged answers, over all problems and samples (avg@k); NaN when none was judged
    tokens_per_step: float  # completion tokens per denoise step
    tokens_per_forward: float  # the same per forward, commits included
    response_length: float  # mean, tokens
    truncated_fraction: float  # completions cut at the length limit
    n: int  # problems
    samples: int  # answers
    no_verdict: int  # answers without verdict: in no accuracy, neither right nor wrong
    records: list[dict]  # one row per answer: problem, trace, text, rewards

    def summary(self) -> dict[str, float | int | None]:
        """Everything but the records, JSON-able: an accuracy that is not known is None."""
        numbers = {name: value for name, value in vars(self).items() if name != "records"}
        return numbers | {"accuracy": None if math.isnan(self.accuracy) else self.accuracy}


def evaluate(
    engine: Engine,
    problems: Sequence[Problem],
    rewards: Mapping[str, float],
    accuracy_reward: str,
    *,
    options: SamplingOptions,
    decode: Callable[[np.ndarray], str],
    samples_per_prompt: int = 1,
    watch: Callable[[Iterable[Trace]], Iterable[Trace]] = iter,
) -> EvalResult:
    """Answers every problem `samples_per_prompt` times (once when greedy: the answers would be the same).

    An answer is right when `accuracy_reward` gives it 1 or more. Truncated answers are judged like others.
    `decode` turns completion ids into text; `watch` wraps the stream of traces (progress, interruption).
    """
    if options.temperature == 0:
        samples_per_prompt = 1
    owners = [problem for problem in problems for _ in range(samples_per_prompt)]
    indices = [index for _ in problems for index in range(samples_per_prompt)]
    requests = [
        Request(problem.prompt_ids, options, sample_index=index)
        for problem, index in zip(owners, indices, strict=True)
    ]
    traces = list(watch(engine.generate(requests)))
    if broken := len(broken_traces(traces)):
        logger.warning("%d of %d answers mean nothing: the model gave NaN or infinite numbers", broken, len(traces))
    texts = [owner.prefix + decode(trace.ids) for owner, trace in zip(owners, traces, strict=True)]
    scored = score(
        {accuracy_reward: 0.0, **rewards}, [p.prompt_text for p in owners], texts, [p.columns for p in owners]
    )
    verdicts = scored.by_name[accuracy_reward]
    judged = ~np.isnan(verdicts)
    return EvalResult(
        accuracy=float((verdicts[judged] >= 1).mean()) if judged.any() else math.nan,
        tokens_per_step=tokens_per_denoise_step(traces),
        tokens_per_forward=tokens_per_forward(traces),
        response_length=float(np.mean([len(trace.ids) for trace in traces])),
        truncated_fraction=float(np.mean([trace.stop_reason == "length" for trace in traces])),
        n=len(problems),
        samples=len(traces),
        no_verdict=int((~judged).sum()),
        records=[
            {
                "index": problem.index,
                "prompt": problem.prompt_text,
                "text": texts[i],
                "correct": bool(verdicts[i] >= 1) if judged[i] else None,
                "reward": scored.total[i],
                "rewards": {name: values[i] for name, values in scored.by_name.items()},
                **traces[i].to_row(),
            }
            for i, problem in enumerate(owners)
        ],
    )
