r"""Whether two LaTeX answers are the same mathematics: `math-verify` (sympy), with what it leaves out added.

Runs in worker processes (worker_pool.py): sympy can take for ever on a short text, a tower of powers say. Added to
math-verify:

- a one-variable inequality equals the interval or union it describes, either way round;
- points and intervals with the same brackets are compared element by element, and (3,1) is no empty interval;
- a unit at the end may be left out, but not replaced by another one;
- degrees are radians, `i` is the imaginary unit where no other letter occurs, \Pi is not \pi;
- decimals are exact, to 15 places: 0.333333 is not 1/3.
"""

import re

from tracerl_jax.rewards.answers import is_one_group, known_unit, split

REMEDY = "pip install --upgrade math-verify antlr4-python3-runtime==4.13.2"


class BackendError(Exception):
    """The LaTeX backend cannot be used; the message has the remedy."""


def load() -> None:
    """Imports the backend and tries it on known answers. Raises `BackendError`."""
    try:
        verdicts = {pair: same(*pair) for pair in _SELF_TEST}
    except Exception as error:  # whatever a half-working installation raises
        raise BackendError(f"math-verify does not work here ({error!r}); {REMEDY}") from error
    wrong = [" and ".join(pair) for pair, verdict in verdicts.items() if verdict is not _SELF_TEST[pair]]
    if wrong:
        raise BackendError(
            f"math-verify misjudges {'; '.join(wrong)}: its LaTeX parser cannot be used (another version of "
            f"antlr4-python3-runtime is usually the cause); {REMEDY}"
        )


_SELF_TEST = {  # (gold, prediction) -> verdict
    (r"\frac{1}{2}", r"\frac{2}{4}"): True,
    (r"2\sqrt{2}", r"\sqrt{8}"): True,
    (r"(x+1)^2", r"x^2+2x+1"): True,
    (r"x\le 3", r"(-\infty,3]"): True,
    (r"\sqrt{2}", "1.414214"): False,
}

_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<=\d)(?:\s*,\s*\\!\s*|\\,|\{,\})(?=\d{3}(?!\d))", ""),  # thousands
        (r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\!|\\?\$", ""),
        (r"(?<![A-Za-z\\])pi(?![A-Za-z])|π", r"\\pi "),
        (r"\*\*\s*(\d+|\w)", r"^{\1}"),
        (r"\^(\d{2,})", r"^{\1}"),
        (r",?\s*\\text\s*\{\s*(?:or|and)\s*\}|,?\s(?:or|and)\s", ","),
        (r"\\frac\s*\\pi(?![A-Za-z])\s*", r"\\frac{\\pi}"),
        (r"≤", r"\\le "),
        (r"≥", r"\\ge "),
        (r"∞", r"\\infty "),
        (r"×|·", r"\\cdot "),
        (r"√\s*(\d+|\w)", r"\\sqrt{\1}"),
        (r"\\varnothing(?![A-Za-z])|∅", r"\\emptyset"),
        (r"\\(l|g)eqslant(?![A-Za-z])", r"\\\1e"),
        (r"(\d+(?:\.\d+)?)\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ)", r"(\1\\pi/180)"),
        (r"\\Pi(?![A-Za-z])", r"\\Xi"),  # math-verify drops the case of symbols
        (r"^\s*([^\\=<>]+?)\s*\\in(?![A-Za-z])", ""),  # x \in [2, 5)
        (r"[.,;:\s]+$|^\s+", ""),
    )
)


