"""The rewards judge and judge_steps against a server that fails in every way."""

import asyncio
import itertools
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from judge_utils import HANG_UP, completion, serving

from tracerl_jax.config_rewards import JudgeSection
from tracerl_jax.errors import ConfigError, UserError
from tracerl_jax.parallel import distributed
from tracerl_jax.rewards import check_row, judge_client, score, start_rewards

ROWS = [{"question": "1+1=", "ground_truth_answer": "2"}] * 99


@pytest.fixture
def judged(configure, tmp_path):
    """judged(server, texts, **judge keys) -> RewardResult of `judge`; answers are kept in a file of the test."""

    def run(url, texts, reward="judge", weight=1.0, step_ends=None, rows=ROWS, **keys):
        configure(judge=settings(url, **keys))
        return score({reward: weight}, ["p"] * len(texts), texts, rows[: len(texts)], step_ends)

    def settings(url, **keys):
        return {
            "url": url, "model": "referee", "prompt": "{question}{completion}", "backoff_seconds": 0.0, "retries": 2,
            "timeout_seconds": 30.0, "cache": str(tmp_path / "cache" / "judge.sqlite"), **keys,
        }  # fmt: skip

    run.settings = settings
    return run


def right(question, headers):
    return "yes" if question.endswith("2") else "no"


def test_scores_are_in_order_and_equal_questions_are_asked_once(judged):
    with serving(right) as server:
        result = judged(server.url, ["2", "3", "2", "{question}2"], weight=0.5, system="Be strict.")
    np.testing.assert_array_equal(result.total, [0.5, 0, 0.5, 0.5])
    assert sorted(server.questions) == ["1+1=2", "1+1=3", "1+1={question}2"]
    body = server.asked[0]
    assert body.pop("messages")[0] == {"role": "system", "content": "Be strict."}
    assert body == {"model": "referee", "temperature": 0.0, "max_tokens": 2048}
    assert result.details["judge"][0].startswith("judge says 1: yes")


def test_further_fields_of_a_request_and_the_key(judged, monkeypatch):
    monkeypatch.setenv("REFEREE_KEY", "secret")
    body = '{"max_tokens": null, "max_completion_tokens": 9, "temperature": 0.3}'
    with serving(lambda question, headers: "yes" if headers.get("Authorization") == "Bearer secret" else 401) as server:
        assert judged(server.url, ["2"], body=body, api_key_variable="REFEREE_KEY").total == [1]
    assert server.asked[0] | {"messages": None} == {
        "model": "referee", "messages": None, "temperature": 0.3, "max_completion_tokens": 9,
    }  # fmt: skip


@pytest.mark.parametrize(("combine", "totals"), [("mean", [2 / 3, 0.5, np.nan]), ("majority", [1, np.nan, np.nan])])
def test_votes(judged, combine, totals):
    votes = {"1+1=a": ["yes", "no", "yes"], "1+1=b": ["no", "yes", "perhaps"], "1+1=c": ["yes", "?", "?"]}
    with serving(lambda question, headers: votes[question].pop()) as server:
        result = judged(server.url, ["a", "b", "c"], votes=3, temperature=1.0, combine=combine)
    np.testing.assert_allclose(result.total, totals)
    assert len(server.asked) == 9


def test_what_is_wrong_for_a_while_is_asked_again(judged):
    wrong = itertools.chain([429, 500, HANG_UP, {"raw": "<html>"}, {"choices": []}, 503])
    with serving(lambda question, headers: next(wrong, None) or "yes") as server:
        assert judged(server.url, ["2"], retries=6).total == [1]
    assert len(server.asked) == 7


def test_failures_cost_only_their_own_sample_its_verdict(judged, caplog):
    answers = {
        "1+1=a": "yes", "1+1=b": 500, "1+1=c": 400, "1+1=d": HANG_UP, "1+1=e": "perhaps", "1+1=f": {"raw": "<html>"},
        "1+1=g": completion("yes, because", "length"), "1+1=h": completion(None), "1+1=i": "no",
    }  # fmt: skip
    with serving(lambda question, headers: answers[question]) as server:
        result = judged(server.url, list("abcdefghi"))
    np.testing.assert_array_equal(result.total, [1, *[np.nan] * 7, 0])
    assert result.no_verdict == 7
    assert "no score from 7 of 9 answers" in caplog.text and "1 x HTTP 500" in caplog.text
    details = result.details["judge"]
    assert "HTTP 400: " in details[2] and "status 400" in details[2] and "cut at the token limit" in details[6]


