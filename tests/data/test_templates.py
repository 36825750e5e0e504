"""Prompt templates: the texts of every family and kind of row, thinking, and how wrong names are reported."""

import pytest

from tracerl_jax.data.char_tokenizer import build_char_tokenizer
from tracerl_jax.data.templates import TEMPLATES, kind_of, render_prompt
from tracerl_jax.errors import ConfigError, UserError

STEPS = "\nPlease reason step by step, and put your final answer within \\boxed{}."
BOX = "You need to put your final answer in \\boxed{}. This is the problem:\n"
FUNCTION = (
    "\nPlace your code within a single Python code block ```python ```. Do not include more than one code block. "
)
STDIO = (
    "You should put your code in ```python ```. "
    "Use input() to read input and print() to produce output in your script. "
)
OPTION = (
    "You need to think step by step and put the final option (A, B, C, or D only—no other character) in \\boxed{}. "
)
USER, END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant"
DREAM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + USER
LLADA = "<|startoftext|><|start_header_id|>user<|end_header_id|>"
LLADA_END = "<|eot_id|><|startoftext|><|start_header_id|>assistant<|end_header_id|>\n"
PROBLEM = "This is the problem:\nq{1}\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Its chat template is the last message, behind a mark where thinking is asked for or switched off."""
    tokenizer = build_char_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    tokenizer.chat_template = (
        "{{ messages[-1].content }}{% if enable_thinking is defined %}[{{ enable_thinking }}]{% endif %}"
    )
    return tokenizer


@pytest.mark.parametrize(
    "template, kind, prefix, expected",
    [
        ("plain", "math", "", "q{1}"),
        ("plain", "function", "p", "q{1}p"),
        ("Q: {question} A:", "stdio", "", "Q: q{1} A:"),
        ("sdar", "math", "", f"{USER}q{{1}}{STEPS}{END}"),
        ("math", "math", "", f"{USER}q{{1}}{STEPS}{END}"),
        ("sdar_direct", "math", "", f"{USER}{BOX}q{{1}}{END}"),
        ("sdar_think", "math", "", f"{USER}{BOX}q{{1}}{END}<think>"),
        ("math_think", "math", "", f"{USER}{BOX}q{{1}}{END}<think>"),
        ("sdar", "function", "", f"{USER}q{{1}}{FUNCTION}{END}"),
        ("sdar", "function", "def f():", f"{USER}q{{1}}{FUNCTION}{END}\ndef f():"),
        ("sdar", "stdio", "", f"{USER}{PROBLEM}{STDIO}{END}"),
        ("sdar_think", "stdio", "", f"{USER}{PROBLEM}{STDIO}{END}<think>"),
        ("sdar", "option", "", f"{USER}{PROBLEM}{OPTION}{END}"),
        ("sdar", "verbatim", "", f"{USER}q{{1}}{END}"),
        ("dream", "math", "", f"{DREAM}{BOX}q{{1}}{END}\n"),
        ("dream", "function", "def f():", f"{DREAM}q{{1}}{FUNCTION}{END}\ndef f():"),
        ("dream", "stdio", "", f"{DREAM}{PROBLEM}{STDIO}{END}\n"),
        ("dream", "option", "", f"{DREAM}{PROBLEM}{OPTION}{END}\n"),
        ("llada", "math", "", f"{LLADA}{BOX}q{{1}}{LLADA_END}"),
        ("llada", "function", "def f():", f"{LLADA}q{{1}}{FUNCTION}{LLADA_END}def f():"),
        ("llada", "stdio", "", f"{LLADA}{PROBLEM} {STDIO}{LLADA_END}"),
        ("chat", "math", "", f"q{{1}}{STEPS}"),
        ("chat", "function", "def f():", f"q{{1}}{FUNCTION}def f():"),
        ("chat_direct", "math", "", f"{BOX}q{{1}}"),
        ("chat_think", "math", "", f"{BOX}q{{1}}[True]<think>"),
        ("chat_no_think", "math", "", f"q{{1}}{STEPS}[False]"),
    ],
)
def test_texts(tokenizer, template, kind, prefix, expected):
    assert render_prompt("q{1}", tokenizer, template, kind, prefix) == expected


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", ["math", "function", "stdio", "option", "verbatim"])
def test_every_template_has_every_kind(tokenizer, template, kind):
    assert render_prompt("the question", tokenizer, template, kind).count("the question") == 1


def test_a_chat_template_that_opens_the_thought_itself_is_left_alone(tokenizer, tmp_path):
    thinking = build_char_tokenizer(tmp_path)
    thinking.chat_template = "{{ messages[-1].content }}<think>\n"
    assert render_prompt("q", thinking, "chat_think").count("<think>") == 1


def test_the_kind_of_a_row():
    assert kind_of({"question": "q"}) == "math"
    assert kind_of({"test_method": "stdio", "_kind": "math"}) == "stdio"
    assert kind_of({"test_method": "function"}) == "function"
    assert kind_of({"_kind": "option"}) == "option"


def test_wrong_templates(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match=r"unknown template 'sdarr'; did you mean 'sdar'\? use one of plain, chat, "):
        render_prompt("q", tokenizer, "sdarr")
    bare = build_char_tokenizer(tmp_path)
    bare.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        render_prompt("q", bare, "chat")
