"""Names of TPU slices and GPU counts, the chips behind them, and what is missing where they cannot be compiled for."""

import re

import jax
import jax.numpy as jnp
import pytest
from compiled import array, compiled, mesh_of

from tracerl_jax.errors import ConfigError
from tracerl_jax.parallel.mesh import make_mesh
from tracerl_jax.plan import topology
from tracerl_jax.plan.chips import CHIPS
from tracerl_jax.plan.topology import compile_devices, missing_compiler, parse_topology, usable_hbm
from tracerl_jax.units import GIB

COMPILERS = {platform: missing_compiler(platform) for platform in ("tpu", "cuda")}


@pytest.mark.parametrize(
    "name, chips, shape",
    [
        ("v5p:4x4x4", 64, (4, 4, 4)),
        ("v5p:2x4x4", 32, (2, 4, 4)),
        ("v4:2x2x1", 4, (2, 2, 1)),
        ("v5e:1x1", 1, (1, 1)),
        ("v6e:16x16", 256, (16, 16)),
        (" V5E:2X4 ", 8, (2, 4)),
        ("h100:1", 1, (1,)),
        ("h200:5", 5, (5,)),
        ("a100-40g:64", 64, (64,)),
        ("2xv5p:4x4x4", 128, (4, 4, 4)),
        ("16 x v6e:16x16", 4096, (16, 16)),
    ],
)
def test_names(name, chips, shape):
    found = parse_topology(name)
    assert (found.chips, found.shape, found.name) == (chips, shape, name)
    assert found.chip.name in name.lower()


@pytest.mark.parametrize(
    "name, complaint",
    [
        ("", "is not CHIP:SHAPE"),
        ("v5p", "is not CHIP:SHAPE"),
        ("v5p-64", "a100:8; Google's v5p-64 counts cores and is v5p:2x4x4"),
        ("2xv4-256", "counts cores and is v4:4x4x8"),
        ("v5p-7", "a100:8."),
        ("v6e-64", "a100:8."),
        ("v5p:", "is not CHIP:SHAPE"),
        ("v5p:4x4x", "is not CHIP:SHAPE"),
        ("v5p:-4x4x4", "is not CHIP:SHAPE"),
        ("h100:8.5", "is not CHIP:SHAPE"),
        ("b200:8", "unknown chip 'b200'; known: v4, v5e, v5p, v6e, a100-40g, a100, h100, h200"),
        ("v5p:4x4", "v5p comes as v5p:XxYxZ"),
        ("v5p:4x4x4x4", "v5p comes as v5p:XxYxZ"),
        ("v5e:2x2x2", "v5e comes as v5e:XxY"),
        ("v5e:0x2", "v5e comes as v5e:XxY"),
        ("h100:0", "h100 comes as h100:COUNT"),
        ("h100:2x8", "h100 comes as h100:COUNT"),
        ("h100:12", "more than 8 GPUs come in whole hosts of 8"),
        ("v5e:2x6", "there is no such slice; those of v5e are 1x1, 2x2, 2x4"),
        ("v6e:32x32", "there is no such slice; those of v6e are 1x1, 2x2, 2x4"),
        ("v5p:4x4x6", "there is no such slice; those of v5p are 1x1x1, 2x2x1"),
        ("v4:1x2x2", "there is no such slice"),
        ("2xh100:8", "2 slices; give at least one of TPUs, and of GPUs their number: h100:16"),
        ("0xv5p:4x4x4", "0 slices; give at least one"),
        ("2xv4:2x2x2", "is not published; plan one slice, v4:2x2x2"),
    ],
)
def test_what_is_no_name_is_refused_in_one_sentence(name, complaint):
    with pytest.raises(ConfigError, match=re.escape(complaint)) as caught:
        parse_topology(name)
    message = str(caught.value)
    assert message.startswith(f"topology {name!r}") and message.endswith(".") and "\n" not in message
    assert ". " not in message


@pytest.mark.parametrize("platform, name", [("tpu", "v5e:2x2"), ("cuda", "h100:2")])
def test_a_missing_compiler_is_named(monkeypatch, platform, name):
    monkeypatch.setattr(topology, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=rf"{name}.*{platform.upper()} compiler.*pip install .tracerl_jax\[plan\]"):
        compile_devices(name)


NAMES = ["v4:2x2x2", "v5e:2x4", "v5p:2x2x4", "v6e:4x4", "v5p:4x4x4", "2xv5e:2x4", "h100:8", "a100:16"]


@pytest.mark.parametrize("name", NAMES)
def test_devices(name):
    if missing := COMPILERS[parse_topology(name).chip.platform]:
        pytest.skip(missing)
    devices = compile_devices(name)
    assert len(set(devices)) == parse_topology(name).chips
    assert {device.platform for device in devices} <= ({"cuda", "gpu"} if name[0] in "ah" else {"tpu"})
    assert jax.default_backend() == "cpu"


def test_an_axis_may_be_part_of_a_line_of_chips():
    mesh = make_mesh(2, 32, devices=compile_devices(parse_topology("v5p:4x4x4")))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 32, "tensor": 1}


def test_a_mesh_that_the_chips_do_not_fill():
    if COMPILERS["tpu"]:
        pytest.skip(COMPILERS["tpu"])
    with pytest.raises(ConfigError, match=r"fsdp=3.* needs a multiple of 3 devices but there are 8"):
        make_mesh(-1, 3, 1, devices=compile_devices("v5e:2x4"))


@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:1x1", "v5p:2x2x1", "v6e:1x1"])
def test_memory_of_a_tpu_is_what_its_compiler_says(name):
    mesh = mesh_of(name, parse_topology(name).chips, 1, 1)
    too_large = array(2**30, 64)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED") as caught:
        compiled(name, lambda x: jnp.flip(x) + x, too_large, mesh=mesh)
    (limit,) = {float(n) for n in re.findall(r"(?:of|available HBM \()\s*([\d.]+)G", str(caught.value))}
    # It prints two digits, and versions differ by one in the last.
    assert limit * GIB - 0.02 * GIB < usable_hbm(parse_topology(name).chip) <= limit * GIB + 0.01 * GIB


def test_memory_of_a_gpu_is_the_share_that_jax_takes(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert usable_hbm(CHIPS["h100"]) == int(0.75 * CHIPS["h100"].hbm_bytes)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert usable_hbm(CHIPS["h100"]) == int(0.9 * CHIPS["h100"].hbm_bytes)
    assert usable_hbm(CHIPS["v5e"]) == CHIPS["v5e"].hbm_bytes


def test_chips_are_in_order():
    """Figures that a slip of the pen would put out of order."""
    by_flops = sorted((c for c in CHIPS.values() if c.platform == "tpu"), key=lambda c: c.flops)
    assert [c.name for c in by_flops] == ["v5e", "v4", "v5p", "v6e"]
    for chip in CHIPS.values():
        assert 100 < chip.flops / chip.hbm_bandwidth < 700  # FLOPs per byte at which compute begins to bound
        assert chip.link_bandwidth < chip.hbm_bandwidth and chip.host_bandwidth < chip.link_bandwidth
        assert (chip.chips_per_fabric is None) == (chip.platform == "tpu")
    assert CHIPS["h200"].hbm_bytes > CHIPS["h100"].hbm_bytes > CHIPS["a100-40g"].hbm_bytes