def test_a_server_that_does_not_answer_in_time(judged):
    released = threading.Event()

    def reply(question, headers):
        if question.endswith("slow"):
            released.wait(60)
        return "yes"

    with serving(reply) as server:
        result = judged(server.url, ["fast", "slow"], timeout_seconds=0.5, retries=1)
        released.set()
    np.testing.assert_array_equal(result.total, [1, np.nan])
    assert "no answer in 0.5 s" in result.details["judge"][1]


def test_after_failures_in_a_row_the_rest_is_not_asked(judged):
    with serving(lambda question, headers: 503) as server:
        result = judged(server.url, [str(i) for i in range(99)], concurrency=4, retries=1)
        assert np.isnan(result.total).all()
        assert 4 * 2 <= len(server.asked) <= 8 * 2
        assert "not asked, after " in result.details["judge"][-1]
        server.reply = right  # the next batch tries again
        assert judged(server.url, ["2"], concurrency=4, retries=1).total == [1]


def test_concurrency_is_bounded(judged):
    def reply(question, headers):
        time.sleep(0.01)
        return "yes"

    with serving(reply) as server:
        assert judged(server.url, [str(i) for i in range(40)], concurrency=3).total.sum() == 40
    assert 1 < server.most_together <= 3


def test_requests_per_minute_are_bounded(judged):
    times = []
    with serving(lambda question, headers: times.append(time.monotonic()) or "yes") as server:
        judged(server.url, list("abcdef"), requests_per_minute=60 * 20)
    assert max(times) - min(times) > 4 / 20  # five waits of a twentieth of a second; the server may see one later


def test_inside_a_running_event_loop(judged):
    async def notebook(url):
        return judged(url, ["2"])

    with serving(right) as server:
        assert asyncio.run(notebook(server.url)).total == [1]


# The cache


def test_nothing_is_asked_twice_and_another_question_is_asked(judged):
    votes = {"votes": 2, "temperature": 1.0}
    with serving(right) as server:
        first = judged(server.url, ["2", "3"], **votes)
        assert len(server.asked) == 4
        again = judged(server.url, ["3", "2"], **votes)
        np.testing.assert_array_equal(again.total, first.total[::-1])
        assert len(server.asked) == 4
        judged(server.url, ["2"], votes=3, temperature=1.0)
        assert len(server.asked) == 5
        judged(server.url, ["2"], **votes, prompt="Is {completion} it?")
        judged(server.url, ["2"], **votes, model="umpire")
        judged(server.url, ["2"], **votes, max_tokens=9)
        assert len(server.asked) == 11
        judged(server.url, ["2"], **votes, cache=None)
        judged(server.url, ["2"], **votes, cache=None)
        assert len(server.asked) == 15


def test_answers_are_read_again_under_other_rules(judged):
    with serving(lambda question, headers: "4") as server:
        assert np.isnan(judged(server.url, ["2"]).total)
        assert judged(server.url, ["2"], read="number", maximum=5.0).total == [4]
    assert len(server.asked) == 1


def test_failures_are_not_kept(judged):
    with serving(lambda question, headers: 500) as server:
        assert np.isnan(judged(server.url, ["2"]).total)
        server.reply = right
        assert judged(server.url, ["2"]).total == [1]


def test_offline_replay(judged, configure):
    with serving(right) as server:
        online = judged(server.url, ["2", "3"])
    offline = judged("", ["3", "new", "2"], offline=True)
    np.testing.assert_array_equal(offline.total, [online.total[1], np.nan, online.total[0]])
    assert "not in the cache" in offline.details["judge"][1]
    start_rewards(["judge"])
    configure(judge=judged.settings("", offline=True, cache="nowhere.sqlite"))
    with pytest.raises(ConfigError, match=r"reward\.judge\.cache=nowhere\.sqlite, and there is no such file"):
        start_rewards(["judge"])


def test_a_file_that_is_no_cache(judged, configure, tmp_path):
    (tmp_path / "notes.txt").write_text("not a database, " * 100)
    configure(judge=judged.settings("http://127.0.0.1:9", cache=str(tmp_path / "notes.txt")))
    with pytest.raises(ConfigError, match=r"notes\.txt: cannot be used as a sqlite file"):
        start_rewards(["judge"])


# The start of a run


