r"""The reward `math`: 1 when the final answer of a completion is the reference answer as mathematics, else 0.

The answer is found by extract.py. Most answers are settled by the rules of answers.py, in this process and in
microseconds; the rest goes to a pool of processes that do algebra (algebra.py).
"""

import atexit
import threading
from collections.abc import Mapping, Sequence

from tracerl_jax.rewards import settings
from tracerl_jax.rewards.answers import MAX_ANSWER, compare, readable
from tracerl_jax.rewards.extract import FINAL_ANSWER_PATTERNS, compile_patterns, extract_answer
from tracerl_jax.rewards.registry import Answers, Verdict, register_reward
from tracerl_jax.rewards.worker_pool import Reply, WorkerPool

MAX_SHOWN = 100  # characters of an answer in a verdict's detail

_pool: WorkerPool | None = None
_lock = threading.Lock()


def start() -> WorkerPool:
    """The worker processes, started if they are not running, and the answer patterns checked.

    Raises `ConfigError` when the LaTeX backend does not work, or a pattern is none.
    """
    global _pool
    wanted = settings.current()
    compile_patterns(wanted.answer_patterns)
    with _lock:
        if _pool is None:
            _pool = WorkerPool(
                "tracerl_jax.rewards.algebra_worker", workers=wanted.workers, cpu_seconds=wanted.math_cpu_seconds
            )
            atexit.register(stop)
        return _pool


def stop() -> None:
    """Ends the worker processes; the next batch that needs them starts them again, with the settings of then."""
    global _pool
    with _lock:
        if _pool is not None:
            _pool.close()
            _pool = None
            atexit.unregister(stop)


settings.on_change(stop)


def _check_row(row: Mapping[str, object]) -> str:
    gold = row.get("ground_truth_answer")
    if gold is None:
        return f"missing field 'ground_truth_answer' (it has {', '.join(row)})"
    need = f"field 'ground_truth_answer' must be a number, or a text of 1 to {MAX_ANSWER} characters"
    return "" if _usable(gold) else f"{need}, not {repr(gold)[:MAX_SHOWN]}"


def final_answer(text: str) -> str | None:
    """The answer of a completion, None when it has none that can be read."""
    (answer,) = _extract([text])
    return answer if answer is not None and readable(answer) else None


def same_answers(pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """Whether the answers of each pair are the same as mathematics; the first is compared as a reference answer is."""
    golds, answers = zip(*pairs, strict=True) if pairs else ((), ())
    return [verdict.reward == 1 for verdict in grade_answers(answers, golds)]


@register_reward("math", start=start, check=_check_row, answers=Answers(final_answer, same_answers))
def math_reward(
    prompts: Sequence[str], completions: Sequence[str], *, ground_truth_answer: Sequence[object] = (), **columns
) -> list[Verdict]:
    """See the module. No verdict without a usable reference answer."""
    return grade_answers(_extract(completions), ground_truth_answer or [None] * len(completions))


def _extract(completions: Sequence[str]) -> list[str | None]:
    wanted = settings.current()
    patterns = compile_patterns(wanted.answer_patterns or FINAL_ANSWER_PATTERNS)
    answers = [extract_answer(text, patterns) for text in completions]
    if wanted.bare_answers:
        answers = [
            text if answer is None and text and "\n" not in text.strip() else answer
            for text, answer in zip(completions, answers, strict=True)
        ]
    return answers


def grade_answers(answers: Sequence[str | None], golds: Sequence[object]) -> list[Verdict]:
    """Verdicts for answers (None: none was found) and their reference answers (text or numbers), in order."""
    verdicts = [_by_rules(answer, gold) for answer, gold in zip(answers, golds, strict=True)]
    left = [i for i, verdict in enumerate(verdicts) if verdict is None]
    if left:
        pool = start()
        replies = pool.map([(str(golds[i]), answers[i]) for i in left])
        # Whose fault is it when algebra gives up? A reference answer that is too much by itself gives no verdict.
        suspects = sorted({str(golds[i]) for i, reply in zip(left, replies, strict=True) if reply.status != "ok"})
        alone = pool.map([(gold, "1") for gold in suspects])
        too_much = {gold for gold, reply in zip(suspects, alone, strict=True) if reply.status != "ok"}
        for i, reply in zip(left, replies, strict=True):
            verdicts[i] = _by_algebra(answers[i], str(golds[i]), reply, str(golds[i]) in too_much)
    return verdicts


def _usable(gold: object) -> bool:
    return isinstance(gold, str | int | float) and not isinstance(gold, bool) and readable(str(gold))


def _by_rules(answer: str | None, gold: object) -> Verdict | None:
    if not _usable(gold):
        return Verdict(None, "no usable reference answer")
    if answer is None:
        return Verdict(0.0, "no answer found")
    if not answer.strip():
        return Verdict(0.0, "empty answer")
    if not readable(answer):
        return Verdict(0.0, f"answer of {len(answer)} characters, too long to read")
    same = compare(answer, str(gold))
    return None if same is None else _verdict(same, answer, str(gold), "by rules")


def _by_algebra(answer: str, gold: str, reply: Reply, gold_is_too_much: bool) -> Verdict:
    if reply.status == "hung":
        return Verdict(None, f"the worker hung ({reply.value})")
    if gold_is_too_much or (reply.status == "ok" and reply.value is None):
        return Verdict(None, f"the reference answer {_shown(gold)} cannot be read as mathematics")
    if reply.status == "ok":
        return _verdict(reply.value, answer, gold, "by algebra")
    return _verdict(False, answer, gold, f"by rules, and algebra gave up: {reply.value}")


def _verdict(same: bool, answer: str, gold: str, how: str) -> Verdict:
    relation = "is" if same else "is not"
    return Verdict(float(same), f"{_shown(answer)} {relation} {_shown(gold)} ({how})")


def _shown(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."
