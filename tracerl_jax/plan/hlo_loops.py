"""How often a loop of a compiled program runs, where its counter can be followed.

    condition    compare(state[k], limit)
    body         tuple(.., add(state[k], step), ..)        start, limit and step: constants
    start        tuple(.., start, ..)

The compilers unroll loops (so that a step is not always 1), hoist constants into the state of outer loops and fuse the
arithmetic, so start, limit and step are looked for through all of that.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tracerl_jax.plan.hlo import Computation, Instruction, Module

_PASS = frozenset("bitcast convert copy copy-start copy-done opt-barrier reshape".split())
_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b, "subtract": lambda a, b: a - b, "multiply": lambda a, b: a * b,
    "maximum": max, "minimum": min,
}  # fmt: skip
_MIRRORED = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE", "NE": "NE"}

# (computation, part of its only parameter) -> value
State = Mapping[tuple[str, int], int]


@dataclass
class LoopLengths:
    """Loop lengths of one module."""

    module: Module
    callers: dict[str, list[tuple[str, Instruction]]] = field(init=False)

    def __post_init__(self):
        self.callers = {}
        for name, scope in self.module.computations.items():
            for i in scope.values():
                roles = {"while": ("body", "condition"), "fusion": ("calls",), "call": ("to_apply",)}
                for role in roles.get(i.opcode, ()):
                    self.callers.setdefault(i.called(role), []).append((name, i))

    def length(self, loop: Instruction, scope: str) -> float | None:
        """How often the body of the while instruction `loop` of computation `scope` runs; None if that depends on
        data."""
        if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"\}'):
            return float(known)
        body, condition = loop.called("body"), loop.called("condition")
        where, compare = self._inside(condition, self._of(condition).root)
        direction = compare.attribute(r"direction=(\w+)") if compare.opcode == "compare" else None
        if direction not in _MIRRORED:
            return None
        counter, limit = compare.operands
        part = self._part(where, counter, condition)
        if part is None:
            counter, limit, direction = limit, counter, _MIRRORED[direction]
            part = self._part(where, counter, condition)
        if part is None:
            return None
        end, start = self.value(where, limit), self.value(scope, loop.operands[0], part)
        if end is None or start is None:
            return None
        states = [start]
        for _ in range(2):
            states.append(self.value(body, self._of(body).root.name, part, {(body, part): states[-1]}))
            if states[-1] is None:
                return None
        step = states[1] - start
        return _count(direction, end - start, step) if states[2] - states[1] == step else None

    def value(self, scope: str, name: str, part: int | None = None, known: State | None = None) -> int | None:
        """The integer that instruction `name` of computation `scope` always has, or `part` of it if it is a tuple.

        `known` parts of a loop's state are taken as given; others count only if the loop hands them on as they are.
        """
        i, known = self._of(scope)[name], known or {}
        if i.opcode == "constant":
            return int(i.literal) if i.literal.lstrip("-").isdigit() else None
        if i.opcode == "get-tuple-element":
            return self.value(scope, i.operands[0], _index(i), known)
        if i.opcode == "tuple" and part is not None:
            return self.value(scope, i.operands[part], None, known)
        if i.opcode in _PASS:
            return self.value(scope, i.operands[0], None if i.opcode == "copy-start" else part, known)
        if i.opcode in ("fusion", "call"):
            called = i.called("calls") or i.called("to_apply")
            return self.value(called, self._of(called).root.name, part, known)
        if i.opcode == "while" and part is not None:
            return self.value(scope, i.operands[0], part, known) if self._is_constant(i, part) else None
        if i.opcode == "parameter":
            return known[scope, part] if (scope, part) in known else self._argument(scope, i, part, known)
        if i.opcode in _ARITHMETIC:
            a, b = (self.value(scope, operand, None, known) for operand in i.operands)
            return None if a is None or b is None else _ARITHMETIC[i.opcode](a, b)
        return None

    def _argument(self, scope: str, parameter: Instruction, part: int | None, known: State) -> int | None:
        """The value of a parameter, from the only place that calls its computation."""
        if len(self.callers.get(scope, ())) != 1:
            return None
        where, caller = self.callers[scope][0]
        if caller.opcode != "while":
            return self.value(where, caller.operands[int(parameter.literal)], part, known)
        is_constant = part is not None and self._is_constant(caller, part)
        return self.value(where, caller.operands[0], part, known) if is_constant else None

    def _is_constant(self, loop: Instruction, part: int) -> bool:
        """The body returns this part of the state as it got it."""
        body = self._of(loop.called("body"))
        source = body.root
        if source.opcode == "tuple":
            source = body[source.operands[part]]
            while source.opcode in _PASS:
                source = body[source.operands[0]]
        return (
            source.opcode == "get-tuple-element"
            and body[source.operands[0]].opcode == "parameter"
            and _index(source) == part
        )

    def _part(self, scope: str, name: str, condition: str) -> int | None:
        """Which part of the loop's state this operand of its condition is, if it is one that changes."""
        i = self._of(scope)[name]
        while i.opcode in _PASS:
            i = self._of(scope)[i.operands[0]]
        if i.opcode == "parameter" and scope != condition:  # of a fusion
            _, caller = self.callers[scope][0]
            return self._part(condition, caller.operands[int(i.literal)], condition)
        if i.opcode != "get-tuple-element" or scope != condition:
            return None
        _, loop = self.callers[condition][0]
        return None if self._is_constant(loop, _index(i)) else _index(i)

    def _inside(self, scope: str, i: Instruction) -> tuple[str, Instruction]:
        """(computation, root) of the innermost fusion that makes `i`."""
        while i.opcode == "fusion":
            scope = i.called("calls")
            i = self._of(scope).root
        return scope, i

    def _of(self, name: str) -> Computation:
        return self.module.computations[name]


def _index(i: Instruction) -> int:
    return int(i.attribute(r"\bindex=(\d+)"))


def _count(direction: str, distance: int, step: int) -> float | None:
    """Steps until `start + n * step` no longer compares so with `start + distance`."""
    if step == 0 or (direction in ("LT", "LE") and step < 0) or (direction in ("GT", "GE") and step > 0):
        return None
    if direction == "NE" and distance % step:
        return None
    whole = distance // step + 1 if direction in ("LE", "GE") else -(-distance // step)
    return float(max(0, whole))
