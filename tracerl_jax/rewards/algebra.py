r"""Whether two LaTeX answers are the same mathematics: `math-verify` (sympy), with what it leaves out added.

Runs in worker processes (worker_pool.py): sympy can take for ever on a short text, a tower of powers say. Added to math-verify:

- a one-variable inequality equals the interval or union it describes, either way round;
- degrees are radians, `i` is the imaginary unit where no other letter occurs, \Pi is not \pi;
- decimals are exact: 0.333333 is not 1/3.
"""

import re

REMEDY = "pip install --upgrade 'math-verify[antlr4_13_2]'"


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
        (r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\!|\$", ""),
        (r"\\varnothing(?![A-Za-z])", r"\\emptyset"),
        (r"\\(l|g)eqslant(?![A-Za-z])", r"\\\1e"),
        (r"(\d+(?:\.\d+)?)\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ)", r"(\1\\pi/180)"),
        (r"\\Pi(?![A-Za-z])", r"\\Xi"),  # math-verify drops the case of symbols
        (r"^\s*([^\\=<>]+?)\s*\\in(?![A-Za-z])", ""),  # x \in [2, 5)
    )
)


def same(gold: str, prediction: str) -> bool | None:
    """Whether `prediction` is the answer `gold`; None when `gold` cannot be read as mathematics."""
    gold, prediction = _rewrite(gold), _rewrite(prediction)
    golds, predictions = _parse(gold), _parse(prediction)
    if all(isinstance(value, str) for value in golds):
        return None
    return _verify(golds, predictions) or _same_set(golds[0], predictions[:1]) or _same_complex(golds, predictions)


def _rewrite(text: str) -> str:
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text.strip()


def _parse(text: str) -> list:
    """Sympy objects that the text may mean, most likely first; math-verify puts the text itself last."""
    from math_verify import parse

    # None: its timeout uses an alarm, and counts wall time
    return parse(f"${text}$", parsing_timeout=None, raise_on_error=False)


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
    import sympy

    if isinstance(value, sympy.Tuple) and len(value) == 2 and all(item.is_number for item in value):
        return sympy.Interval.open(*value) if value[0].is_extended_real and value[1].is_extended_real else None
    if isinstance(value, sympy.Set):
        return value.doit()  # an intersection, say
    if isinstance(value, sympy.And | sympy.Or | sympy.core.relational.Relational) and not isinstance(value, sympy.Eq):
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
