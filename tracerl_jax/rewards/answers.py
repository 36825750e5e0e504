r"""Comparing two answers by rules, exactly and without evaluating anything. What the rules leave open is for algebra.

What `compare` decides, in this order, after the wrapping is removed (dollar signs, \left \right, spacing and text
commands, \boxed, one leading "x =", a final full stop):

1.  Equal text, ignoring spaces (words of letters also ignore case): equal.
2.  Two numbers: equal when their values are, as exact rationals. A number is an integer or decimal (thousands in groups
    of three: 1,234 or 1 234 or 1{,}234; 0.\overline{3} repeats), a fraction (\frac{a}{b}, \frac12, a/b), a mixed
    number, scientific notation, or an integer to a base (101_2), with a sign, and may be followed by `%` or a unit.
    50% equals 0.5, and 50 when only one side has the sign. A missing unit is accepted, a different one is not; units of
    one kind (`_UNITS`) are converted.
3.  Two lists: (a, b], [a, b] and tuples element by element, with equal brackets; \{a, b\} and bare lists (separated by
    commas, "and", "or") as sets.
4.  Anything else: open. Nothing is calculated, so \sqrt{8} and 2\sqrt{2}, or x+1 and 1+x, are left to algebra.py.

Answers of more than 1,000 characters are not read. Work is linear in the length of an answer.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

MAX_ANSWER = 1000  # characters
MAX_ELEMENTS = 64
MAX_NESTING = 5


def readable(answer: str) -> bool:
    """Whether there is an answer, and not too long a one."""
    return bool(answer.strip()) and len(answer) <= MAX_ANSWER


def compare(prediction: str, gold: str) -> bool | None:
    """Whether the two answers are the same by the rules above; None where the rules do not tell.

    A `prediction` that is not `readable` differs from every answer; `gold` has to be.
    """
    if not readable(prediction):
        return False
    return _same(_clean(prediction), _clean(gold), MAX_NESTING)


_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"[−–]", "-"),
        (r"(?<=\d)\s*,\s*\\!\s*(?=\d{3})", ","),
        (r"\\(?:left|right|displaystyle|[bB]igg?[lr]?)(?![A-Za-z])|\\!|\\[()\[\]]|\\?\$", ""),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\(ge|le|ne)q(?:slant)?(?![A-Za-z])", r"\\\1"),
        (r"\{,\}", ","),
        (r"\\(?:text(?:bf|it|rm|normal)?|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 "),
        (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degree|°", " degrees "),
        (r"\\%", "%"),
        (r"(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|~", " "),
        (r",\s+", ";"),  # "1, 234" is a list, "1,234" is a number
        (r"\s*([-+*/=^_(){}\[\],;:<>|!&%])\s*", r"\1"),
        (r"\+?(?:\\infty(?![A-Za-z])|\b(?:infinity|inf)\b)", r"\\infty"),
        (r"\s+", " "),
        (r"(?:\\\\|\.|\s)+$|^\s+", ""),
        (r"^\\(?:boxed|fbox)\{(.*)\}$", r"\1"),
    )
)
_ASSIGNMENT = re.compile(r"[A-Za-z](?:_\w)?(?:\([A-Za-z]\))?=([^=]+)")


def _clean(text: str) -> str:
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text


def _same(left: str, right: str, nesting: int) -> bool | None:
    left, right = _unwrap(left), _unwrap(right)
    if _canonical(left) == _canonical(right):
        return True
    number_left, number_right = _parse_number(left), _parse_number(right)
    if number_left and number_right:
        return _same_number(number_left, number_right)
    list_left, list_right = _parse_list(left), _parse_list(right)
    return _same_list(list_left, list_right, nesting - 1) if list_left and list_right and nesting else None


def _unwrap(text: str) -> str:
    """Drops "x =" and brackets around a single value: (5), {5}."""
    assignment = _ASSIGNMENT.fullmatch(text)
    text = assignment[1] if assignment else text
    for _ in range(MAX_NESTING):
        if text[:1] + text[-1:] not in ("()", "{}") or not is_one_group(text) or len(split(text[1:-1])) > 1:
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
    (?: (?P<digits>\d+)_\{{?(?P<base>\d{{1,2}})\}}?
      | (?P<fixed>\d*\.\d*)\\(?:overline|bar)\{{(?P<period>\d+)\}}
      | (?P<whole>\d+)?\ ?\\frac\ ?(?P<top>{_ARGUMENT})\ ?(?P<bottom>{_ARGUMENT})
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
        if match["base"]:
            value = Fraction(int(match["digits"], int(match["base"])))
        elif match["period"]:
            value = _repeating(match["fixed"], match["period"])
        elif match["decimal"]:
            exponent = match["exponent"] or (match["power"] or "0").strip("{}")
            value = _fraction(match["decimal"]) * Fraction(10) ** int(exponent)
        else:
            whole = match["whole"] or match["mixed"] or "0"
            value = int(whole) + _fraction(match["top"] or match["over"]) / _fraction(match["bottom"] or match["under"])
    except (ZeroDivisionError, ValueError):  # 1/0, and digits or bases that do not exist
        return None
    return _Number(-value if match["sign"] == "-" else value, bool(match["percent"]), _singular(match["unit"] or ""))


def _singular(unit: str) -> str:
    return re.sub(r"s(?![A-Za-z])", "", unit.lower())


def known_unit(words: str) -> str:
    """These words in the singular if they name a unit of length, area, time ..., else ""."""
    singular = " ".join(_singular(words).split())
    return singular if all(word in _UNITS or word in _UNIT_WORDS for word in singular.split()) else ""


def _fraction(text: str) -> Fraction:
    return Fraction(re.sub(r"[{}, ]", "", text))


def _repeating(fixed: str, period: str) -> Fraction:
    """0.1666... of fixed "0.1" and period "6"."""
    whole, _, decimals = fixed.partition(".")
    shift = 10 ** len(decimals)
    return Fraction(int((whole + decimals) or "0"), shift) + Fraction(int(period), shift * (10 ** len(period) - 1))


def _is_unit(text: str) -> bool:
    words = re.findall("[A-Za-z]+", text)
    return all((len(word) > 1 or word in _ONE_LETTER_UNITS) and word not in _NOT_UNITS for word in words)


def _same_number(left: _Number, right: _Number) -> bool:
    if left.unit and right.unit and left.unit != right.unit:
        measures = _UNITS.get(left.unit), _UNITS.get(right.unit)
        if None in measures or measures[0][0] != measures[1][0]:
            return False
        return left.value * measures[0][1] == right.value * measures[1][1]
    if left.percent == right.percent:
        return left.value == right.value
    if left.unit or right.unit:
        return False
    percent, plain = (left, right) if left.percent else (right, left)
    return plain.value in (percent.value, percent.value / 100)


# Names of units in the singular, by kind, and how many of the first of their kind they are.
_UNITS = {
    name: (kind, Fraction(size))
    for kind, sizes in {
        "length": {
            "m meter metre": 1, "mm millimeter millimetre": "1/1000", "cm centimeter centimetre": "1/100",
            "km kilometer kilometre": 1000, "in inch inche": "0.0254", "ft foot feet": "0.3048", "yd yard": "0.9144",
            "mi mile": "1609.344",
        },
        "time": {"s sec second": 1, "min minute": 60, "h hr hour": 3600, "day": 86400, "week": 604800},
        "mass": {"g gram": 1, "mg milligram": "1/1000", "kg kilogram": 1000},
        "volume": {"l liter litre": 1, "ml milliliter millilitre": "1/1000"},
        "money": {"dollar": 1, "cent": "1/100"},
    }.items()
    for names, size in sizes.items()
    for name in names.split()
}  # fmt: skip
_UNIT_WORDS = frozenset("unit square sq cubic cu per mph kph radian rad".split())


# ---- lists ----


@dataclass(frozen=True)
class _List:
    brackets: str  # "(]" and the like; "" for sets and bare lists, whose order does not matter
    elements: list[str]


def _parse_list(text: str) -> _List | None:
    brackets = ""
    if text.startswith("\\{") and text.endswith("\\}"):
        inner = text[2:-2]
    elif text[:1] in ("(", "[") and text[-1:] in (")", "]") and is_one_group(text):
        brackets, inner = text[0] + text[-1], text[1:-1]
    else:
        inner = text
    elements = split(inner)
    if len(elements) > MAX_ELEMENTS or (inner is text and len(elements) < 2):
        return None
    return _List(brackets, elements)


def _same_list(left: _List, right: _List, nesting: int) -> bool | None:
    if left.brackets != right.brackets:
        return False
    verdicts = [[_same(a, b, nesting) for b in right.elements] for a in left.elements]
    if not left.brackets:
        return _all([_any(row) for row in verdicts] + [_any(column) for column in zip(*verdicts, strict=True)])
    if len(left.elements) != len(right.elements):
        return None if any("\\pm" in text for text in left.elements + right.elements) else False
    return _all([verdicts[i][i] for i in range(len(verdicts))])


def _any(verdicts: Sequence[bool | None]) -> bool | None:
    return True if True in verdicts else None if None in verdicts else False


def _all(verdicts: Sequence[bool | None]) -> bool | None:
    return False if False in verdicts else None if None in verdicts else True


_SEPARATOR = re.compile(r"[,;]| (?:and|or) |[({\[]|[)}\]]")


def split(text: str) -> list[str]:
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


def is_one_group(text: str) -> bool:
    """Whether the first bracket is closed by the last character."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return position == len(text) - 1
    return False
