"""Exact match of the final answer."""

from collections.abc import Mapping, Sequence

from tracerl_jax.rewards.registry import Answers, register_reward

MARKER = "#"  # also ends GSM8K's "####"


def _check_row(row: Mapping[str, object]) -> str:
    missing = row.get("ground_truth_answer") is None
    return f"missing field 'ground_truth_answer' (it has {', '.join(row)})" if missing else ""


def final_answer(text: str) -> str | None:
    """What is compared: the text behind the last `#`, white space made single; None when there is none."""
    return _normalise(text.rpartition(MARKER)[2]) or None


ANSWERS = Answers(final_answer, lambda pairs: [one == other for one, other in pairs])


@register_reward("exact_match", check=_check_row, answers=ANSWERS)
def exact_match(
    prompts: Sequence[str], completions: Sequence[str], *, ground_truth_answer: Sequence[object] = (), **columns
) -> list[float | None]:
    """1 when the text behind the last `#` (the whole text without one) equals the reference answer, else 0.

    Runs of white space count as one space, and none at the ends. No verdict without a reference answer.
    """
    golds = ground_truth_answer or [None] * len(completions)
    return [
        None if gold is None else float((final_answer(text) or "") == _normalise(str(gold)))
        for text, gold in zip(completions, golds, strict=True)
    ]


def _normalise(text: str) -> str:
    return " ".join(text.split())
