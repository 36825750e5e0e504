"""What a compiled program costs on one chip: FLOPs, HBM bytes and collective bytes, loop bodies counted as often as
they run. (XLA's own cost analysis counts the body of a loop once.)

    ENTRY            1 x
      while (36 x)       body: 36 x
        while (149 x)        body: 36 * 149 x
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tracerl_jax.plan.hlo import Array, Computation, Instruction, Module
from tracerl_jax.plan.hlo_loops import LoopLengths

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
SLICES = "slices"  # what `collective_bytes` has for mesh axes where a program sends to other TPU slices
# Custom calls that run a kernel of ours; all others are library calls or notes to the compiler.
KERNEL_TARGETS = ("tpu_custom_call", "__gpu$xla.gpu.triton", "mosaic_gpu_v2")
# These name or rearrange values without touching memory.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id add-dependency opt-barrier "
    "domain".split()
)
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclass
class Cost:
    """Of one execution on one chip. `collective_bytes`: what the chip sends, by (kind, mesh axes or SLICES)."""

    flops: float = 0.0  # of matrix units
    hbm_bytes: float = 0.0
    collective_bytes: Counter = field(default_factory=Counter)
    collective_calls: Counter = field(default_factory=Counter)  # of the same keys
    kernels: Counter = field(default_factory=Counter)  # calls of hand-written kernels, by name
    unknown_loops: set[str] = field(default_factory=set)  # counted once, for want of anything better
    unknown_kernels: set[str] = field(default_factory=set)  # their FLOPs are missing

    def add(self, other: "Cost", times: float = 1.0) -> None:
        self.flops += times * other.flops
        self.hbm_bytes += times * other.hbm_bytes
        for name in ("collective_bytes", "collective_calls", "kernels"):
            mine = getattr(self, name)
            for key, value in getattr(other, name).items():
                mine[key] += times * value
        self.unknown_loops |= other.unknown_loops
        self.unknown_kernels |= other.unknown_kernels


# What a call of a hand-written kernel costs: (instruction, its operands) -> (FLOPs, HBM bytes), or None if unknown.
KernelCost = Callable[[Instruction, Sequence[Array]], tuple[float, float] | None]


def program_cost(
    module: Module,
    mesh_shape: Mapping[str, int],
    *,
    loops: Mapping[str, float] | None = None,
    kernel_cost: KernelCost = lambda instruction, operands: None,
) -> Cost:
    """Cost of the entry computation.

    mesh_shape: axis name -> size, in the order of the devices the program was compiled for, slowest first; of several
    TPU slices the part of the mesh that one of them has.
    loops: how often loops whose length depends on data run, by the end of their `op_name` ("jit(decode)/while").
    """
    return _Walk(module, mesh_shape, loops or {}, kernel_cost, LoopLengths(module)).computation(module.entry)


@dataclass
class _Walk:
    module: Module
    mesh_shape: Mapping[str, int]
    loops: Mapping[str, float]
    kernel_cost: KernelCost
    lengths: LoopLengths
    known: dict[str, Cost] = field(default_factory=dict)

    def computation(self, name: str) -> Cost:
        if name not in self.known:
            scope = self.module.computations[name]
            total = Cost()
            for i in scope.values():
                total.add(*self.instruction(i, name))
            self.known[name] = total
        return self.known[name]

    def instruction(self, i: Instruction, where: str) -> tuple[Cost, float]:
        """(cost, how often) of an instruction of the computation `where`."""
        scope = self.module.computations[where]
        if i.opcode == "while":
            return self.loop(i, where)
        if i.opcode == "conditional":
            branches = re.findall(r"%([\w.\-]+)", i.attribute(r"branch_computations=\{([^}]*)\}") or "")
            branches = branches or [i.called("true_computation"), i.called("false_computation")]
            return max(map(self.computation, branches), key=lambda c: (c.flops, c.hbm_bytes)), 1.0
        if i.opcode in ("call", "async-start"):
            return self.computation(i.called("to_apply") or i.called("calls")), 1.0
        operands = operand_arrays(i, scope)
        if i.opcode == "custom-call" and i.target in KERNEL_TARGETS:
            return self.kernel(i, operands), 1.0
        result = Cost(self.flops(i, operands), self.hbm_bytes(i, scope, operands))
        kind = i.opcode.removesuffix("-start")
        sent, key = 0.0, ("", "")
        if kind in COLLECTIVES:
            sent, axes = sent_bytes(i, kind, operands, self.mesh_shape)
            key = kind, axes
        elif kind == "send":
            sent, kind = sent_to_slices(i, operands)
            key = kind, SLICES
        if sent:
            result.collective_bytes[key] += sent
            result.collective_calls[key] += 1
        return result, 1.0

    def loop(self, i: Instruction, where: str) -> tuple[Cost, float]:
        times = self.lengths.length(i, where)
        if times is None:
            times = next((n for end, n in self.loops.items() if i.op_name.endswith(end)), None)
        once = Cost(unknown_loops=set() if times is not None else {i.op_name or i.name})
        once.add(self.computation(i.called("body")))
        once.add(self.computation(i.called("condition")))
        return once, 1.0 if times is None else times

    def kernel(self, i: Instruction, operands: list[Array]) -> Cost:
        name, known = kernel_name(i), self.kernel_cost(i, operands) or own_estimate(i, operands)
        flops, hbm_bytes = known or (0.0, sum(a.hbm_bytes for a in (*operands, *i.outputs)))
        return Cost(flops, hbm_bytes, kernels=Counter([name]), unknown_kernels=set() if known else {name})

    def flops(self, i: Instruction, operands: Sequence[Array]) -> float:
        if i.opcode == "dot":
            return _dot_flops(i, operands, i.attribute(r"lhs_contracting_dims=\{([\d,]*)\}"))
        if i.opcode == "convolution":
            return _convolution_flops(i, operands)
        if i.opcode == "custom-call" and "gemm" in (i.target or ""):
            return _dot_flops(i, operands, i.attribute(r'"lhs_contracting_dimensions":\[([^\]]*)\]'))
        if i.opcode != "fusion":
            return 0.0
        inner = self.module.computations[i.called("calls")]
        return sum(self.flops(j, operand_arrays(j, inner)) for j in inner.values())

    def hbm_bytes(self, i: Instruction, scope: Computation, operands: Sequence[Array]) -> float:
        if i.opcode in _FREE or i.opcode.endswith("-done") or i.target in ("AllocateBuffer", "Sharding"):
            return 0.0
        if i.opcode == "copy-start":  # (destination, source, context)
            return i.outputs[0].hbm_bytes + i.outputs[1].hbm_bytes
        if i.opcode == "fusion":
            return _fusion_bytes(i, scope, self.module.computations)
        if i.opcode in _SLICES:
            return 2 * i.outputs[0].hbm_bytes
        if i.opcode == "dynamic-update-slice":
            return 2 * operands[1].hbm_bytes
        if i.opcode == "scatter":  # read and write what is updated, read the updates
            return 3 * operands[-1].hbm_bytes
        n = len(operands)  # the starts of asynchronous collectives but all-reduce return them before their results
        outputs = i.outputs[n : 2 * n] if i.opcode.endswith("-start") and len(i.outputs) >= 2 * n else i.outputs
        return sum(a.hbm_bytes for a in (*operands, *outputs))


def operand_arrays(i: Instruction, scope: Computation) -> list[Array]:
    return [array for name in i.operands if name in scope for array in scope[name].outputs]


def kernel_name(i: Instruction) -> str:
    """The name given to `pallas_call`, without what was done to it: "transpose(jvp(attention_dq))/pallas_call"."""
    path = [part for part in i.op_name.split("/") if part != "pallas_call"]
    innermost = re.search(r"([\w.\-]+)\)*$", path[-1]) if path else None
    return i.attribute(r'\bname = "([^"]+)"') or (innermost[1] if innermost else i.name)


def own_estimate(i: Instruction, operands: Sequence[Array]) -> tuple[float, float] | None:
    """(FLOPs, HBM bytes) of a kernel that says so itself, as those do that the TPU compiler makes of `ragged_dot`, or
    that has nothing but integers to work on."""
    said = i.attribute(r'"cost_estimate":\{([^}]*)\}') or ""
    found = [re.search(rf'"{key}":"(\d+)"', said) for key in ("flops", "bytes_accessed")]
    if all(found):
        return float(found[0][1]), float(found[1][1])
    moved = (*operands, *i.outputs)
    return (0.0, sum(a.hbm_bytes for a in moved)) if all(a.dtype[0] in "psu" for a in moved) else None


# Collectives


def sent_bytes(
    i: Instruction, kind: str, operands: Sequence[Array], mesh_shape: Mapping[str, int]
) -> tuple[float, str]:
    """(bytes that a chip sends in a ring algorithm, "+"-joined mesh axes it sends them along)."""
    size = sum(a.bytes for a in operands)
    if kind == "collective-permute":
        pairs = re.findall(r"\{(\d+),(\d+)\}", i.attribute(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}") or "")
        moving = [(int(a), int(b)) for a, b in pairs if a != b]
        return (size, _axes(moving, mesh_shape)) if moving else (0.0, "")
    group = _first_group(i.attributes, math.prod(mesh_shape.values()))
    n = len(group)
    if kind == "all-gather":
        size *= n
    pairs = [(group[0], other) for other in group[1:]]
    return size * (n - 1) / n * (2 if kind == "all-reduce" else 1), _axes(pairs, mesh_shape)


def sent_to_slices(i: Instruction, operands: Sequence[Array]) -> tuple[float, str]:
    """(bytes that a chip sends, kind) of a "send" that hands the part of a collective between TPU slices to the runtime
    of the hosts (Megascale); nothing of any other send. Counted as a ring over the slices, like `sent_bytes`.

    _xla_megascale_target="{1,2}x{0:7}"      slices x devices of each, in lists and ranges
    """
    kind = (i.attribute(r'_xla_megascale_transfer_type="(\w+)"') or "").lower().replace("_", "-")
    target = i.attribute(r'_xla_megascale_target="\{([^}]*)\}')
    if not kind or not target or not operands:
        return 0.0, ""
    ends = [[int(n) for n in part.split(":")] for part in target.split(",")]
    n = sum(part[-1] - part[0] + 1 for part in ends)
    times = {"all-reduce": 2 * (n - 1) / n, "all-gather": n - 1, "reduce-scatter": (n - 1) / n,
             "all-to-all": (n - 1) / n}  # fmt: skip
    return operands[0].bytes * times.get(kind, 1), kind


def _first_group(attributes: str, devices: int) -> list[int]:
    """The first group of `replica_groups`, which comes in three notations:

    {{0,1},{2,3}}               listed; {} is one group of all
    [2,2]<=[2,2]T(1,0)          iota, reshaped, transposed, cut into 2 groups of 2
    mesh['a'=2,'b'=2] {'b'}     devices of a mesh that differ along 'b', or along a part 'b':(1)2 of it; between the
                                two may stand the order of the devices in the mesh: , device_ids=([2,2]T(1,0))
    """
    text = attributes.partition("replica_groups=")[2]
    if match := re.match(r"\{\{([\d,]+)\}", text):
        return [int(n) for n in match[1].split(",")]
    if match := re.match(r"\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _iota(match[2], match[3])[: int(match[1])]
    if match := re.match(
        r"mesh\[((?:'\w+'=\d+,?)+)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", text
    ):
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", match[1])}
        strides = dict(zip(sizes, _strides(list(sizes.values())), strict=True))
        digits = []
        for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", match[4]):
            size = int(size or sizes[name])
            digits.append((size, strides[name] * sizes[name] // (int(before or 1) * size)))
        devices_of_mesh = _iota(match[2], match[3]) if match[2] else range(math.prod(sizes.values()))
        return [devices_of_mesh[position] for position in _span(digits)]
    if not text or text.startswith("{}"):
        return list(range(devices))
    raise ValueError(f"unknown notation of replica groups: {text[:80]}")


def _iota(shape: str, order: str | None) -> list[int]:
    """Of "2,3": the numbers from 0 to 5 in two rows of three; of the axes in another order "1,0": 0, 3, 1, 4, 2, 5."""
    sizes = [int(n) for n in shape.split(",")]
    axes = [int(n) for n in order.split(",")] if order else range(len(sizes))
    strides = _strides(sizes)
    return _span([(sizes[axis], strides[axis]) for axis in axes])


def _strides(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def _span(digits: Sequence[tuple[int, int]]) -> list[int]:
    """All sums of one multiple per digit (size, stride), the last digit fastest."""
    ranges = (range(0, size * stride, stride) for size, stride in digits)
    return [sum(parts) for parts in itertools.product(*ranges)]


def _axes(pairs: Sequence[tuple[int, int]], mesh_shape: Mapping[str, int]) -> str:
    """Mesh axes along which the devices of some pair differ."""
    strides = _strides(list(mesh_shape.values()))
    return "+".join(
        name
        for (name, size), stride in zip(mesh_shape.items(), strides, strict=True)
        if any(a // stride % size != b // stride % size for a, b in pairs)
    )


# FLOPs of matrix units


def _dot_flops(i: Instruction, operands: Sequence[Array], contracting: str | None) -> float:
    dims = [int(d.strip('" ')) for d in contracting.split(",") if d] if contracting else [-1]
    return 2.0 * i.outputs[0].elements * math.prod(operands[0].shape[d] for d in dims)


def _convolution_flops(i: Instruction, operands: Sequence[Array]) -> float:
    """Multiply-adds of taps that meet the input; the TPU compiler writes batched products as padded convolutions."""
    lhs, rhs, out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes).groups()
    inputs, taps, outputs = operands[0].shape, operands[1].shape, i.outputs[0].shape
    window = {key: i.attribute(rf"window=\{{[^}}]*\b{key}=([\dx_\-]+)")
              for key in ("size", "stride", "pad", "lhs_dilate", "rhs_dilate")}  # fmt: skip
    flops = 2.0 * outputs[out.index("b")] * outputs[out.index("f")] * taps[rhs.index("i")]
    for n, digit in enumerate(sorted(c for c in out if c.isdigit())):
        stride, in_dilation, tap_dilation = (
            int(window[key].split("x")[n]) if window[key] else 1 for key in ("stride", "lhs_dilate", "rhs_dilate")
        )
        low = int(window["pad"].split("x")[n].split("_")[0]) if window["pad"] else 0
        last = (inputs[lhs.index(digit)] - 1) * in_dilation
        starts = np.arange(outputs[out.index(digit)]) * stride - low
        met = 0
        for tap in range(taps[rhs.index(digit)]):
            positions = starts + tap * tap_dilation
            met += int(((positions >= 0) & (positions <= last) & (positions % in_dilation == 0)).sum())
        flops *= met
    return flops


# HBM bytes of a fusion


def _fusion_bytes(i: Instruction, scope: Computation, computations: Mapping[str, Computation]) -> float:
    """Operands and results; no more than the slices of an operand that is only sliced, and no more than the update of
    one that is updated in place."""
    inner = computations[i.called("calls")]
    parameters = _parameters(inner)
    read = 0.0
    for n, name in enumerate(i.operands):
        for array in scope[name].outputs if name in scope else ():
            if array.in_hbm:
                read += min(array.bytes, _used_bytes(parameters[n], inner, computations))
    results = [inner[o] for o in inner.root.operands] if inner.root.opcode == "tuple" else [inner.root]
    roots = [result for result in results for _ in result.outputs]
    written = sum(
        _written_bytes(array, root, inner, computations)
        for array, root in zip(i.outputs, roots, strict=True)
        if array.in_hbm
    )
    return read + written


def _parameters(inner: Computation) -> dict[int, Instruction]:
    return {int(p.literal): p for p in inner.values() if p.opcode == "parameter"}


def _used_bytes(source: Instruction, inner: Computation, computations: Mapping[str, Computation]) -> float:
    """What a fusion reads of `source`: all, or the sum of its slices if nothing else looks at it. The TPU compiler
    puts fusions into fusions: the slice of an operand of a product is one of its own."""
    total = 0.0
    for user in inner.values():
        if source.name not in user.operands:
            continue
        if user.opcode == "bitcast" and not user.is_root:
            total += _used_bytes(user, inner, computations)
        elif user.opcode == "fusion":
            called = computations[user.called("calls")]
            parameters = _parameters(called)
            total += sum(
                _used_bytes(parameters[n], called, computations)
                for n, name in enumerate(user.operands)
                if name == source.name
            )
        elif user.opcode in _SLICES and user.operands[0] == source.name:
            total += user.outputs[0].bytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == source.name:
            total += 0.0
        else:
            return source.outputs[0].bytes if source.outputs else 0.0
    return total


def _written_bytes(
    array: Array, root: Instruction, inner: Computation, computations: Mapping[str, Computation]
) -> float:
    """What a fusion writes of the result `array` that `root` makes: all, or the update of a slice."""
    while root.opcode in ("bitcast", "fusion"):
        if root.opcode == "bitcast":
            root = inner[root.operands[0]]
        else:
            inner = computations[root.called("calls")]
            root = inner.root
    update = inner.operand(root, 1) if root.opcode == "dynamic-update-slice" else None
    return update.outputs[0].bytes if update else array.bytes
