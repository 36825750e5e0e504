"""The schema of `reward.judge`, `reward.model` and `reward.process`, see docs/judges.md."""

import json
import re
from dataclasses import dataclass
from typing import Literal

from tracerl_jax.config_fields import _doc, _require, _require_not_negative, _require_positive

JUDGE_PROMPT = (
    "Here are a question and an answer to it.\n\n[Question]\n{question}\n\n[Answer]\n{completion}\n\n"
    "Is the answer right? Think it through, then end with a line that holds only yes or no."
)
STEP_PROMPT = (
    "Here are a question and the beginning of a solution.\n\n[Question]\n{question}\n\n[So far]\n{before}\n\n"
    "[Next step]\n{step}\n\n"
    "Is the next step right, given what comes before it? Think it through, then end with a line that holds only yes or "
    "no."
)


@dataclass(frozen=True)
class JudgeSection:
    url: str = _doc("", "base URL of a server with OpenAI's API, as in http://127.0.0.1:8000/v1")
    model: str = _doc("", "what the server calls the model that judges")
    api_key_variable: str = _doc("", "environment variable that holds the API key, default: no key is sent")
    prompt: str = _doc(JUDGE_PROMPT, "what `judge` asks: {prompt}, {completion} and any field of the problem's row")
    step_prompt: str = _doc(STEP_PROMPT, "what `judge_steps` asks of each step: {step}, {before} it, and those above")
    system: str = _doc("", "system message, default: none")
    read: Literal["yes_no", "number"] = _doc("yes_no", "how an answer is a score: yes is 1 and no 0, or a number")
    pattern: str = _doc("", "regular expression whose one group holds the score, default: see docs/judges.md")
    minimum: float = _doc(0.0, "lowest number that is a score")
    maximum: float = _doc(1.0, "highest number that is a score")
    votes: int = _doc(1, "times that each question is asked")
    combine: Literal["mean", "majority"] = _doc("mean", "of the votes: their mean, or what more than half of them say")
    temperature: float = _doc(0.0, "temperature of the judge; several votes need one above 0")
    max_tokens: int = _doc(2048, "of an answer; one that is cut has no score")
    body: str = _doc("", "JSON object of further fields of a request; null leaves a field out")
    timeout_seconds: float = _doc(120.0, "for an answer, each time it is asked for")
    retries: int = _doc(4, "after 408, 409, 425, 429, 5xx, time-outs and broken connections")
    backoff_seconds: float = _doc(1.0, "before the first retry, then twice as long each time, unless the server says")
    concurrency: int = _doc(16, "requests at the same time")
    requests_per_minute: float = _doc(0.0, "at most so many, 0: any number")
    cache: str | None = _doc("judge_cache.sqlite", "file that keeps every answer, none: ask again each time")
    offline: bool = _doc(False, "answers from `cache` only, nothing is sent: what is not there has no verdict")

    def __post_init__(self):
        _require(
            not self.url or self.url.startswith(("http://", "https://")),
            f"reward.judge.url is {self.url!r}, must begin with http:// or https://",
        )
        _require("{completion}" in self.prompt, "reward.judge.prompt must have {completion} in it")
        _require("{step}" in self.step_prompt, "reward.judge.step_prompt must have {step} in it")
        _require_pattern("reward.judge.pattern", self.pattern, groups=1)
        _require(
            self.minimum < self.maximum,
            f"need reward.judge.minimum < reward.judge.maximum, got {self.minimum} and {self.maximum}",
        )
        _require_positive(self, "reward.judge", "votes", "max_tokens", "concurrency")
        _require_not_negative(
            self, "reward.judge", "temperature", "retries", "backoff_seconds", "requests_per_minute"
        )
        _require(self.timeout_seconds > 0, f"reward.judge.timeout_seconds is {self.timeout_seconds}, must be above 0")
        _require(
            "temperature" in self.fields() or self.votes == 1 or self.temperature > 0,
            f"reward.judge.votes is {self.votes}, and at temperature 0 all votes are the same: set "
            "reward.judge.temperature above 0, or one vote",
        )
        _require(
            not self.offline or self.cache is not None,
            "reward.judge.offline answers from reward.judge.cache, which is none: name the file",
        )

    def fields(self) -> dict:
        """`body` as a dict. Raises ConfigError when it is none."""
        try:
            fields = json.loads(self.body or "{}")
        except ValueError:
            fields = None
        _require(isinstance(fields, dict), f"reward.judge.body must be a JSON object, got {self.body!r}")
        return fields


@dataclass(frozen=True)
class RewardModelSection:
    path: str | None = _doc(None, "Hugging Face folder with *ForSequenceClassification weights of one label")
    prompt: str = _doc("{question}", "the user's turn of the chat that is scored: {prompt} or any field of the row")
    dtype: Literal["float32", "bfloat16"] = _doc("bfloat16", "of weights and compute")
    max_tokens: int = _doc(4096, "a longer chat has no verdict")
    tokens_per_device: int = _doc(16384, "of a batch, padding included; at least one chat")

    def __post_init__(self):
        _require_positive(self, "reward.model", "max_tokens", "tokens_per_device")


@dataclass(frozen=True)
class ProcessSection:
    split: str = _doc(r"\n\s*\n", "regular expression: a step of a response ends behind each match")
    tokens: int | None = _doc(None, "a step is so many tokens, instead of `split`")
    max_steps: int = _doc(32, "with more of them, neighbours are joined")
    normalise: Literal["total", "position"] = _doc(
        "total", "scale steps as the group's total rewards, or z-score the k-th steps of a group (as published)"
    )

    def __post_init__(self):
        _require_positive(self, "reward.process", "tokens", "max_steps")
        _require_pattern("reward.process.split", self.split)


def _require_pattern(key: str, pattern: str, groups: int | None = None) -> None:
    try:
        found = re.compile(pattern).groups
    except re.error as error:
        found = str(error)
    _require(not isinstance(found, str), f"{key} is {pattern!r}, which is no regular expression: {found}")
    _require(not pattern or groups in (None, found), f"{key} is {pattern!r}, must have exactly one group: the score")