def same(gold: str, prediction: str) -> bool | None:
    """Whether `prediction` is the answer `gold`; None when `gold` cannot be read as mathematics."""
    gold, prediction = _rewrite(gold), _rewrite(prediction)
    (brackets, parts), (other_brackets, other_parts) = _elements(gold), _elements(prediction)
    if parts and brackets == other_brackets and len(parts) == len(other_parts):
        verdicts = [same(*pair) for pair in zip(parts, other_parts, strict=True)]
        return None if None in verdicts else all(verdicts)
    (gold, gold_unit), (prediction, unit) = _split_unit(gold), _split_unit(prediction)
    golds, predictions = _parse(gold), _parse(prediction)
    if all(isinstance(value, str) for value in golds):
        return None
    if gold_unit and unit and gold_unit != unit:
        return False
    return _verify(golds, predictions) or _same_set(golds[0], predictions[:1]) or _same_complex(golds, predictions)


def _rewrite(text: str) -> str:
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text


def _elements(text: str) -> tuple[str, list[str]]:
    """("(]", ["a", "b"]) of "(a,b]" and the like; the list is empty for anything else."""
    is_list = text[:1] in ("(", "[") and text[-1:] in (")", "]") and is_one_group(text)
    elements = split(text[1:-1]) if is_list else []
    return text[:1] + text[-1:], elements if len(elements) > 1 else []


_LAST_WORDS = re.compile(
    r"(.*\S)\s*(?:\\(?:text\w*|mathrm|mbox)\s*\{([A-Za-z ]+)\}|\s([A-Za-z]{2,}))\s*(\^\s*(?:\{\s*\d\s*\}|\d))?",
    re.DOTALL,
)


def _split_unit(text: str) -> tuple[str, str]:
    """(what is measured, unit); the unit is "" where there is none that answers.py knows."""
    match = _LAST_WORDS.fullmatch(text)
    unit = match and known_unit(match[2] or match[3])
    return (match[1], unit + re.sub(r"[^\d]", "", match[4] or "")) if unit else (text, "")


def _parse(text: str) -> list:
    """Sympy objects that the text may mean, most likely first; math-verify puts the text itself last."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    # Its units would take the c from 5c. Its plain expressions would find the number in any text.
    latex = LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=False, malformed_operators=True, nits=True)
    )
    # Its timeout would use an alarm, and count wall time.
    return parse(f"${text}$", [latex], parsing_timeout=None, raise_on_error=False)


def _verify(golds: list, predictions: list) -> bool:
    from math_verify import verify

    return verify(
        golds, predictions, float_rounding=15, numeric_precision=30, timeout_seconds=None, raise_on_error=False
    )


def _same_set(gold: object, predictions: list) -> bool:
    """Whether an inequality and an interval (or two of a kind) describe the same set of real numbers."""
    sets = [_real_set(value) for value in (gold, *predictions)]
    return len(sets) == 2 and None not in sets and sets[0] == sets[1]


def _real_set(value: object):
    """The real numbers that a set, or inequalities of one letter, describe; None for anything else, such as a point."""
    import sympy

    if isinstance(value, sympy.Set):
        if value.args and all(isinstance(item, sympy.And | sympy.core.relational.Rel) for item in value.args):
            parts = [_real_set(item) for item in value.args]  # x < 1 or x > 2
            return None if None in parts else sympy.Union(*parts)
        return value.doit()  # an intersection, say
    if isinstance(value, sympy.And | sympy.Or | sympy.core.relational.Rel) and not isinstance(value, sympy.Eq):
        letters = value.free_symbols
        if len(letters) == 1:
            try:
                return value.subs(letters.pop(), sympy.Symbol("x", real=True)).as_set()
            except (NotImplementedError, TypeError, ValueError, AttributeError):
                return None
    return None


def _same_complex(golds: list, predictions: list) -> bool:
    """Whether the two agree with `i` as the imaginary unit, when it is their only letter."""
    import sympy

    values = [[value for value in side if isinstance(value, sympy.Basic)] for side in (golds, predictions)]
    letters = {symbol for side in values for value in side for symbol in value.free_symbols}
    if {symbol.name for symbol in letters} != {"i"}:
        return False
    return _verify(*([value.subs({symbol: sympy.I for symbol in letters}) for value in side] for side in values))
