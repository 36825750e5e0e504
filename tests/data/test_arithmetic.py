"""The arithmetic task: right answers, disjoint splits, deterministic; and its tokenizer."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tracerl_jax.data.arithmetic import CHARACTERS, Difficulty, make_problems
from tracerl_jax.data.char_tokenizer import build_char_tokenizer
from tracerl_jax.data.procedural import split_of
from tracerl_jax.errors import ConfigError

difficulties = st.builds(
    lambda low, extra, digits, subtraction, modulus: Difficulty(low, low + extra, digits, subtraction, modulus),
    st.integers(2, 4),
    st.integers(0, 2),
    st.integers(2, 3),
    st.integers(0, 1),
    st.sampled_from([0, 10]),
)


@settings(deadline=None)
@given(st.integers(0, 2**31), difficulties)
def test_solutions_are_right(seed, difficulty):
    for row in make_problems(seed, 5, "train", difficulty):
        question, answer = row["question"].removesuffix("="), row["ground_truth_answer"]
        assert set(row["question"] + row["response"]) <= set(CHARACTERS)
        assert difficulty.subtraction or "-" not in question
        operators = [i for i, character in enumerate(question) if character in "+-"]
        totals = [eval(question[:end]) for end in (*operators[1:], len(question))]
        if difficulty.modulus:
            totals = [total % difficulty.modulus for total in totals]
        assert min(totals) >= 0
        assert row["response"].replace("#", ";").removeprefix(";").split(";") == [str(total) for total in totals]
        assert row["response"].split("#")[1] == answer == str(totals[-1])


def test_splits_are_disjoint_and_deterministic():
    difficulty = Difficulty()
    train = [row["question"] for row in make_problems(0, 2000, "train", difficulty)]
    test = [row["question"] for row in make_problems(1, 400, "test", difficulty)]
    assert len(set(train)) == 2000 and len(set(test)) == 400
    assert not set(train) & set(test)
    assert make_problems(0, 2000, "train", difficulty)[:50] == make_problems(0, 50, "train", difficulty)
    assert make_problems(5, 50, "train", difficulty) != make_problems(0, 50, "train", difficulty)


def test_one_question_in_five_is_held_out():
    questions = [f"{a}+{b}=" for a in range(1, 100) for b in range(1, 100)]
    share = sum(split_of(question) == "test" for question in questions) / len(questions)
    assert 0.18 < share < 0.22


def test_shortcuts_leave_out_the_last_operand_and_never_spoil_the_answer():
    rows = make_problems(0, 1000, "train", Difficulty(5, 5, digits=1, modulus=10, shortcuts=40))
    assert all(eval(row["question"][:-1]) % 10 == int(row["ground_truth_answer"]) for row in rows)
    totals = [row["response"].replace("#", ";").split(";") for row in rows]
    assert {len(t) for t in totals} == {3, 4}
    assert 0.35 < sum(len(t) == 3 for t in totals) / 1000 < 0.45
    assert all(t[-1] == row["ground_truth_answer"] for t, row in zip(totals, rows, strict=True) if len(t) == 4)


def test_impossible_requests():
    with pytest.raises(ConfigError, match=r"only about \d+ test questions .*raise digits"):
        make_problems(0, 500, "test", Difficulty(2, 2, 1))
    with pytest.raises(ConfigError, match="min_operands <= max_operands"):
        Difficulty(3, 2)
    with pytest.raises(ConfigError, match="digits >= 1"):
        Difficulty(digits=0)


def test_tokenizer_round_trip(tmp_path):
    build_char_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    special = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id, tokenizer.unk_token_id)
    assert special == (0, 1, 2, 3)
    assert len(tokenizer) == 4 + len(CHARACTERS) == 19
    text = "37+58-19=95;95-19=76#76"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == [4 + CHARACTERS.index(character) for character in text]
    assert tokenizer.decode([*ids, 1, 0], skip_special_tokens=True) == text
    assert tokenizer("1 x", add_special_tokens=False)["input_ids"] == [5, 3, 3]
    messages = [{"role": "user", "content": "1+2="}]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == "1+2="
