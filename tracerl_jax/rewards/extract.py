r"""The final answer of a completion: the last balanced \boxed{...}, else what a phrase such as "answer:" announces."""

import re
from collections.abc import Sequence

from tracerl_jax.errors import ConfigError

# Used, in this order, when a completion holds no \boxed{}; the last match of the first pattern that matches counts.
# Of several "answer is" on a line the last one; asterisks are Markdown's, and the answer may stand on the next line.
# Possessive quantifiers (`*+`) keep the time linear on long runs of asterisks and line breaks.
FINAL_ANSWER_PATTERNS = (
    r"####[ \t]*([^\n]+)",
    r"(?im)^.*\banswer\**+(?:\s+is\b|\s*[:=])[\s*:]*+([^\n]{1,1000}?)\**+(?:\.(?=\s|$)|$)",
)


def compile_patterns(patterns: Sequence[str]) -> tuple[re.Pattern, ...]:
    """Raises `ConfigError` for a pattern that is no regular expression, or has not exactly one group (the answer)."""
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise ConfigError(f"answer pattern {pattern!r} is no regular expression: {error}") from error
        if compiled[-1].groups != 1:
            raise ConfigError(f"answer pattern {pattern!r} needs exactly one group, which holds the answer")
    return tuple(compiled)


_DEFAULT = compile_patterns(FINAL_ANSWER_PATTERNS)


def extract_answer(text: str, patterns: Sequence[re.Pattern] = _DEFAULT) -> str | None:
    r"""Content of the last balanced \boxed{...}, else the last match of the first pattern that matches, else None."""
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    for pattern in patterns:
        matches = pattern.findall(text)
        if matches:
            return matches[-1].strip()
    return None


_BRACES = re.compile(r"(\\(?:boxed|fbox)\s*\{)|\\.|([{}])", re.DOTALL)  # escaped braces are text


def _last_boxed(text: str) -> str | None:
    opened: list[tuple[int, bool]] = []  # position behind an open brace, and whether it belongs to \boxed
    last = (-1, -1)
    for match in _BRACES.finditer(text):
        if match[1] or match[2] == "{":
            opened.append((match.end(), bool(match[1])))
        elif match[2] == "}" and opened:
            start, is_box = opened.pop()
            if is_box and start > last[0]:
                last = (start, match.start())
    return text[last[0] : last[1]] if last[0] >= 0 else None
