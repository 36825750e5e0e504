"""The last word of a completion, for tasks whose answers are not mathematics."""

import re

from tracerl_jax.rewards.extract import extract_answer

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def closing_text(completion: str) -> str:
    r"""What stands in the last <answer> </answer>, else in the last \boxed{}, else behind "answer is"; else all."""
    tagged = _TAGGED.findall(completion)
    if tagged:
        return tagged[-1].strip()
    answer = extract_answer(completion)
    return completion.strip() if answer is None else answer.strip()
