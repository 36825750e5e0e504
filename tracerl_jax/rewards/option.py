r"""The reward `option`: 1 when the chosen letter (or the text of the choice) is the right one, else 0."""

import re
from collections.abc import Mapping, Sequence

from tracerl_jax.rewards.closing import closing_text
from tracerl_jax.rewards.registry import Verdict, register_reward

_LETTER = re.compile(
    r"(?:option|choice)?\s*\(?\s*([A-Za-z])\s*\)?\s*(?:[.:),].*|(?<=\s)(?:because|since|as|due)\b.*)?",
    re.IGNORECASE | re.DOTALL,
)
_MARKUP = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}|[$*`{}]")


def check(row: Mapping[str, object]) -> str:
    answer = row.get("ground_truth_answer")
    if isinstance(answer, str) and re.fullmatch(r"\s*[A-Za-z]\s*", answer):
        return ""
    return f"field 'ground_truth_answer' must be the letter of an option, it is {answer!r}"


@register_reward("option", check=check)
def option(
    prompts: Sequence[str], completions: Sequence[str], *, ground_truth_answer: Sequence[object] = (),
    choices: Sequence[object] = (), **columns,
) -> list[Verdict]:  # fmt: skip
    """See the module. No verdict without a letter in `ground_truth_answer`; `choices` (texts) may be missing."""
    nothing = [None] * len(completions)
    return [
        grade(text, answer, offered)
        for text, answer, offered in zip(
            completions, ground_truth_answer or nothing, choices or nothing, strict=True
        )
    ]


def grade(completion: str, answer: object, choices: object = None) -> Verdict:
    problem = check({"ground_truth_answer": answer})
    if problem:
        return Verdict(None, problem)
    text = _MARKUP.sub(lambda match: match[1] or "", closing_text(completion)).strip()
    texts = [str(choice).strip().lower() for choice in choices] if isinstance(choices, list) else []
    if text.lower() in texts:
        chosen = chr(ord("A") + texts.index(text.lower()))
    else:
        letter = _LETTER.fullmatch(text)
        if letter is None:
            return Verdict(0.0, "no option found")
        chosen = letter[1].upper()
    return Verdict(float(chosen == answer.strip().upper()), f"chose {chosen}")
