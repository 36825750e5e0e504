r"""The reward `math`: 1 when the final answer of a completion is the reference answer as mathematics, else 0.

The answer is found by extract.py. Most answers are settled by the rules of answers.py, in this process and in
microseconds; the rest goes to a pool of processes that do algebra (algebra.py).
"""

import atexit
from collections.abc import Sequence
from dataclasses import dataclass

from tracerl_jax.rewards import settings
from tracerl_jax.rewards.answers import compare, readable
from tracerl_jax.rewards.extract import compile_patterns, extract_answer
from tracerl_jax.rewards.registry import register_reward
from tracerl_jax.rewards.worker_pool import Reply, WorkerPool


@dataclass(frozen=True)
class MathVerdict:
    reward: float | None  # 1, 0, or None without verdict
    answer: str | None  # what was extracted
    reason: str  # how it was decided


_pool: WorkerPool | None = None


def start() -> None:
    """Starts the worker processes, as the first batch would. Raises `ConfigError` when the LaTeX backend does not work."""
    global _pool
    if _pool is None:
        wanted = settings.current()
        _pool = WorkerPool(
            "tracerl_jax.rewards.algebra_worker", workers=wanted.workers, cpu_seconds=wanted.math_cpu_seconds
        )
        atexit.register(stop)


def stop() -> None:
    """Ends the worker processes; the next batch starts them again, with the settings of then."""
    global _pool
    if _pool is not None:
        _pool.close()
        _pool = None
        atexit.unregister(stop)


settings.on_change(stop)


@register_reward("math", start=start)
def math_reward(
    prompts: Sequence[str], completions: Sequence[str], *, ground_truth_answer: Sequence[object] = (), **columns
) -> list[float | None]:
    """See the module. No verdict without a usable reference answer."""
    golds = ground_truth_answer or [None] * len(completions)
    return [verdict.reward for verdict in grade(completions, golds)]


def grade(completions: Sequence[str], golds: Sequence[object]) -> list[MathVerdict]:
    """Verdicts for completions and their reference answers (text or numbers), in order."""
    patterns = compile_patterns(settings.current().answer_patterns)
    answers = [extract_answer(text, patterns) for text in completions]
    verdicts = [_by_rules(answer, gold) for answer, gold in zip(answers, golds, strict=True)]
    left = [i for i, verdict in enumerate(verdicts) if verdict is None]
    if left:
        start()
        replies = dict(zip(left, _pool.map([(str(golds[i]), answers[i]) for i in left]), strict=True))
        given_up = [i for i in left if replies[i].status != "ok"]
        # Whose fault is it? A reference answer that is too much on its own gives no verdict.
        alone = _pool.map([(str(golds[i]), str(golds[i])) for i in given_up])
        unreadable = {i for i, reply in zip(given_up, alone, strict=True) if reply.status != "ok"}
        for i, reply in replies.items():
            verdicts[i] = _by_algebra(answers[i], reply, i in unreadable)
    return verdicts


def _by_rules(answer: str | None, gold: object) -> MathVerdict | None:
    if isinstance(gold, bool) or not isinstance(gold, str | int | float) or not readable(str(gold)):
        return MathVerdict(None, answer, "no usable reference answer")
    if answer is None:
        return MathVerdict(0.0, None, "no answer found")
    if not readable(answer):
        return MathVerdict(0.0, answer[:100], "empty answer" if not answer.strip() else "answer too long to read")
    same = compare(answer, str(gold))
    return None if same is None else MathVerdict(float(same), answer, "compared by rules")


def _by_algebra(answer: str, reply: Reply, unreadable: bool) -> MathVerdict:
    if unreadable or (reply.status == "ok" and reply.value is None):
        return MathVerdict(None, answer, "the reference answer cannot be read as mathematics")
    if reply.status == "ok":
        return MathVerdict(float(reply.value), answer, "compared by math-verify")
    return MathVerdict(0.0, answer, f"not equal by rules, and math-verify gave up ({reply.status}: {reply.value})")
