"""The rewards `judge` and `judge_steps`: scores that a language model behind an OpenAI-compatible server gives.

    row, completion --template--> messages --k votes--> answers (server, cache) --> scores --> verdict

`judge` asks about a whole completion, `judge_steps` about each of its steps. An answer that does not come or holds no
score takes the verdict of its own sample only. Settings: `reward.judge`; for the user: docs/judges.md.
"""

import logging
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from tracerl_jax.config_rewards import JudgeSection
from tracerl_jax.errors import ConfigError, UnavailableError
from tracerl_jax.rewards import settings
from tracerl_jax.rewards.judge_cache import open_cache, request_key
from tracerl_jax.rewards.judge_text import Answer, Failure, combine_votes, fill, missing_fields, read_score
from tracerl_jax.rewards.registry import Verdict, register_reward, step_verdict

log = logging.getLogger(__name__)

_GIVEN = {"prompt": "", "completion": "", "step": "", "before": ""}  # fields of every template
_NOT_CACHED = Failure("offline, and the answer is not in the cache")
_REFUSED = "HTTP 4(?!08|09|25|29)"  # how a `Failure` begins that will not go away
_SHOWN = 300  # characters of an answer in a verdict's detail


def start() -> None:
    """Asks the judge one thing, as it will be asked, or looks for the cache. Raises ConfigError with the remedy, or
    UnavailableError for a judge that does not answer now."""
    section = settings.current().judge
    if section.offline:
        if not _cache_files(section):
            raise ConfigError(
                f"reward.judge.offline answers from reward.judge.cache={section.cache}, and there is no such file: "
                "name that of a run with the judge, or set reward.judge.offline=false"
            )
    for key in () if section.offline else ("url", "model"):
        if not getattr(section, key):
            raise ConfigError(f"the rewards judge and judge_steps need reward.judge.{key}: set it")
    with open_cache(*_cache_files(section)):
        pass  # for its ConfigError
    if section.offline:
        return
    from tracerl_jax.rewards.judge_client import ask

    (answer,) = ask([_body(section, "This is a test. Answer with the word yes.")], section)
    if isinstance(answer, Failure):
        key = section.api_key_variable
        kind = ConfigError if re.match(_REFUSED, answer.reason) else UnavailableError
        raise kind(
            f"the judge at reward.judge.url={section.url} gave no answer ({answer.reason}): start the server or "
            f"correct the URL, the name reward.judge.model={section.model}, or the API key "
            f"({f'in the environment variable {key}' if key else 'reward.judge.api_key_variable names none'})"
        )


def _cache_files(section: JudgeSection) -> list[str | None]:
    """Those to read from, the first also to write to. What process i > 0 of a job asks goes to NAME.process-i.SUFFIX,
    since hosts cannot share a sqlite file; offline, when nobody writes, all that are there are read."""
    if section.cache is None:
        return [None]
    path = Path(section.cache)
    if section.offline:
        every = (path, *sorted(path.parent.glob(f"{path.stem}.process-*{path.suffix}")))
        return [str(file) for file in every if file.is_file()]
    from tracerl_jax.parallel.distributed import process_index  # jax, which worker processes of other rewards spare

    index = process_index()
    return [str(path.with_suffix(f".process-{index}{path.suffix}")) if index else section.cache]


def _check(template: str, row: Mapping[str, object]) -> str:
    missing = missing_fields(template, {**row, **_GIVEN})
    return f"missing field {', '.join(map(repr, missing))}, which the judge's prompt names" if missing else ""


@register_reward("judge", start=start, check=lambda row: _check(settings.current().judge.prompt, row))
def judge(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[object]) -> list[Verdict]:
    template = settings.current().judge.prompt
    texts = [
        _filled(template, _row(columns, i), prompt=prompts[i], completion=completion)
        for i, completion in enumerate(completions)
    ]
    return _ask_about(texts)


