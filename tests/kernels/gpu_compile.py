"""Compiling for NVIDIA GPUs that are not there, with the real compiler."""

import jax
import pytest
from jax.sharding import Mesh, SingleDeviceSharding

from tracerl_jax.plan.topology import compile_devices, missing_compiler


def lower_for(topology, function, *shapes):
    """function of arrays of `shapes` (trees of jax.ShapeDtypeStruct), lowered. Skips the test without a compiler."""
    if missing := missing_compiler("cuda"):
        pytest.skip(missing)
    device = compile_devices(topology)[0]
    specs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device)), shapes
    )
    with jax.set_mesh(Mesh([device], ("x",))):
        return jax.jit(function).trace(*specs).lower(lowering_platforms=("cuda",))


def compile_for(topology, function, *shapes):
    """The same compiled. Register spills, and shared memory beyond the chip's, are errors of the compiler."""
    lowered = lower_for(topology, function, *shapes)
    return lowered.compile(compiler_options={"xla_gpu_fail_ptx_compilation_on_register_spilling": True})
