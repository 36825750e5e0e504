"""The evaluation's numbers on hand-made traces, and that judging does not hold up decoding."""

import json
import math
import threading

import pytest
from scripted_engine import ScriptedEngine, problems, text_of

from tracerl_jax.errors import ConfigError
from tracerl_jax.evals import runner
from tracerl_jax.evals.beside import consume_beside
from tracerl_jax.evals.items import Items, Seconds
from tracerl_jax.evals.runner import evaluate, protocol
from tracerl_jax.evals.statistics import Score
from tracerl_jax.rewards import Answers

ANSWERS = [
    ([7, 2], 1, "stop"),  # right
    ([7, 3, 1, 1], 2, "stop"),
    ([8], 1, "stop"),  # right
    ([8, 0, 0, 0, 0, 0, 0, 0], 6, "length"),
    ([1], 1, "stop"),  # no reference answer
    ([1], 1, "stop"),
]


def evaluate_two_answers(engine, **changes):
    return evaluate(
        engine, problems("72", "8", None), {"exact_match": 0.5}, "exact_match", decode=text_of, samples_per_prompt=2,
        options=protocol("dynamic", max_tokens=8, seed=3), **changes,
    )  # fmt: skip


def test_numbers():
    engine, seen = ScriptedEngine(ANSWERS), []
    result = evaluate_two_answers(engine, watch=lambda answers: (seen.append(answer) or answer for answer in answers))
    assert [request.sample_index for request in engine.requests] == [0, 1] * 3
    assert {request.options.seed for request in engine.requests} == {3}
    assert len(seen) == 6
    tokens, steps, commits = 17, 12, 1  # only the fourth answer fills two blocks
    assert result.scores == {
        "avg@2": Score(0.5, 0.0, 2), "pass@2": Score(1.0, 0.0, 2), "maj@2": Score(0.5, 0.0, 2),
    }  # fmt: skip
    assert result.summary() == {
        "accuracy": 0.5,
        "accuracy_stderr": 0.0,
        "scores": {
            "avg@2": {"value": 0.5, "stderr": 0.0, "problems": 2},
            "pass@2": {"value": 1.0, "stderr": 0.0, "problems": 2},
            "maj@2": {"value": 0.5, "stderr": 0.0, "problems": 2},
        },
        "tokens_per_step": tokens / steps,
        "tokens_per_forward": tokens / (steps + commits),
        "response_length": tokens / 6,
        "truncated_fraction": 1 / 6,
        "n": 3,
        "samples": 6,
        "no_verdict": 2,
    }
    assert result.metrics().keys() == {
        "accuracy", "accuracy_stderr", "pass@2", "maj@2", "tokens_per_step", "tokens_per_forward", "response_length",
        "truncated_fraction", "no_verdict",
    }  # fmt: skip
    first, last = result.records[0], result.records[-1]
    assert (first["index"], first["prompt"], first["text"], first["answer"]) == (0, "q0", "72", "72")
    assert (first["correct"], first["reward"], first["rewards"]) == (True, 0.5, {"exact_match": 1.0})
    assert (last["index"], last["sample_index"], last["correct"], last["reward"]) == (2, 1, None, None)
    assert first["ids"] == [7, 2] and first["step_map"] == [1, 1]


def test_only_what_is_not_there_is_decoded():
    whole = evaluate_two_answers(ScriptedEngine(ANSWERS))
    items = Items(whole.records[1:4], [Seconds(2.0, 3.0)])
    engine = ScriptedEngine([ANSWERS[i] for i in (0, 4, 5)])
    result = evaluate_two_answers(engine, items=items)
    assert len(engine.requests) == 3
    assert result.records == whole.records and result.summary() == whole.summary()
    speed = result.speed()
    assert speed["starts"] == 2 and speed["tokens"] == 17
    assert 2 < speed["decode_seconds"] < speed["wall_seconds"] and speed["wall_seconds"] > 3
    assert speed["tokens_per_second"] == 17 / speed["decode_seconds"]

    again = evaluate_two_answers(ScriptedEngine([]), items=items)
    assert again.summary() == whole.summary() and again.speed() == speed