@register_reward(
    "judge_steps", start=start, check=lambda row: _check(settings.current().judge.step_prompt, row), steps=True
)
def judge_steps(
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    step_ends: Sequence[Sequence[int]],
    **columns: Sequence[object],
) -> list[Verdict]:
    """No verdict on a completion when there is none on one of its steps."""
    template = settings.current().judge.step_prompt
    texts, owners = [], []
    for i, (completion, ends) in enumerate(zip(completions, step_ends, strict=True)):
        for begin, end in zip([0, *ends], ends, strict=False):
            given = {"prompt": prompts[i], "completion": completion, "before": completion[:begin]}
            texts.append(_filled(template, _row(columns, i), step=completion[begin:end], **given))
            owners.append(i)
    verdicts = _ask_about(texts)
    of_sample: list[list[Verdict]] = [[] for _ in completions]
    for owner, verdict in zip(owners, verdicts, strict=True):
        of_sample[owner].append(verdict)
    return [
        step_verdict(
            zip(ends, [v.reward for v in of_step], strict=True),
            "\n".join(f"step {k}: {v.detail}" for k, v in enumerate(of_step, 1)),
        )
        for ends, of_step in zip(step_ends, of_sample, strict=True)
    ]


def _row(columns: Mapping[str, Sequence[object]], i: int) -> dict[str, object]:
    return {name: column[i] for name, column in columns.items()}


def _filled(template: str, row: Mapping[str, object], **given: str) -> str | Failure:
    fields = {**row, **given}
    missing = missing_fields(template, fields)
    return Failure(f"the row has no field {', '.join(map(repr, missing))}") if missing else fill(template, fields)


def _ask_about(texts: Sequence[str | Failure]) -> list[Verdict]:
    """One verdict per text; every distinct question is asked once per vote."""
    section = settings.current().judge
    begin = time.perf_counter()
    bodies = {text: _body(section, text) for text in texts if isinstance(text, str)}
    keys = {(text, vote): request_key(body, vote) for text, body in bodies.items() for vote in range(section.votes)}
    with open_cache(*_cache_files(section)) as cache:
        answers: dict[tuple[str, int], Answer | Failure | None] = {
            question: cache.get(key) for question, key in keys.items()
        }
        asked = [question for question, answer in answers.items() if answer is None]
        if section.offline:
            answers |= dict.fromkeys(asked, _NOT_CACHED)
        elif asked:
            from tracerl_jax.rewards.judge_client import ask  # httpx, which worker processes of other rewards spare

            new = ask(
                [bodies[text] for text, _ in asked], section,
                received=lambda index, answer: cache.put(keys[asked[index]], answer),
            )  # fmt: skip
            answers |= dict(zip(asked, new, strict=True))
    scores = {question: _score(answer, section) for question, answer in answers.items()}
    _report(scores, len(asked), time.perf_counter() - begin)
    return [_verdict(text, answers, scores, section) for text in texts]


def _body(section: JudgeSection, text: str) -> dict[str, object]:
    system = [{"role": "system", "content": section.system}] if section.system else []
    body = {
        "model": section.model,
        "messages": [*system, {"role": "user", "content": text}],
        "temperature": section.temperature,
        "max_tokens": section.max_tokens,
        **section.fields(),
    }
    return {name: value for name, value in body.items() if value is not None}


def _score(answer: Answer | Failure, section: JudgeSection) -> float | Failure:
    if isinstance(answer, Failure):
        return answer
    if answer.cut:
        return Failure("the answer was cut at the token limit")
    score = read_score(answer.text, section)
    return Failure("no score in the answer") if score is None else score


def _verdict(text: str | Failure, answers, scores, section: JudgeSection) -> Verdict:
    if isinstance(text, Failure):
        return Verdict(None, text.reason)
    votes = [scores[text, vote] for vote in range(section.votes)]
    known = [None if isinstance(vote, Failure) else vote for vote in votes]
    said = "; ".join(vote.reason if isinstance(vote, Failure) else f"{vote:g}" for vote in votes)
    answer = answers[text, 0]
    quoted = f": {answer.text.strip()[-_SHOWN:]}" if isinstance(answer, Answer) else ""
    return Verdict(combine_votes(known, section.combine), f"judge says {said}{quoted}")


def _report(scores: Mapping[object, float | Failure], asked: int, seconds: float) -> None:
    reasons = Counter(score.reason for score in scores.values() if isinstance(score, Failure))
    log.debug("judge: %d answers, %d of them asked for, in %.1f s", len(scores), asked, seconds)
    if reasons:
        listed = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common(5))
        log.warning("judge: no score from %d of %d answers: %s", sum(reasons.values()), len(scores), listed)