@pytest.mark.parametrize(
    ("keys", "reply", "message", "status"),
    [
        ({"url": ""}, 200, r"need reward\.judge\.url: set it", 2),
        ({"model": ""}, 200, r"need reward\.judge\.model: set it", 2),
        ({"url": "http://127.0.0.1:9/v1"}, 200, r"judge\.url=http://127\.0\.0\.1:9/v1 gave no answer \(Conn", 76),
        ({"api_key_variable": "NO_SUCH_KEY"}, 200, "there is no such environment variable", 2),
        ({"api_key_variable": "PATH"}, 401, "HTTP 401.*in the environment variable PATH", 2),
        ({}, 404, r"HTTP 404.*reward\.judge\.model=referee", 2),
        ({}, 503, "HTTP 503", 76),
    ],
)
def test_a_judge_that_cannot_be_asked_is_found_at_the_start(judged, configure, keys, reply, message, status):
    with serving(lambda *_: reply) as server:
        configure(judge=judged.settings(**{"url": server.url, **keys}))
        with pytest.raises(UserError, match=message) as raised:
            start_rewards(["judge_steps"])
        assert raised.value.status == status  # 76: a restart may find it back


def test_a_judge_that_answers_is_accepted(judged, configure):
    with serving(right) as server:
        configure(judge=judged.settings(server.url))
        start_rewards(["judge", "exact_match"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"url": "127.0.0.1"}, "must begin with http"),
        ({"prompt": "Is it right?"}, "must have {completion} in it"),
        ({"step_prompt": "{completion}"}, "must have {step} in it"),
        ({"pattern": "("}, "is no regular expression"),
        ({"pattern": "yes|no"}, "must have exactly one group"),
        ({"votes": 3}, "at temperature 0 all votes are the same"),
        ({"votes": 0}, "must be at least 1"),
        ({"minimum": 1.0}, "minimum < reward.judge.maximum"),
        ({"body": "{"}, "must be a JSON object"),
        ({"timeout_seconds": 0.0}, "must be above 0"),
        ({"offline": True, "cache": None}, "name the file"),
    ],
)
def test_settings_that_cannot_work_name_their_key(keys, message):
    with pytest.raises(ConfigError, match=rf"reward\.judge\..*{message}"):
        JudgeSection(**keys)


def test_rows_without_a_field_of_the_prompt(judged, configure):
    with serving(right) as server:
        result = judged(
            server.url, ["2", "2"], prompt="{rubric}{completion}", rows=[{"rubric": "r"}, {"rubric": None}]
        )
    np.testing.assert_array_equal(result.total, [1, np.nan])
    assert check_row("judge", {"rubric": "r"}) == ""
    assert check_row("judge", {"question": "1"}) == "missing field 'rubric', which the judge's prompt names"


# Steps


def test_every_step_is_asked_about_with_what_comes_before_it(judged):
    def reply(question, headers):
        return 500 if "x" in question else "no" if "wrong" in question.rpartition("|")[2] else "yes"

    texts = ["one\ntwo", "right\nwrong\n!", "good\nx", ""]
    ends = [[4, 7], [6, 12, 13], [5, 6], [0]]
    with serving(reply) as server:
        keys = {"reward": "judge_steps", "step_ends": ends, "step_prompt": "{question}{before}|{step}"}
        result = judged(server.url, texts, **keys, weight=0.5)
    np.testing.assert_array_equal(result.by_name["judge_steps"], [2, 2, np.nan, 1])
    np.testing.assert_array_equal(result.total, [1, 1, np.nan, 0.5])
    assert result.steps == [((4, 0.5), (7, 0.5)), ((6, 0.5), (12, 0.0), (13, 0.5)), (), ((0, 0.5),)]
    assert "1+1=right\n|wrong\n" in server.questions
    assert "step 2: judge says HTTP 500" in result.details["judge_steps"][2]


def test_without_steps_a_completion_is_one(judged):
    with serving(right) as server:
        result = judged(server.url, ["1\n2"], reward="judge_steps", step_prompt="{before}|{step}")
    assert result.steps == [((3, 1.0),)] and server.questions == ["|1\n2"]


def test_processes_of_a_job_write_a_cache_each_and_offline_all_are_read(judged, configure, monkeypatch):
    texts = []
    for process in (0, 2):
        monkeypatch.setattr(distributed, "process_index", lambda process=process: process)
        with serving(right) as server:
            online = judged(server.url, [f"{process}"])
            texts.append(online.total[0])
    cache = Path(judged.settings("")["cache"])
    assert cache.exists() and cache.with_suffix(f".process-2{cache.suffix}").exists()
    offline = judged("", ["2", "0", "new"], offline=True)
    np.testing.assert_array_equal(offline.total, [texts[1], texts[0], np.nan])
    cache.unlink()
    configure(judge=judged.settings("", offline=True))
    start_rewards(["judge"])  # of a host that has only its own


def test_processes_of_a_job_share_the_limits(monkeypatch):
    monkeypatch.setattr(judge_client, "process_count", lambda: 8)
    assert judge_client.share_of(JudgeSection(concurrency=16)) == 2
    assert judge_client.share_of(JudgeSection(concurrency=4)) == 1
