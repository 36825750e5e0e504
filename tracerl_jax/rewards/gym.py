"""The reward `reasoning_gym`: the score that the library's own generator gives the answer, from 0 to 1."""

from collections.abc import Mapping, Sequence

from tracerl_jax.data.gym import import_gym
from tracerl_jax.rewards.closing import closing_text
from tracerl_jax.rewards.registry import Verdict, register_reward


def check(row: Mapping[str, object]) -> str:
    if isinstance(row.get("generator"), str) and isinstance(row.get("entry"), dict):
        return ""
    return "fields 'generator' and 'entry' must be those of a row that a task reasoning_gym:NAME has made"


@register_reward("reasoning_gym", start=import_gym, check=check)
def reasoning_gym(
    prompts: Sequence[str], completions: Sequence[str], *, generator: Sequence[object] = (),
    entry: Sequence[object] = (), **columns,
) -> list[Verdict]:  # fmt: skip
    nothing = [None] * len(completions)
    cases = zip(completions, generator or nothing, entry or nothing, strict=True)
    return [grade(text, name, of) for text, name, of in cases]


def grade(completion: str, generator: object, entry: object) -> Verdict:
    problem = check({"generator": generator, "entry": entry})
    if problem:
        return Verdict(None, problem)
    score = import_gym().get_score_answer_fn(generator)
    try:
        return Verdict(float(score(closing_text(completion), entry)), "scored by reasoning-gym")
    except Exception as error:  # some scorers raise for an answer that they cannot read
        wrong = repr(error)[:200]
    try:
        score(entry["answer"], entry)
    except Exception:
        return Verdict(None, f"the scorer fails on the reference answer, too: {wrong}")
    return Verdict(0.0, f"the scorer cannot read the answer: {wrong}")
