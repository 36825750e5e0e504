"""Evaluation: decode the held-out problems, judge the answers meanwhile, and measure quality and speed."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np

from tracerl_jax.config import RunConfig
from tracerl_jax.data.prompts import Problem
from tracerl_jax.diffusion.trace import Trace
from tracerl_jax.errors import ConfigError
from tracerl_jax.evals.beside import consume_beside
from tracerl_jax.evals.items import Items, Seconds
from tracerl_jax.evals.statistics import Score, scores
from tracerl_jax.files import plain
from tracerl_jax.interop.tokenizer import decode_each
from tracerl_jax.parallel import distributed, peers, watchdog
from tracerl_jax.rewards import Answers, get_answers, score
from tracerl_jax.rollout.engine import Engine
from tracerl_jax.rollout.options import Request, SamplingOptions
from tracerl_jax.rollout.stream import completed
from tracerl_jax.training.interrupt import together

logger = logging.getLogger(__name__)

PROTOCOLS = ("dynamic", "static")
Row = dict[str, Any]
Answer = tuple[Problem, Trace]
Value = TypeVar("Value")


def protocol(
    name: str,
    *,
    max_tokens: int,
    block_size: int | None = None,
    threshold: float = 0.9,
    temperature: float = 1.0,
    static_temperature: float = 0.0,
    seed: int = 0,
    **how: Any,
) -> SamplingOptions:
    """The two ways of the TraceRL paper to decode for its tables (arXiv 2509.06949, section 5).

    dynamic: reveal what is more confident than `threshold`, sample at `temperature`.
    static: one token per denoise step, at `static_temperature` (0: greedy); `threshold` does not matter.

    `how`: other SamplingOptions, of both.
    """
    if name == "dynamic":
        own = {"strategy": "dynamic", "threshold": threshold, "temperature": temperature}
    elif name == "static":
        own = {"strategy": "static", "temperature": static_temperature}
    else:
        raise ConfigError(f"unknown evaluation strategy {name!r}; use one of {', '.join(PROTOCOLS)}")
    return SamplingOptions(max_tokens=max_tokens, block_size=block_size, seed=seed, **own, **how)


def eval_protocols(config: RunConfig) -> dict[str, SamplingOptions]:
    """How evaluation decodes, for each of `eval.strategies`: the rollout's way to score and to begin a block, with the
    evaluation's own numbers. Raises ConfigError naming the key."""
    section, rollout = config.eval, config.rollout
    try:
        return {
            strategy: protocol(
                strategy,
                max_tokens=rollout.max_tokens if section.max_tokens is None else section.max_tokens,
                block_size=rollout.block_size,
                threshold=rollout.threshold if section.threshold is None else section.threshold,
                temperature=section.temperature,
                static_temperature=section.static_temperature,
                top_k=section.top_k, top_p=section.top_p,
                score=rollout.score, confidence=rollout.confidence, first_token=rollout.first_token,
                seed=config.seed,
            )
            for strategy in section.strategies
        }
    except ConfigError as error:
        raise ConfigError(f"eval: {error}") from None


def samples_of(options: SamplingOptions, wanted: int) -> int:
    """Answers per problem: one when greedy, as all would be the same."""
    return wanted if options.temperature else 1


@dataclass(frozen=True, eq=False)
class EvalResult:
    scores: dict[str, Score]  # avg@k, pass@2, .., pass@k, maj@k (statistics.py)
    tokens_per_step: float  # completion tokens per denoise step
    tokens_per_forward: float  # the same per forward, commits included
    response_length: float  # mean, tokens
    truncated_fraction: float  # completions cut at the length limit
    no_verdict: int  # answers without verdict: in no score, neither right nor wrong
    n: int  # problems
    samples: int  # answers
    seconds: tuple[Seconds, ...]  # of every start
    records: list[Row]  # one row per answer, by problem and sample: problem, trace, text, rewards

    def metrics(self) -> dict[str, float]:
        """Accuracy (avg@k), pass@j, maj@k and what else the model did, as numbers; NaN is a score not known."""
        average, *others = self.scores.items()
        names = ("tokens_per_step", "tokens_per_forward", "response_length", "truncated_fraction", "no_verdict")
        return {
            "accuracy": average[1].value,
            "accuracy_stderr": average[1].stderr,
            **{name: score.value for name, score in others},
            **{name: getattr(self, name) for name in names},
        }

    def summary(self) -> Row:
        """The same as JSON, every score with its standard error and number of problems; None is a score not known."""
        single = {name: value for name, value in self.metrics().items() if name not in self.scores}
        scores = {name: asdict(score) for name, score in self.scores.items()}
        return plain({**single, "n": self.n, "samples": self.samples, "scores": scores})

    def speed(self) -> Row:
        """Time, and response tokens per second of decoding. All starts count, so what was decoded in vain does too."""
        decode, wall = (sum(each) for each in zip(*self.seconds, strict=True)) if self.seconds else (0.0, 0.0)
        tokens = sum(len(row["ids"]) for row in self.records)
        return {
            "tokens": tokens,
            "tokens_per_second": _ratio(tokens, decode),
            "decode_seconds": decode,
            "wall_seconds": wall,
            "starts": len(self.seconds),
        }


