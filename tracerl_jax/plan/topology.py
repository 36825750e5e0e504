"""Devices of machines that are not there, for ahead-of-time compilation by the real TPU and CUDA compilers."""

import itertools
import math
import os
import re
from dataclasses import dataclass
from importlib.util import find_spec

import jax
from jax.experimental import topologies

from tracerl_jax.errors import ConfigError
from tracerl_jax.plan.chips import CHIPS, Chip, cuda_target_config

# Slices that Google rents, smaller than a cube of 4x4x4 or with two dimensions; others are made of whole cubes.
SLICES = {
    2: ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4"),
}
EXAMPLES = "v5p:4x4x4, 2xv5p:4x4x4, v5e:2x4, v6e:4x4, v4:2x2x2, h100:8, h200:16, a100:8"
# Without these libtpu looks for a metadata server and for the locks of a real TPU. They do no harm where there is one.
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True)
class Topology:
    """`name` as the user wrote it; `shape` of the TPU torus of a slice, or (GPUs,)."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1  # of TPUs, with the data-centre network between them

    @property
    def chips(self) -> int:
        return self.slices * math.prod(self.shape)

    def is_ring(self, size: int) -> bool:
        """A dimension of `size` TPUs is closed: between whole 4x4x4 cubes, or across a whole pod of 16x16."""
        return size % 4 == 0 and min(self.shape) >= 4 if len(self.shape) == 3 else size == 16


def parse_topology(name: str) -> Topology:
    """ "v5p:4x4x4", "2xv5p:4x4x4" (two slices) or "h100:8" -> Topology.

    Raises ConfigError for a name that no such machine has.
    """
    slices, spec = re.fullmatch(r"(?:(\d+) ?x ?)?(.*)", name.strip().lower()).groups()
    match = re.fullmatch(r"([a-z0-9-]+):(\d+(?:x\d+)*)", spec)
    if not match:
        raise ConfigError(f"topology {name!r} is not CHIP:SHAPE; for example {EXAMPLES}{_instead_of_cores(spec)}.")
    if match[1] not in CHIPS:
        raise ConfigError(f"topology {name!r}: unknown chip {match[1]!r}; known: {', '.join(CHIPS)}.")
    chip, shape = CHIPS[match[1]], tuple(int(n) for n in match[2].split("x"))
    dimensions = {"v4": 3, "v5p": 3, "v5e": 2, "v6e": 2}.get(chip.name, 1)
    if len(shape) != dimensions or min(shape) < 1:
        form = "x".join("XYZ"[:dimensions]) if chip.platform == "tpu" else "COUNT"
        raise ConfigError(f"topology {name!r}: {chip.name} comes as {chip.name}:{form}, for example {EXAMPLES}.")
    cubes = dimensions == 3 and all(size % 4 == 0 for size in shape)
    if chip.platform == "tpu" and not cubes and match[2] not in SLICES[dimensions]:
        known = ", ".join(SLICES[dimensions]) + (" and those of whole 4x4x4 cubes" if dimensions == 3 else "")
        raise ConfigError(f"topology {name!r}: there is no such slice; those of {chip.name} are {known}.")
    if chip.platform == "cuda" and shape[0] > chip.chips_per_fabric and shape[0] % chip.chips_per_fabric:
        raise ConfigError(f"topology {name!r}: more than {chip.chips_per_fabric} GPUs come in whole hosts of "
                          f"{chip.chips_per_fabric}.")
    slices = int(slices or 1)
    if slices < 1 or (slices > 1 and chip.platform == "cuda"):
        raise ConfigError(f"topology {name!r}: {slices} slices; give at least one of TPUs, and of GPUs their number: "
                          f"{chip.name}:{slices * shape[0] or shape[0]}, with mesh.slices for what data goes over.")
    if slices > 1 and not chip.host_bandwidth:
        raise ConfigError(f"topology {name!r}: how fast slices of {chip.name} exchange data is not published; plan one "
                          f"slice, {spec}.")
    return Topology(name, chip, shape, slices)


def _instead_of_cores(name: str) -> str:
    """What Google's name of a slice, which counts two cores a chip, is here; "" for other names."""
    match = re.fullmatch(r"(v4|v5p)-(\d+)", name)
    if not match:
        return ""
    cubes = itertools.combinations_with_replacement(range(4, 33, 4), 3)
    shapes = [*(tuple(map(int, shape.split("x"))) for shape in SLICES[3]), *sorted(cubes, key=max)]
    found = next((shape for shape in shapes if 2 * math.prod(shape) == int(match[2])), None)
    return f"; Google's {name} counts cores and is {match[1]}:{'x'.join(map(str, found))}" if found else ""


def missing_compiler(platform: str) -> str | None:
    """What to install so that programs can be compiled for "tpu" or "cuda" here; None if nothing is missing."""
    if platform == "tpu":
        return None if find_spec("libtpu") else 'the TPU compiler is not installed: pip install "tracerl_jax[plan]"'
    found = find_spec("jax_plugins") and (find_spec("jax_plugins.xla_cuda13") or find_spec("jax_plugins.xla_cuda12"))
    return None if found else 'the CUDA compiler is not installed: pip install "tracerl_jax[plan]"'


def compile_devices(topology: Topology | str) -> list[jax.Device]:
    """Devices to put into a mesh or a sharding, and to lower and compile for; they hold no data and run nothing.

    JAX itself stays on the CPU. Raises ConfigError where the compiler for the chip is not installed.
    """
    topology = parse_topology(topology) if isinstance(topology, str) else topology
    if missing := missing_compiler(topology.chip.platform):
        raise ConfigError(f"topology {topology.name!r}: {missing}.")
    if topology.chip.platform == "cuda":
        fabric = min(topology.chips, topology.chip.chips_per_fabric)
        hosts = f"1x{topology.chips // fabric}x{fabric}"
        config = cuda_target_config(topology.chip)
        return list(topologies.get_topology_desc(platform="cuda", topology=hosts, target_config=config).devices)
    for name, value in _TPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    shape = topology.shape + (1,) * (3 - len(topology.shape))
    options = {"chips_per_host_bounds": [min(shape[0], 2), min(shape[1], 2), 1]}
    if topology.chip.name in ("v4", "v5p"):  # two cores that act as one device
        options["chip_config_name"] = "megacore"
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    name = f"{topology.chip.name}:{'x'.join(map(str, topology.shape))}"
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except jax.errors.JaxRuntimeError as e:
        raise ConfigError(f"topology {topology.name!r}: the TPU compiler knows no such slice ({e}).") from e


def usable_hbm(chip: Chip) -> int:
    """Bytes of HBM that JAX gives to programs: of a GPU's memory the share it reserves at start, 75% unless told."""
    if chip.platform == "tpu":
        return chip.hbm_bytes
    return int(chip.hbm_bytes * float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75")))
