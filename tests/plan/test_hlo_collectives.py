"""Bytes that a chip sends in collectives, by kind and mesh axes: of compiled programs, and of every notation."""

import jax
import jax.numpy as jnp
import pytest
from compiled import EIGHT_CHIPS, array, compiled, mesh_of
from jax import lax
from jax.sharding import PartitionSpec as P

from tracerl_jax.plan.hlo import parse
from tracerl_jax.plan.hlo_cost import SLICES, program_cost

SIZES = {"data": 2, "fsdp": 2, "tensor": 2}
PART = 64 * 256 * 4  # bytes of a chip's f32 [64, 256]
EVERYWHERE = ("data", "fsdp", "tensor")

COLLECTIVES = {
    "all-gather over one axis": (lambda x: lax.all_gather(x, "fsdp"), ("all-gather", "fsdp"), PART),
    "all-gather over two": (lambda x: lax.all_gather(x, ("data", "fsdp")), ("all-gather", "data+fsdp"), 3 * PART),
    "all-gather over all": (lambda x: lax.all_gather(x, EVERYWHERE), ("all-gather", "data+fsdp+tensor"), 7 * PART),
    "all-gather over axes apart": (
        lambda x: lax.all_gather(x, ("data", "tensor")), ("all-gather", "data+tensor"), 3 * PART,
    ),
    "all-reduce over one axis": (lambda x: lax.psum(x, "tensor"), ("all-reduce", "tensor"), PART),
    "all-reduce over all": (lambda x: lax.psum(x, EVERYWHERE), ("all-reduce", "data+fsdp+tensor"), 2 * 7 / 8 * PART),
    "reduce-scatter": (
        lambda x: lax.psum_scatter(x, "data", scatter_dimension=0, tiled=True), ("reduce-scatter", "data"), PART / 2,
    ),
    "reduce-scatter over two": (
        lambda x: lax.psum_scatter(x, ("fsdp", "tensor"), scatter_dimension=0, tiled=True),
        ("reduce-scatter", "fsdp+tensor"), PART * 3 / 4,
    ),
    "permute": (lambda x: lax.ppermute(x, "fsdp", [(0, 1), (1, 0)]), ("collective-permute", "fsdp"), PART),
    "all-to-all": (lambda x: lax.all_to_all(x, "tensor", 0, 0, tiled=True), ("all-to-all", "tensor"), PART / 2),
}  # fmt: skip


def cost(topology, function):
    mesh = mesh_of(topology, *SIZES.values())
    spread = P(EVERYWHERE, None)
    shared = jax.shard_map(function, mesh=mesh, in_specs=spread, out_specs=P(None), check_vma=False)
    module = compiled(topology, lambda x: jnp.tanh(shared(x * 2)), array(512, 256), mesh=mesh, specs=[spread])
    return program_cost(module, SIZES)


@pytest.mark.parametrize("topology", EIGHT_CHIPS)
@pytest.mark.parametrize("name", COLLECTIVES)
def test_bytes_by_kind_and_axes(topology, name):
    function, key, sent = COLLECTIVES[name]
    assert cost(topology, function).collective_bytes == {key: sent}


@pytest.mark.parametrize("topology", EIGHT_CHIPS)
def test_a_collective_in_a_loop_counts_as_often_as_the_loop_runs(topology):
    def body(_, x):
        return jnp.tanh(lax.ppermute(x, "data", [(0, 1), (1, 0)]))

    found = cost(topology, lambda x: lax.fori_loop(0, 9, body, x))
    assert found.collective_bytes == {("collective-permute", "data"): 9 * PART}


@pytest.mark.parametrize("topology", EIGHT_CHIPS[1:])
def test_products_in_turns_with_permutes(topology):
    """The TPU compiler multiplies with a weight part after part as they come round the ring, in an unrolled loop."""
    mesh = mesh_of(topology, 1, 8, 1)
    x, w = array(8 * 8192, 2048, dtype="bfloat16"), array(2048, 6144, dtype="bfloat16")

    def product(x, w):
        return lax.with_sharding_constraint(jnp.dot(x, w), jax.NamedSharding(mesh, P("fsdp", None)))

    module = compiled(topology, product, x, w, mesh=mesh, specs=[P("fsdp", None), P("fsdp", None)])
    found = program_cost(module, {"data": 1, "fsdp": 8, "tensor": 1})
    assert found.flops == 2 * 8192 * 2048 * 6144
    ((kind, axes),) = found.collective_bytes
    assert (kind, axes) == ("all-gather" if topology == "h100:8" else "collective-permute", "fsdp")
    # Seven eighths come from the others; the unrolled loop sends up to two of them once too far.
    assert found.collective_bytes[kind, axes] in [n / 8 * 2048 * 6144 * 2 for n in (7, 8, 9)]


def collective(kind, attributes, shape="f32[4,64]"):
    return program_cost(
        parse(f"""
ENTRY %main (x: {shape}) -> {shape} {{
  %x = {shape} parameter(0)
  ROOT %c = {shape} {kind}(%x), channel_id=1, {attributes}, to_apply=%add
}}"""),
        {"data": 2, "fsdp": 4, "tensor": 1},
    ).collective_bytes