def test_a_reward_without_notion_of_an_answer_has_no_majority():
    engine = ScriptedEngine(ANSWERS)
    result = evaluate(
        engine, problems("72", "8", None), {}, "ascii_share", options=protocol("dynamic", max_tokens=8),
        decode=text_of, samples_per_prompt=2,
    )  # fmt: skip
    assert list(result.scores) == ["avg@2", "pass@2"] and result.records[0]["answer"] is None
    assert result.metrics()["accuracy"] == 1.0


def test_an_answer_that_cannot_be_extracted_casts_no_vote(monkeypatch, caplog):
    def extract(text):
        return str(1 // (len(text) - 1))  # of two characters only

    monkeypatch.setattr(runner, "get_answers", lambda name: Answers(extract, lambda pairs: [False] * len(pairs)))
    engine = ScriptedEngine([([8], 1, "stop"), ([7, 2], 1, "stop")])
    result = evaluate(
        engine, problems("8"), {}, "exact_match", options=protocol("dynamic", max_tokens=8), decode=text_of,
        samples_per_prompt=2,
    )  # fmt: skip
    assert [row["answer"] for row in result.records] == [None, "1"]
    assert result.scores["maj@2"].value == 0 and result.scores["avg@2"].value == 0.5
    assert "casts no vote: ZeroDivisionError" in caplog.text


def test_unknown_accuracy_is_null():
    engine = ScriptedEngine([([1], 1, "stop")])
    options = protocol("dynamic", max_tokens=8)
    result = evaluate(engine, problems(None), {"exact_match": 1.0}, "exact_match", options=options, decode=text_of)
    assert math.isnan(result.metrics()["accuracy"]) and result.summary()["accuracy"] is None
    json.dumps(result.summary(), allow_nan=False)


def test_greedy_answers_once():
    engine = ScriptedEngine([([8], 1, "stop"), ([9], 1, "stop")])
    result = evaluate(
        engine, problems("8", "8"), {}, "exact_match", options=protocol("static", max_tokens=8), decode=text_of,
        samples_per_prompt=5,
    )  # fmt: skip
    assert (result.metrics()["accuracy"], result.n, result.samples) == (0.5, 2, 2)
    assert list(result.scores) == ["avg@1"]


def test_protocols():
    dynamic = protocol("dynamic", max_tokens=9, block_size=8, seed=5)
    assert (dynamic.strategy, dynamic.threshold, dynamic.temperature) == ("dynamic", 0.9, 1.0)
    assert (dynamic.max_tokens, dynamic.block_size, dynamic.seed) == (9, 8, 5)
    static = protocol("static", max_tokens=9, threshold=0.5, temperature=0.7)
    assert (static.strategy, static.temperature, static.denoising_steps) == ("static", 0.0, None)
    with pytest.raises(ConfigError, match="unknown evaluation strategy 'greedy'; use one of dynamic, static"):
        protocol("greedy", max_tokens=9)


def test_slow_judging_does_not_hold_up_decoding():
    decoded, batches = threading.Event(), []

    def items():
        yield from range(10)
        decoded.set()  # reached because nobody waited for `consume`

    def consume(batch):
        assert decoded.wait(60)
        batches.append(batch)

    consume_beside(items(), consume, most=4)
    assert [item for batch in batches for item in batch] == list(range(10)) and max(map(len, batches)) <= 4


def test_an_error_in_the_thread_ends_the_iteration():
    failed = threading.Event()

    def items():
        yield 0
        assert failed.wait(60)
        while True:
            yield 1

    def consume(batch):
        failed.set()
        raise ValueError("disk full")

    with pytest.raises(ValueError, match="disk full"):
        consume_beside(items(), consume)


def test_an_interruption_ends_the_thread():
    consumed = []

    def items():
        yield 0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consume_beside(items(), consumed.extend)
    assert consumed in ([], [0])
