"""Prompts and supervised examples as token ids."""

import numpy as np
import pytest

from tracerl_jax.data.char_tokenizer import build_char_tokenizer
from tracerl_jax.data.prompts import encode_prompts, encode_sft
from tracerl_jax.errors import ConfigError, DataError

EOS, MASK = 1, 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return build_char_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def ids(text):
    return ["0123456789+-=;#".index(character) + 4 for character in text]


def test_prompts_stay_whole_records(tokenizer, caplog):
    rows = [
        {"question": "1+2=", "ground_truth_answer": "3", "_source": "f.jsonl:1"},
        {"question": "1" * 9, "ground_truth_answer": "3", "_source": "f.jsonl:2"},
        {"question": "1<mask>", "ground_truth_answer": "3", "_source": "f.jsonl:5"},
        {"question": "", "ground_truth_answer": "3"},
        {"question": None, "prompt_ids": [4]},
        {"question": "12345678", "ground_truth_answer": "4", "_source": "f.jsonl:9"},
    ]
    problems = encode_prompts(rows, tokenizer, "plain", 8, on_bad_row="skip")
    assert [problem.index for problem in problems] == [0, 5]
    assert problems[0].prompt_text == "1+2=" and problems[0].columns is rows[0]
    assert problems[0].prompt_ids.dtype == np.int32
    assert problems[0].prompt_ids.tolist() == ids("1+2=") and problems[1].prompt_ids.tolist() == ids("12345678")
    assert "skipped 4 bad rows, kept 2: f.jsonl:2: the prompt has 9 tokens, the limit is 8" in caplog.text
    for row, message in (
        (rows[1], "f.jsonl:2: the prompt has 9 tokens, the limit is 8; shorten it"),
        (rows[2], "f.jsonl:5: the prompt contains the mask token"),
        (rows[3], "row 2: the prompt is empty"),
        (rows[4], "row 2: no text in field 'question'"),
    ):
        with pytest.raises(DataError, match=message):
            encode_prompts([rows[0], row], tokenizer, "plain", 8)
    with pytest.raises(DataError, match=r"none of the 1 rows can be used: f.jsonl:2: the prompt has 9 tokens"):
        encode_prompts(rows[1:2], tokenizer, "plain", 8, on_bad_row="skip")


FUNCTION = {"question": "1+", "prefix": "2=", "test_method": "function"}


@pytest.mark.parametrize(
    "row, template, prefix, text, begin",
    [
        (FUNCTION, "plain", None, "1+2=", "2="),
        (FUNCTION, "{question};", None, "1+;2=", "2="),
        (FUNCTION, "plain", "", "1+", ""),
        (FUNCTION, "plain", "3", "1+3", "3"),
        (FUNCTION, "sdar_think", None, None, ""),
        ({"question": "1+", "prefix": "2="}, "plain", None, "1+", ""),
        ({"question": "1+", "prefix": "2=", "test_method": "stdio"}, "plain", None, "1+", ""),
        ({"question": "1+"}, "plain", "2=", "1+2=", "2="),
    ],
)
def test_what_a_response_begins_with_is_part_of_its_prompt(tokenizer, row, template, prefix, text, begin):
    (problem,) = encode_prompts([row], tokenizer, template, 500, prefix=prefix)
    assert problem.prefix == begin
    if text is not None:
        assert problem.prompt_text == text and problem.prompt_ids.tolist() == ids(text)


def test_a_prefix_must_be_a_text_and_not_stand_before_thinking(tokenizer):
    with pytest.raises(DataError, match="row 1: no text in field 'prefix'"):
        encode_prompts([FUNCTION | {"prefix": ["2="]}], tokenizer, "plain", 500)
    with pytest.raises(ConfigError, match=r"sdar_think makes the response begin with <think>.*task\.prefix"):
        encode_prompts([FUNCTION], tokenizer, "sdar_think", 500, prefix="2=")


def test_supervised_responses_are_cut_behind_the_prefix(tokenizer):
    rows = [FUNCTION | {"response": "2=3"}, FUNCTION | {"response": "3"}]
    whole, other = encode_sft(rows, tokenizer, "plain", max_prompt_tokens=9, max_response_tokens=9)
    assert whole.prompt_ids.tolist() == ids("1+2=") and whole.response_ids.tolist() == [*ids("3"), EOS]
    assert other.prompt_ids.tolist() == ids("1+") and other.response_ids.tolist() == [*ids("3"), EOS]


def encode(rows, tokenizer, on_bad_row="fail"):
    return encode_sft(rows, tokenizer, "plain", max_prompt_tokens=6, max_response_tokens=5, on_bad_row=on_bad_row)


def test_supervised_examples(tokenizer):
    text, stepped, trace = encode(
        [
            {"question": "1+2=", "response": "3#3"},
            {"question": "1+2=", "response": "3#3", "step_map": [2, 1, 2]},
            {"prompt_ids": [5, 6], "ids": [7, 8], "step_map": [1, 1]},
        ],
        tokenizer,
    )
    assert text.prompt_ids.tolist() == ids("1+2=") and text.response_ids.tolist() == [*ids("3#3"), EOS]
    assert text.step_map is None and text.response_ids.dtype == np.int32
    assert stepped.response_ids.tolist() == [*ids("3#3"), EOS] and stepped.step_map.tolist() == [2, 1, 2, 3]
    assert trace.prompt_ids.tolist() == [5, 6] and trace.response_ids.tolist() == [7, 8]
    assert trace.step_map.tolist() == [1, 1] and trace.index == 2


@pytest.mark.parametrize(
    "row, message",
    [
        ({"question": "1=", "response": None}, "no text in field 'response'"),
        ({"question": "1=", "response": "12345"}, "the response has 6 tokens with EOS, the limit is 5"),
        ({"question": "1" * 7, "response": "1"}, "the prompt has 7 tokens, the limit is 6"),
        ({"question": "1=", "response": "1<mask>"}, "the response contains the mask token"),
        ({"question": "1=", "response": "12", "step_map": [1]}, "'step_map' must hold 2 positive integers"),
        ({"question": "1=", "response": "12", "step_map": [0, 1]}, "'step_map' must hold 2 positive integers"),
        ({"question": "1=", "response": "12", "step_map": 3}, "'step_map' must hold 2 positive integers"),
        ({"prompt_ids": [5], "ids": [19]}, "field 'ids' must be a list of token ids below 19"),
        ({"prompt_ids": [5], "ids": []}, "field 'ids' must be a list"),
        ({"prompt_ids": "5", "ids": [6]}, "field 'prompt_ids' must be a list"),
        ({"question": "1=", "ids": [6]}, "field 'prompt_ids' must be a list"),
        ({"prompt_ids": [MASK], "ids": [6]}, "the prompt contains the mask token"),
    ],
)
def test_bad_examples(tokenizer, row, message, caplog):
    good = {"question": "1=", "response": "1"}
    with pytest.raises(DataError, match=f"row 2: .*{message}"):
        encode([good, row], tokenizer)
    assert [example.index for example in encode([good, row, good], tokenizer, on_bad_row="skip")] == [0, 2]
    assert "skipped 1 bad rows, kept 2" in caplog.text


def test_an_end_of_sequence_token_is_needed(tmp_path):
    tokenizer = build_char_tokenizer(tmp_path)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no EOS token"):
        encode([{"question": "1=", "response": "1"}], tokenizer)