BYTES = 4 * 64 * 4
NOTATIONS = {
    # devices of the mesh [data, fsdp]: 0 1 2 3 / 4 5 6 7
    "{{0,1,2,3},{4,5,6,7}}": ("fsdp", 4),
    "{{0,4},{1,5},{2,6},{3,7}}": ("data", 2),
    "{{0,2},{1,3},{4,6},{5,7}}": ("fsdp", 2),
    "{{0,1,2,3,4,5,6,7}}": ("data+fsdp", 8),
    "{}": ("data+fsdp", 8),
    "[2,4]<=[8]": ("fsdp", 4),
    "[4,2]<=[2,4]T(1,0)": ("data", 2),
    "[1,8]<=[8]": ("data+fsdp", 8),
    "[4,2]<=[2,2,2]T(0,2,1)": ("fsdp", 2),
    "mesh['axis_0'=8] {'axis_0'}": ("data+fsdp", 8),
    "mesh['a'=2,'b'=4] {'b'}": ("fsdp", 4),
    "mesh['a'=2,'b'=4] {'a'}": ("data", 2),
    "mesh['a'=2,'b'=4] {'a','b'}": ("data+fsdp", 8),
    "mesh['a'=8] {'a':(1)2}": ("data", 2),
    "mesh['a'=8] {'a':(2)4}": ("fsdp", 4),
    "mesh['a'=8] {'a':(2)2}": ("fsdp", 2),
    "mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}": ("data", 2),
    "mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}": ("fsdp", 4),
}


@pytest.mark.parametrize("notation", NOTATIONS)
def test_notations_of_groups(notation):
    axes, n = NOTATIONS[notation]
    attributes = f"replica_groups={notation}, use_global_device_ids=true"
    assert collective("all-reduce", attributes) == {("all-reduce", axes): 2 * BYTES * (n - 1) / n}
    assert collective("all-gather", attributes + ", dimensions={0}") == {("all-gather", axes): BYTES * (n - 1)}


def test_groups_of_one_send_nothing():
    assert collective("all-reduce", "replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}") == {}
    assert collective("collective-permute", "source_target_pairs={{0,0},{1,1}}") == {}


def test_an_unknown_notation_is_refused():
    with pytest.raises(ValueError, match="unknown notation of replica groups: <<0 to 7>>"):
        collective("all-reduce", "replica_groups=<<0 to 7>>")


def test_axes_of_a_permute_are_those_of_all_its_pairs():
    assert collective("collective-permute", "source_target_pairs={{0,1},{1,0},{2,3},{3,2}}") == {
        ("collective-permute", "fsdp"): BYTES
    }
    assert collective("collective-permute", "source_target_pairs={{1,4},{4,1}}") == {
        ("collective-permute", "data+fsdp"): BYTES
    }
    assert collective("collective-permute", "source_target_pairs={{0,1},{1,5},{5,0}}") == {
        ("collective-permute", "data+fsdp"): BYTES
    }


def test_asynchronous_starts_return_their_operands_too():
    text = """
%async (p: bf16[8,64]) -> bf16[2,64] {
  %p = bf16[8,64] parameter(0)
  ROOT %rs = bf16[2,64] reduce-scatter(%p), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
}

ENTRY %main (x: f32[4,64], y: bf16[8,64]) -> (f32[16,64], bf16[2,64]) {
  %x = f32[4,64] parameter(0)
  %y = bf16[8,64] parameter(1)
  %s = (f32[4,64], f32[16,64]) all-gather-start(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %d = f32[16,64] all-gather-done(%s)
  %t = ((bf16[8,64]), bf16[2,64], u32[]) async-start(%y), calls=%async
  %e = bf16[2,64] async-done(%t)
  ROOT %out = (f32[16,64], bf16[2,64]) tuple(%d, %e)
}"""
    found = program_cost(parse(text), {"data": 2, "fsdp": 4, "tensor": 1})
    assert found.collective_bytes == {("all-gather", "fsdp"): 3 * 4 * 64 * 4, ("reduce-scatter", "fsdp"): 6 * 64 * 2}
    assert found.hbm_bytes == (4 + 16) * 64 * 4 + (8 + 2) * 64 * 2


@pytest.mark.parametrize(("kind", "target", "sent"), [
    ("ALL_REDUCE", "{1,2}x{0:7}", BYTES), ("ALL_REDUCE", "{1:4}x{0:7}", 1.5 * BYTES),
    ("ALL_GATHER", "{1:4}x{0:7}", 3 * BYTES), ("REDUCE_SCATTER", "{1,2,4,5}x{0}", 0.75 * BYTES),
    ("ONE_TO_ONE", "{1,2}x{0}", BYTES),
])  # fmt: skip
def test_what_goes_to_other_slices_is_handed_to_the_hosts(kind, target, sent):
    """The TPU compiler writes the part of a collective between slices as a send to the runtime of the hosts."""
    found = program_cost(
        parse(f"""
ENTRY %main (x: f32[4,64]) -> f32[4,64] {{
  %x = f32[4,64] parameter(0)
  %t = token[] after-all()
  %s = (f32[4,64], u32[], token[]) send(%x, %t), channel_id=2, is_host_transfer=true, frontend_attributes={{\
_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_reduce_operation="SUM",\
_xla_megascale_target="{target}",_xla_megascale_transfer_type="{kind}"}}
  %d = token[] send-done(%s), channel_id=2, is_host_transfer=true
  ROOT %y = f32[4,64] negate(%x)
}}"""),
        {"data": 1, "fsdp": 8, "tensor": 1},
    )
    key = (kind.lower().replace("_", "-"), SLICES)
    assert found.collective_bytes == {key: sent} and found.collective_calls == {key: 1}


def test_a_send_of_something_else_is_no_collective():
    text = """
ENTRY %main (x: f32[4,64]) -> f32[4,64] {
  %x = f32[4,64] parameter(0)
  %t = token[] after-all()
  %s = (f32[4,64], u32[], token[]) send(%x, %t), channel_id=2, is_host_transfer=true
  ROOT %y = f32[4,64] negate(%x)
}"""
    assert program_cost(parse(text), {"data": 1}).collective_bytes == {}
