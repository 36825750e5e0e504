r"""Prompt templates: what stands around a question.

A template is one of

    plain         the question as it is
    chat          the tokenizer's chat template around the question and an instruction (step by step, answer in a box)
    chat_direct   the same without "step by step"
    chat_think    the chat template in thinking mode: the response begins with <think>
    chat_no_think the chat template with thinking switched off, for models that think by default
    sdar          the TraceRL paper's prompt for SDAR and TraDo, as its code sends it (no newline after "assistant")
    sdar_direct   the same without "step by step"
    sdar_think    the paper's prompt for thinking models
    dream         the paper's prompt for Dream and DiffuCoder
    llada         the paper's prompt for LLaDA and MMaDA
    any text with {question} in it

and says what to do by the kind of the row: math, function (complete a function), stdio (write a program), option
(choose a letter), or verbatim (the question says it itself). `math` and `math_think` are older names of sdar and
sdar_think.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from tracerl_jax.data.rows import KIND
from tracerl_jax.errors import ConfigError
from tracerl_jax.interop.tokenizer import render_chat

THINK = "<think>"


@dataclass(frozen=True)
class Template:
    texts: Mapping[str, str]  # kind of row -> what the user says, with {question}
    opening: str = ""
    closing: str = ""  # up to the response
    before_prefix: str = ""  # between the closing and a prefix that the response is to begin with
    chat: bool = False  # opening and closing are those of the tokenizer's chat template
    thinking: bool | None = None  # None: as the model does by itself


_STEPS = "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."
_BOX = "You need to put your final answer in \\boxed{}. This is the problem:\n{question}"
_CODE = {
    "function": "{question}\nPlace your code within a single Python code block ```python ```. "
    "Do not include more than one code block. ",
    "stdio": "This is the problem:\n{question}\nYou should put your code in ```python ```. "
    "Use input() to read input and print() to produce output in your script. ",
}
_LETTER = "put the final option (A, B, C, or D only—no other character) in \\boxed{}. "
_OPTION = {"option": "This is the problem:\n{question}\nYou need to think step by step and " + _LETTER}
_REST = {**_CODE, **_OPTION, "verbatim": "{question}"}
_STEP_BY_STEP = {"math": _STEPS, **_REST}
_BOXED = {"math": _BOX, **_REST}
_DIRECT = {**_BOXED, "option": "This is the problem:\n{question}\nYou need to " + _LETTER}
_CHATML = "<|im_end|>\n<|im_start|>assistant"
_LLADA_STDIO = _CODE["stdio"].replace("\nYou should", "\n You should")

TEMPLATES = {
    "plain": Template(dict.fromkeys(_BOXED, "{question}")),
    "chat": Template(_STEP_BY_STEP, chat=True),
    "chat_direct": Template(_DIRECT, chat=True),
    "chat_think": Template(_BOXED, chat=True, thinking=True),
    "chat_no_think": Template(_STEP_BY_STEP, chat=True, thinking=False),
    "sdar": Template(_STEP_BY_STEP, "<|im_start|>user\n", _CHATML, before_prefix="\n"),
    "sdar_direct": Template(_DIRECT, "<|im_start|>user\n", _CHATML, before_prefix="\n"),
    "sdar_think": Template(_BOXED, "<|im_start|>user\n", _CHATML + THINK, thinking=True),
    "dream": Template(
        _BOXED, "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n", _CHATML + "\n"
    ),
    "llada": Template(
        {**_BOXED, "stdio": _LLADA_STDIO},
        "<|startoftext|><|start_header_id|>user<|end_header_id|>",
        "<|eot_id|><|startoftext|><|start_header_id|>assistant<|end_header_id|>\n",
    ),
}
_OLD_NAMES = {"math": "sdar", "math_think": "sdar_think"}


def get_template(name: str) -> Template:
    """Raises `ConfigError` for an unknown name."""
    name = _OLD_NAMES.get(name, name)
    if name in TEMPLATES:
        return TEMPLATES[name]
    if "{question}" in name:
        return Template(dict.fromkeys(_BOXED, name))
    close = difflib.get_close_matches(name, TEMPLATES, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ConfigError(
        f"unknown template {name!r}; {hint}use one of {', '.join(TEMPLATES)}, or a text with {{question}} in it"
    )


def kind_of(row: Mapping[str, object]) -> str:
    """Which text of a template is for this row."""
    method = row.get("test_method")
    return method if method in _CODE else row.get(KIND, "math")


def render_prompt(question: str, tokenizer, template: str, kind: str = "math", prefix: str = "") -> str:
    """The text up to what is decoded. `prefix` is what the response is made to begin with.

    Raises `ConfigError` for an unknown template and for a prefix where the response begins with thinking,
    `CheckpointError` for a tokenizer without the chat template.
    """
    wanted = get_template(template)
    if prefix and wanted.thinking:
        raise ConfigError(
            f"template {template} makes the response begin with {THINK}, so it cannot begin with {prefix!r}: set "
            "task.prefix to an empty text, or take a template that does not think"
        )
    text = wanted.texts[kind].replace("{question}", question)
    if not wanted.chat:
        prompt = f"{wanted.opening}{text}{wanted.closing}"
    else:
        options = {} if wanted.thinking is None else {"enable_thinking": wanted.thinking}
        prompt = render_chat(tokenizer, [{"role": "user", "content": text}], **options)
        if wanted.thinking and not prompt.rstrip().endswith(THINK):
            prompt += THINK
    return f"{prompt}{wanted.before_prefix}{prefix}" if prefix else prompt
