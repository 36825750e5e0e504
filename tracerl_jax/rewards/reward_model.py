"""The reward `reward_model`: the score of a Hugging Face reward model for a chat of question and completion.

The model runs in this process, on the run's mesh, beside the policy. Chats are written by its own chat template and
scored at the last token that is not padding, as `*ForSequenceClassification` does. Settings: `reward.model`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tracerl_jax.errors import ConfigError
from tracerl_jax.rewards import settings
from tracerl_jax.rewards.judge_text import fill, missing_fields
from tracerl_jax.rewards.registry import Verdict, register_reward

if TYPE_CHECKING:
    from tracerl_jax.rewards.scorer import Scorer

log = logging.getLogger(__name__)

_scorer: Scorer | None = None


def start() -> None:
    """Loads the model. Raises ConfigError when none is named, or it cannot be used here."""
    global _scorer
    if _scorer is None:
        section = settings.current().model
        if section.path is None:
            raise ConfigError("the reward reward_model needs reward.model.path: set it to the folder of a reward model")
        from tracerl_jax.rewards.scorer import Scorer  # jax, which worker processes of other rewards spare

        _scorer = Scorer(section, settings.mesh())
        log.info("reward model %s: %s", section.path, _scorer.memory())


def stop() -> None:
    """Frees the model's memory; the next batch loads it again, with the settings of then."""
    global _scorer
    _scorer = None


settings.on_change(stop)


def _check(row: Mapping[str, object]) -> str:
    missing = missing_fields(settings.current().model.prompt, {**row, "prompt": ""})
    return f"missing field {', '.join(map(repr, missing))}, which reward.model.prompt names" if missing else ""


@register_reward("reward_model", start=start, check=_check)
def reward_model(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[object]) -> list[Verdict]:
    """No verdict on a chat that is too long, or whose row lacks a field of the prompt."""
    start()
    template = settings.current().model.prompt
    chats: list[list[dict] | str] = []
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        row = {name: column[i] for name, column in columns.items()} | {"prompt": prompt}
        wrong = _check(row)
        turns = [] if wrong else [("user", fill(template, row)), ("assistant", completion)]
        chats.append(wrong or [{"role": role, "content": content} for role, content in turns])
    scores = iter(_scorer.score([chat for chat in chats if not isinstance(chat, str)]))
    verdicts = [Verdict(None, chat) if isinstance(chat, str) else next(scores) for chat in chats]
    reasons = Counter(verdict.detail for verdict in verdicts if verdict.reward is None)
    for reason, count in reasons.items():
        log.warning("reward_model: no score for %d of %d completions: %s", count, len(verdicts), reason)
    return verdicts
