r"""Answers of mathematics problems: finding them in a completion and comparing them, exactly and without evaluation.

What `equivalent` decides, in this order, after the wrapping is removed (dollar signs, \left \right, spacing and text
commands, \boxed, one leading "x =", a final full stop):

1.  Equal text, ignoring spaces (words of letters also ignore case): equal.
2.  Two numbers: equal when their values are, as exact rationals. A number is an integer or decimal (thousands in groups
    of three: 1,234 or 1 234 or 1{,}234), a fraction (\frac{a}{b}, \frac12, a/b), a mixed number, or scientific
    notation, with a sign, and may be followed by `%` or a unit. 50% equals 0.5, and 50 when only one side has the sign.
    A missing unit is accepted, a different unit is not; units are not converted.
3.  Two lists: (a, b], [a, b] and tuples element by element, with equal brackets; \{a, b\} and bare lists (separated by
    commas, "and", "or") as sets.
4.  Anything else: not equal. Nothing is calculated or simplified, so \sqrt{8} is not 2\sqrt{2} here and x+1 not 1+x.

Answers of more than 1,000 characters are not read. Work is linear in the length of a completion.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from tracerl_jax.rewards.registry import register_reward

MAX_ANSWER = 1000  # characters
MAX_ELEMENTS = 64
MAX_NESTING = 5

# Used, in this order, when a completion holds no \boxed{}; the last match counts.
FINAL_ANSWER_PATTERNS = (
    re.compile(r"####[ \t]*([^\n]+)"),
    re.compile(r"(?i)\banswer(?: is|:)\**[ \t]*([^\n]+?)(?:\.(?=\s|$)|\n|$)"),
)


@register_reward("boxed_math")
def boxed_math(
    prompts: Sequence[str], completions: Sequence[str], *, ground_truth_answer: Sequence[object] = (), **columns
) -> list[float | None]:
    """1 when the final answer is `equivalent` to the reference answer, else 0; None without a usable reference."""
    golds = ground_truth_answer or [None] * len(completions)
    return [_reward(text, gold) for text, gold in zip(completions, golds, strict=True)]


def _reward(completion: str, gold: object) -> float | None:
    if isinstance(gold, bool) or not isinstance(gold, str | int | float):
        return None
    verdict = equivalent(extract_answer(completion) or "", str(gold))
    return None if verdict is None else float(verdict)


def extract_answer(text: str, patterns: Sequence[re.Pattern] = FINAL_ANSWER_PATTERNS) -> str | None:
    r"""Content of the last balanced \boxed{...}, else the last match of the first pattern that matches, else None."""
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    for pattern in patterns:
        matches = pattern.findall(text)
        if matches:
            return matches[-1].strip()
    return None


_BRACES = re.compile(r"(\\f?boxed\s*\{)|\\.|([{}])", re.DOTALL)  # escaped braces are text


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


def equivalent(prediction: str, gold: str) -> bool | None:
    """Whether the two answers are the same by the rules above; None when `gold` is empty or too long to read."""
    if not gold.strip() or len(gold) > MAX_ANSWER:
        return None
    if len(prediction) > MAX_ANSWER:
        return False
    return _same(_clean(prediction), _clean(gold), MAX_NESTING)


_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"[−–]", "-"),
        (r"\\(?:left|right|displaystyle|[bB]igg?[lr]?)(?![A-Za-z])|\\!|\\[()\[\]]|\\?\$", ""),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\(ge|le|ne)q(?:slant)?(?![A-Za-z])", r"\\\1"),
        (r"\{,\}", ","),
        (r"\\(?:text(?:bf|it|rm)?|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 "),
        (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degree|°", " degrees "),
        (r"\\%", "%"),
        (r"(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|~", " "),
        (r",\s+", ";"),  # "1, 234" is a list, "1,234" is a number
        (r"\s*([-+*/=^_(){}\[\],;:<>|!&%])\s*", r"\1"),
        (r"\+?(?:\\infty(?![A-Za-z])|\b(?:infinity|inf)\b)", r"\\infty"),
        (r"\s+", " "),
        (r"(?:\\\\|\.|\s)+$|^\s+", ""),
        (r"^\\f?boxed\{(.*)\}$", r"\1"),
    )
)
_ASSIGNMENT = re.compile(r"[A-Za-z](?:_\w)?(?:\([A-Za-z]\))?=([^=]+)")


def _clean(text: str) -> str:
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text


def _same(left: str, right: str, nesting: int) -> bool:
    left, right = _unwrap(left), _unwrap(right)
    if _canonical(left) == _canonical(right):
        return True
    number_left, number_right = _parse_number(left), _parse_number(right)
    if number_left and number_right:
        return _same_number(number_left, number_right)
    list_left, list_right = _parse_list(left), _parse_list(right)
    return bool(list_left and list_right and nesting and _same_list(list_left, list_right, nesting - 1))


def _unwrap(text: str) -> str:
    """Drops "x =" and brackets around a single value: (5), {5}."""
    assignment = _ASSIGNMENT.fullmatch(text)
    text = assignment[1] if assignment else text
    for _ in range(MAX_NESTING):
        if text[:1] + text[-1:] not in ("()", "{}") or not _is_one_group(text) or len(_split(text[1:-1])) > 1:
            break
        text = text[1:-1]
    return text


def _canonical(text: str) -> str:
    r"""Text for comparison: as TeX reads it, so \frac{1}{2} is \frac12 and x^{2} is x^2."""
    if re.fullmatch(r"[A-Za-z][A-Za-z ]+", text):
        text = text.casefold()
    text = re.sub(r"(?<!\\)\{([A-Za-z0-9])\}", r"\1", text.replace(";", ","))
    return text.replace(" ", "")


# ---- numbers ----

_UNSIGNED = r"(?:(?:\d{1,3}(?:[,\ ]\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+)"
_ARGUMENT = rf"(?:\{{[+-]?{_UNSIGNED}\}}|\d)"
_NUMBER = re.compile(
    rf"""(?P<sign>[+-]?)
    (?: (?P<whole>\d+)?\ ?\\frac\ ?(?P<top>{_ARGUMENT})\ ?(?P<bottom>{_ARGUMENT})
      | (?:(?P<mixed>\d+)\ )?(?P<over>{_UNSIGNED}|\{{{_UNSIGNED}\}})/(?P<under>{_UNSIGNED}|\{{{_UNSIGNED}\}})
      | (?P<decimal>{_UNSIGNED})
        (?:[eE](?P<exponent>[+-]?\d{{1,3}})|\ ?(?:\\times|\\cdot|\*)\ ?10\^(?P<power>\{{-?\d{{1,3}}\}}|\d))?
    )
    (?:\ ?(?P<percent>%|percent)|\ (?P<unit>[A-Za-z]+(?:[\ /][A-Za-z]+)*(?:\^\{{?\d\}}?)?))?""",
    re.VERBOSE,
)
_ONE_LETTER_UNITS = frozenset("mgshlL")
_NOT_UNITS = frozenset(("or", "and", "not", "maybe", "to"))


@dataclass(frozen=True)
class _Number:
    value: Fraction
    percent: bool
    unit: str


def _parse_number(text: str) -> _Number | None:
    match = _NUMBER.fullmatch(text)
    if match is None or (match["unit"] and not _is_unit(match["unit"])):
        return None
    try:
        if match["decimal"]:
            exponent = match["exponent"] or (match["power"] or "0").strip("{}")
            value = _fraction(match["decimal"]) * Fraction(10) ** int(exponent)
        else:
            whole = match["whole"] or match["mixed"] or "0"
            value = int(whole) + _fraction(match["top"] or match["over"]) / _fraction(match["bottom"] or match["under"])
    except ZeroDivisionError:
        return None
    unit = re.sub(r"s(?![A-Za-z])", "", (match["unit"] or "").lower())  # plural
    return _Number(-value if match["sign"] == "-" else value, bool(match["percent"]), unit)


def _fraction(text: str) -> Fraction:
    return Fraction(re.sub(r"[{}, ]", "", text))


def _is_unit(text: str) -> bool:
    words = re.findall("[A-Za-z]+", text)
    return all((len(word) > 1 or word in _ONE_LETTER_UNITS) and word not in _NOT_UNITS for word in words)


def _same_number(left: _Number, right: _Number) -> bool:
    if left.unit and right.unit and left.unit != right.unit:
        return False
    if left.percent == right.percent:
        return left.value == right.value
    percent, plain = (left, right) if left.percent else (right, left)
    return plain.value in (percent.value, percent.value / 100)


# ---- lists ----


@dataclass(frozen=True)
class _List:
    brackets: str  # "(]" and the like; "" for sets and bare lists, whose order does not matter
    elements: list[str]


def _parse_list(text: str) -> _List | None:
    brackets = ""
    if text.startswith("\\{") and text.endswith("\\}"):
        inner = text[2:-2]
    elif text[:1] in ("(", "[") and text[-1:] in (")", "]") and _is_one_group(text):
        brackets, inner = text[0] + text[-1], text[1:-1]
    else:
        inner = text
    elements = _split(inner)
    if len(elements) > MAX_ELEMENTS or (inner is text and len(elements) < 2):
        return None
    return _List(brackets, elements)


def _same_list(left: _List, right: _List, nesting: int) -> bool:
    if left.brackets != right.brackets:
        return False
    if left.brackets:
        pairs = zip(left.elements, right.elements, strict=False)
        return len(left.elements) == len(right.elements) and all(_same(a, b, nesting) for a, b in pairs)
    return all(any(_same(a, b, nesting) for b in right.elements) for a in left.elements) and all(
        any(_same(a, b, nesting) for a in left.elements) for b in right.elements
    )


_SEPARATOR = re.compile(r"[,;]| (?:and|or) |[({\[]|[)}\]]")


def _split(text: str) -> list[str]:
    """The parts between separators outside all brackets."""
    parts, start, depth = [], 0, 0
    for match in _SEPARATOR.finditer(text):
        if match[0] in "({[":
            depth += 1
        elif match[0] in ")}]":
            depth -= 1
        elif depth == 0:
            parts.append(text[start : match.start()].strip())
            start = match.end()
    return [*parts, text[start:].strip()]


def _is_one_group(text: str) -> bool:
    """Whether the first bracket is closed by the last character."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return position == len(text) - 1
    return False
