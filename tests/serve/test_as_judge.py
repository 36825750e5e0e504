"""Our own server as the judge of a reward."""

import numpy as np
import pytest

from tracerl_jax.config import RewardSection
from tracerl_jax.config_rewards import JudgeSection
from tracerl_jax.errors import ConfigError
from tracerl_jax.rewards import score, settings, start_rewards


@pytest.fixture
def judge(start, tmp_path):
    """judge(key) configures the reward for a server that wants the key "secret"; the reference is what it answers."""
    running = start(api_key="secret")

    def configure(**keys):
        # A random model says anything: the score is the last digit before the answer ends at one of four letters.
        section = JudgeSection(
            url=f"{running.url}/v1", model="tiny", prompt="{question} {completion}", temperature=5.0, max_tokens=60,
            read="number", pattern=r"(\d)(?=\D*$)", maximum=9.0, cache=str(tmp_path / "judge.sqlite"),
            body='{"seed": 5, "ignore_eos": true, "stop": ["G", "K", "e", "z"]}', **keys,
        )  # fmt: skip
        settings.configure(RewardSection(judge=section))
        return running

    yield configure
    settings.configure(RewardSection())


def test_our_server_judges(judge, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    running = judge(api_key_variable="JUDGE_KEY")
    start_rewards(["judge"])
    texts = [f"answer {i}" for i in range(5)]
    rows = [{"question": "1+1="}] * len(texts)
    result = score({"judge": 1.0}, texts, texts, rows)
    asked = {"model": "tiny", "temperature": 5.0, "max_tokens": 60, "stop": ["G", "K", "e", "z"]}
    expected = []
    for text in texts:
        answer = running.client().chat.completions.create(
            messages=[{"role": "user", "content": f"1+1= {text}"}], seed=5, extra_body={"ignore_eos": True}, **asked
        )
        choice = answer.choices[0]
        digits = [c for c in choice.message.content if c in "0123456789"]
        expected.append(float(digits[-1]) if digits and choice.finish_reason == "stop" else np.nan)
    np.testing.assert_array_equal(result.total, expected)
    assert 0 < result.no_verdict < len(texts)  # it gives both scores and answers without one
    running.wait_until_empty()


def test_without_its_key_our_server_is_no_judge(judge):
    judge()
    with pytest.raises(ConfigError, match=r"HTTP 401.*reward\.judge\.api_key_variable names none"):
        start_rewards(["judge"])
