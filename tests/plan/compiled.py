"""Small programs compiled by the real compilers of CPU, TPU and NVIDIA GPU; nothing runs."""

import functools
import math

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tracerl_jax.parallel.mesh import make_mesh
from tracerl_jax.plan.estimate import COMPILER_OPTIONS
from tracerl_jax.plan.hlo import Module, parse
from tracerl_jax.plan.programs import PlannedProgram
from tracerl_jax.plan.topology import compile_devices, missing_compiler, parse_topology

ONE_CHIP = ("cpu", "v5e:1x1", "h100:1")
EIGHT_CHIPS = ("cpu", "v5e:2x4", "h100:8")


@functools.cache
def mesh_of(topology: str, *sizes: int) -> jax.sharding.Mesh:
    """A mesh of these sizes on a topology or the CPU. Skips the test where there is no compiler for it."""
    if topology == "cpu":
        return make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
    if missing := missing_compiler(parse_topology(topology).chip.platform):
        pytest.skip(missing)
    return make_mesh(*sizes, devices=compile_devices(topology))


def compiled(topology: str, function, *shapes, mesh=None, specs=None, **options) -> Module:
    """`function` of arrays of these shapes, sharded by `specs` (default: whole), compiled and parsed."""
    mesh = mesh or mesh_of(topology, 1, 1, 1)
    platform = "cpu" if topology == "cpu" else parse_topology(topology).chip.platform
    specs = specs or [PartitionSpec()] * len(shapes)
    inputs = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
        for x, spec in zip(shapes, specs, strict=True)
    ]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(function).trace(*inputs).lower(lowering_platforms=(platform,))
        return parse(lowered.compile({**COMPILER_OPTIONS.get(platform, {}), **options}).as_text())


def compile_program(program: PlannedProgram, platform: str, **options) -> Module:
    """A program of a plan, compiled and parsed."""
    with jax.sharding.use_abstract_mesh(program.mesh.abstract_mesh):
        lowered = program.traced.lower(lowering_platforms=(platform,))
        return parse(lowered.compile({**COMPILER_OPTIONS[platform], **options}).as_text())


def array(*shape: int, dtype="float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)
