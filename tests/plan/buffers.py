"""What a compiled program keeps in memory: arrays that grow too fast, and collectives that return too much."""

import itertools
import math

from tracerl_jax.models import ModelConfig
from tracerl_jax.plan.hlo import Array, Instruction, Module


def buffers(module: Module) -> list[tuple[Instruction, Array]]:
    """(instruction, result) of all that is written to memory: what is inside a fusion is not."""
    everything = [i for scope in module.computations.values() for i in scope.values()]
    fused = {i.called("calls") for i in everything if i.opcode == "fusion"}
    return [
        (i, array)
        for name, scope in module.computations.items()
        if name not in fused
        for i in scope.values()
        for array in i.outputs
    ]


def is_product(shape: tuple[int, ...], a: int, b: int) -> bool:
    """The array is a x b x something: dimensions of it, in any order, split or merged among themselves, make up both.

    The dimension of a merged array [.., a * b] makes up both at once.
    """
    if any(n % (a * b) == 0 for n in shape):
        return True
    indices = range(len(shape))
    subsets = [set(s) for r in range(1, len(shape)) for s in itertools.combinations(indices, r)]
    parts = {n: [s for s in subsets if math.prod(shape[i] for i in s) == n] for n in (a, b)}
    return any(not x & y for x in parts[a] for y in parts[b])


def arrays_of(module: Module, a: int, b: int) -> set[str]:
    """Names and shapes of the buffers that are a x b x something."""
    return {
        f"{i.opcode} {i.name} {array.dtype}{list(array.shape)} {i.op_name}"
        for i, array in buffers(module)
        if array.elements >= a * b and is_product(array.shape, a, b)
    }


def gathers_of_all_layers(module: Module, model: ModelConfig) -> set[str]:
    """All-gathers that return a matrix of every layer."""
    smallest = model.width * model.num_kv_heads * model.head_dim
    return {
        f"{i.name} {array.dtype}{list(array.shape)} {i.op_name}"
        for i, array in buffers(module)
        if i.opcode.startswith("all-gather")
        and array.shape[:1] == (model.num_layers,)
        and array.elements >= model.num_layers * smallest
    }