def evaluate(
    engine: Engine,
    problems: Sequence[Problem],
    rewards: Mapping[str, float],
    accuracy_reward: str,
    *,
    options: SamplingOptions,
    decode: Callable[[np.ndarray], str],
    samples_per_prompt: int = 1,
    items: Items | None = None,
    watch: Callable[[Iterable[Answer]], Iterable[Answer]] = iter,
    check: Callable[[], None] = lambda: None,
) -> EvalResult:
    """Answers every problem `samples_per_prompt` times (once when greedy), but for what `items` holds already.

    An answer is right when `accuracy_reward` gives it 1 or more. Truncated answers are judged like others. Answers are
    judged, and added to `items`, in a thread while others are decoded. `decode` turns completion ids into text; `watch`
    wraps the stream of decoded answers (progress); `check` is called between chunks of decoding and may raise.

    The processes of a job share the work. Only process 0 need have `items` that hold something; all return the result.
    """
    items = Items() if items is None else items
    k = samples_of(options, samples_per_prompt)
    done = peers.from_lead(lambda: {(row["index"], row["sample_index"]) for row in items.rows})
    left = [(problem, i) for problem in problems for i in range(k) if (problem.index, i) not in done]
    left = peers.own_share(left)
    started = time.monotonic()

    def answered() -> Iterator[Answer]:
        requests = [Request(problem.prompt_ids, options, sample_index=i) for problem, i in left]
        for finished in in_phases(completed(engine, requests)):
            check()
            passed = time.monotonic() - started
            items.clock(decode=passed, wall=passed)
            yield from ((left[index][0], trace) for index, trace in finished.items())

    def judge(batch: list[Answer]) -> None:
        decoded = decode_each(decode, [trace.ids for _, trace in batch])
        texts = [text if text is None else p.prefix + text for (p, _), text in zip(batch, decoded, strict=True)]
        items.add(_judged(batch, texts, rewards, accuracy_reward))
        items.clock(wall=time.monotonic() - started)

    def work() -> list[Row]:
        if left:
            items.begin()
            consume_beside(watch(answered()), judge)
            items.end()
        return items.rows

    for index, rows in enumerate(together(work)):
        if index != distributed.process_index():
            items.receive(index, rows)
    return summarise(items, k, accuracy_reward)


def in_phases(chunks: Iterator[Value]) -> Iterator[Value]:
    """The same chunks of decoding, each a phase `eval`: an evaluation may take as long as it likes, a chunk may not."""
    end = object()
    while True:
        with watchdog.phase("eval"):
            chunk = next(chunks, end)
        if chunk is end:
            return
        yield chunk


def _judged(
    batch: Sequence[Answer], texts: Sequence[str | None], rewards: Mapping[str, float], accuracy_reward: str
) -> list[Row]:
    """The finished items of a batch."""
    problems, traces = zip(*batch, strict=True)
    scored = score(
        {accuracy_reward: 0.0, **rewards}, [p.prompt_text for p in problems], texts, [p.columns for p in problems]
    )
    verdicts, answers = scored.by_name[accuracy_reward], get_answers(accuracy_reward)
    return [
        plain({
            "index": problem.index,
            "prompt": problem.prompt_text,
            "text": texts[i] or "",
            "answer": answers and _answer(answers, texts[i] or ""),
            "correct": None if np.isnan(verdicts[i]) else bool(verdicts[i] >= 1),
            "reward": scored.total[i],
            "rewards": {name: values[i] for name, values in scored.by_name.items()},
            "details": {name: details[i] for name, details in scored.details.items()},
            **traces[i].to_row(),
        })
        for i, problem in enumerate(problems)
    ]  # fmt: skip


def _answer(answers: Answers, text: str) -> str | None:
    try:
        return answers.extract(text)
    except Exception as error:  # user code, as a reward is
        logger.warning("an answer could not be extracted and casts no vote: %r", error)
        return None


def summarise(items: Items, k: int, accuracy_reward: str) -> EvalResult:
    """The result of items that are all there: k answers to each problem."""
    rows = sorted(items.rows, key=lambda row: (row["index"], row["sample_index"]))
    if broken := sum(row["logprobs"] is None or None in row["logprobs"] for row in rows):
        logger.warning("%d of %d answers mean nothing: the model gave NaN or infinite numbers", broken, len(rows))
    problems = [rows[i : i + k] for i in range(0, len(rows), k)]
    answers = get_answers(accuracy_reward)
    tokens = sum(len(row["ids"]) for row in rows)
    return EvalResult(
        scores=scores(
            [[row["correct"] for row in problem] for problem in problems], k,
            [[row["answer"] for row in problem] for problem in problems], answers and answers.same,
        ),
        tokens_per_step=_ratio(tokens, sum(row["denoise_forwards"] for row in rows)),
        tokens_per_forward=_ratio(tokens, sum(row["forwards"] for row in rows)),
        response_length=_ratio(tokens, len(rows)),
        truncated_fraction=_ratio(sum(row["stop_reason"] == "length" for row in rows), len(rows)),
        no_verdict=sum(row["correct"] is None for row in rows),
        n=len(problems),
        samples=len(rows),
        seconds=tuple(items.seconds),
        records=rows,
    )  # fmt: skip


def _ratio(sum_: float, count: float) -> float:
    return sum_ / count if count else 0.0
