"""The optimised HLO text of a compiled program, as data: computations of instructions with shapes and attributes."""

import math
import re
from dataclasses import dataclass

DTYPE_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8,
    "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
# Starts of asynchronous work that are instructions in their own right; others ("fusion-start") only wrap one.
_STARTS = re.compile(r"(copy|async|send|recv|all-\w+|all-to-all|reduce-scatter|collective-\w+|ragged-all-to-all)-start")


@dataclass(frozen=True)
class Array:
    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool  # False: the compiler keeps it in on-chip memory

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> float:
        return self.elements * DTYPE_BYTES[self.dtype]

    @property
    def hbm_bytes(self) -> float:
        return self.bytes if self.in_hbm else 0.0


@dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    outputs: tuple[Array, ...]
    operands: tuple[str, ...]
    literal: str  # the text between the parentheses: the number of a parameter, the value of a constant
    attributes: str  # the text behind them
    is_root: bool

    def attribute(self, pattern: str) -> str | None:
        """First group of the pattern's first match in the attributes."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else None

    def called(self, role: str) -> str | None:
        """The computation it calls as `role`, such as "body" or "calls"."""
        return self.attribute(rf"\b{role}=%?([\w.\-]+)")

    @property
    def op_name(self) -> str:
        """Where it comes from in the traced program, such as "jit(decode)/while/body/dot_general"."""
        return self.attribute(r'op_name="([^"]*)"') or ""

    @property
    def target(self) -> str | None:
        """Of a custom call."""
        return self.attribute(r'custom_call_target="([^"]*)"')


class Computation(dict[str, Instruction]):
    """Instructions by name, in order."""

    @property
    def root(self) -> Instruction:
        return next(i for i in self.values() if i.is_root)

    def operand(self, i: Instruction, n: int) -> Instruction | None:
        return self.get(i.operands[n]) if n < len(i.operands) else None


@dataclass
class Module:
    entry: str
    computations: dict[str, Computation]


def parse(text: str) -> Module:
    """Parse `compiled.as_text()`; "fusion-start" is read as the fusion itself. Raises ValueError for anything else."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.startswith(" "):
            if current is not None and (instruction := _parse_instruction(line)):
                current[instruction.name] = instruction
        elif match := _COMPUTATION.match(line):
            current = computations.setdefault(match[2], Computation())
            entry = match[2] if match[1] else entry
    if not entry:
        raise ValueError("this is not HLO text: it has no ENTRY computation")
    return Module(entry, computations)


def _parse_instruction(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if not match:
        return None
    text = re.sub(r"/\*index=\d+\*/", "", match[3])
    end_of_type = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    opcode = re.match(r" *([\w\-]+)\(", text[end_of_type:])
    if not opcode:
        return None
    start = end_of_type + opcode.end()
    end = _closing(text, start - 1)
    literal = text[start:end]
    operands = tuple(re.findall(r"%([\w.\-]+)", literal))
    name, outputs = opcode[1], arrays(text[:end_of_type])
    if name.endswith("-start") and not _STARTS.fullmatch(name):  # (operands, results, context)
        name, outputs = name.removesuffix("-start"), outputs[len(operands) : -1]
    return Instruction(match[2], name, outputs, operands, literal, text[end + 1 :], bool(match[1]))


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"unbalanced parentheses in HLO: {text[:80]}")


def arrays(text: str) -> tuple[Array, ...]:
    """Every array of an HLO type such as `(f32[2,3]{1,0:T(8,128)S(1)}, s32[])`, in order; S(n) is not HBM."""
    return tuple(
        Array(m[1], tuple(int(n) for n in m[2].split(",") if n), not re.search(r"S\([1-9]", m[3] or ""))
        for m in _ARRAY.finditer(text)
        if m[1] in DTYPE_BYTES
    )
