"""FLOPs, HBM bytes and loop counts of compiled programs whose costs are known, on every compiler there is."""

import jax
import jax.numpy as jnp
import pytest
from compiled import ONE_CHIP, array, compiled, mesh_of
from jax import lax

from tracerl_jax.kernels.attention import attention
from tracerl_jax.models import ModelConfig
from tracerl_jax.models.moe import Kernels, mix_experts, top_experts
from tracerl_jax.plan.hlo import parse
from tracerl_jax.plan.hlo_cost import program_cost
from tracerl_jax.plan.kernel_costs import GRAIN, attention_cost

ONE = {"data": 1, "fsdp": 1, "tensor": 1}


def cost(topology, function, *shapes, **how):
    return program_cost(compiled(topology, function, *shapes), ONE, **how)


def dot(a, b):
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


# FLOPs

PRODUCTS = {
    "plain": (dot, [(256, 512), (512, 384)], 2 * 256 * 512 * 384),
    "transposed": (lambda a, b: dot(a.T, b.T), [(512, 256), (384, 512)], 2 * 256 * 512 * 384),
    "batched": (lambda a, b: jnp.einsum("bmk,bkn->bmn", a, b), [(8, 128, 256), (8, 256, 128)], 2 * 8 * 128 * 256 * 128),
    "heads": (
        lambda q, k: jnp.einsum("nthd,nshd->nhts", q, k), [(2, 128, 4, 64), (2, 256, 4, 64)],
        2 * 2 * 4 * 128 * 256 * 64,
    ),
    "two contracted": (lambda a, b: jnp.einsum("nkd,kde->ne", a, b), [(256, 4, 64), (4, 64, 128)], 2 * 256 * 256 * 128),
    "fused": (lambda a, b: jax.nn.silu(dot(a * 2, b)) + 1, [(256, 512), (512, 384)], 2 * 256 * 512 * 384),
    "of one row": (dot, [(1, 512), (512, 384)], 2 * 512 * 384),
    "gradients": (
        lambda a, b: jax.grad(lambda a, b: jnp.sum(dot(a, b) ** 2), (0, 1))(a, b), [(256, 512), (512, 384)],
        3 * 2 * 256 * 512 * 384,
    ),
}  # fmt: skip


@pytest.mark.parametrize("topology", ONE_CHIP)
@pytest.mark.parametrize("name", PRODUCTS)
def test_flops_of_products(topology, name):
    function, shapes, flops = PRODUCTS[name]
    if name == "of one row" and topology != "cpu":
        pytest.skip("accelerators turn it into a sum")
    assert cost(topology, function, *(array(*shape, dtype="bfloat16") for shape in shapes)).flops == flops


def test_tpu_products_are_convolutions():
    """What the test above counts, in the notation of the TPU compiler."""
    function, shapes, _ = PRODUCTS["heads"]
    module = compiled("v5e:1x1", function, *(array(*shape, dtype="bfloat16") for shape in shapes))
    assert {"convolution"} <= {i.opcode for scope in module.computations.values() for i in scope.values()}


CONVOLUTIONS = {
    # output positions x taps that meet the input
    "same": ("f32[8,10,16]", "f32[3,16,32]", "f32[8,10,32]", "size=3 pad=1_1", 10 * 3 - 2),
    "valid": ("f32[8,10,16]", "f32[3,16,32]", "f32[8,8,32]", "size=3", 8 * 3),
    "strided": ("f32[8,10,16]", "f32[3,16,32]", "f32[8,4,32]", "size=3 stride=2", 4 * 3),
    "dilated": ("f32[8,10,16]", "f32[3,16,32]", "f32[8,6,32]", "size=3 rhs_dilate=2", 6 * 3),
    "transposed": ("f32[8,4,16]", "f32[2,16,32]", "f32[8,8,32]", "size=2 pad=1_0 lhs_dilate=2", 4 + 4),
    # a product per position: every tap meets the input at one output position
    "batched product": ("f32[8,6,16]", "f32[6,16,32]", "f32[8,11,32]", "size=6 pad=5_5 rhs_reversal=1", 6 * 6),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_flops_of_convolutions(name):
    x, taps, out, window, met = CONVOLUTIONS[name]
    text = f"""
ENTRY %main (x: {x}, w: {taps}) -> {out} {{
  %x = {x} parameter(0)
  %w = {taps} parameter(1)
  ROOT %c = {out} convolution(%x, %w), window={{{window}}}, dim_labels=b0f_0io->b0f
}}"""
    assert program_cost(parse(text), ONE).flops == 2 * 8 * 16 * 32 * met


# Loops and branches


def layers(x, weights):
    return lax.scan(lambda x, w: (jnp.tanh(dot(x, w)).astype(x.dtype), None), x, weights)[0]


@pytest.mark.parametrize("topology", ONE_CHIP)
def test_a_scan_counts_its_body_as_often_as_it_runs(topology):
    x, weights = array(8, 1024, dtype="bfloat16"), array(12, 1024, 1024, dtype="bfloat16")
    found = cost(topology, layers, x, weights)
    assert found.flops == 12 * 2 * 8 * 1024 * 1024
    assert not found.unknown_loops
    size = 12 * 1024 * 1024 * 2
    # Read once; or sliced into a copy and read again. A CPU makes another copy in float32.
    assert size <= found.hbm_bytes <= (9 if topology == "cpu" else 3) * 1.1 * size


@pytest.mark.parametrize("topology", ONE_CHIP)
def test_nested_scans_multiply(topology):
    def nested(x, weights):
        return lax.fori_loop(0, 5, lambda _, x: layers(x, weights), x)

    x, weights = array(128, 256, dtype="bfloat16"), array(7, 256, 256, dtype="bfloat16")
    assert cost(topology, nested, x, weights).flops == 5 * 7 * 2 * 128 * 256 * 256


@pytest.mark.parametrize("topology", ONE_CHIP)
def test_a_gradient_through_a_scan(topology):
    x, weights = array(128, 256, dtype="bfloat16"), array(12, 256, 256, dtype="bfloat16")
    gradient = jax.grad(lambda x, w: jnp.sum(layers(x, w).astype(jnp.float32)), (0, 1))
    assert cost(topology, gradient, x, weights).flops == 3 * 12 * 2 * 128 * 256 * 256


@pytest.mark.parametrize("topology", ONE_CHIP)
def test_a_loop_whose_length_depends_on_data(topology):
    def halve(x, w):
        return lax.while_loop(lambda x: jnp.max(x) > 1, lambda x: jnp.tanh(dot(x, w)), x)

    shapes, once = (array(128, 256), array(256, 256)), 2 * 128 * 256 * 256
    unknown = cost(topology, halve, *shapes)
    assert (unknown.flops, unknown.unknown_loops) == (once, {"jit(halve)/while"})
    known = cost(topology, halve, *shapes, loops={"jit(halve)/while": 37.5})
    assert (known.flops, known.unknown_loops) == (37.5 * once, set())
    assert known.hbm_bytes > 10 * unknown.hbm_bytes


@pytest.mark.parametrize("topology", ONE_CHIP)
def test_a_conditional_costs_its_dearer_branch(topology):
    def choose(i, x, w):
        branches = [lambda: x + 1, lambda: dot(dot(x, w), w), lambda: dot(x, w)]
        return lax.switch(i, branches)

    found = cost(topology, choose, array(dtype="int32"), array(256, 256), array(256, 256))
    assert found.flops == 2 * 2 * 256**3


# HBM bytes


@pytest.mark.parametrize("topology", ONE_CHIP)
def test_bytes_of_elementwise_work(topology):
    x, size = array(4096, 4096), 4096 * 4096 * 4
    assert cost(topology, lambda x: jnp.tanh(x * 2) + 1, x).hbm_bytes == pytest.approx(2 * size, rel=0.01)
    assert cost(topology, lambda x, y: x * y + x, x, x).hbm_bytes == pytest.approx(3 * size, rel=0.01)
    assert cost(topology, lambda x: x.astype(jnp.bfloat16), x).hbm_bytes == pytest.approx(1.5 * size, rel=0.01)
    assert cost(topology, lambda x: jnp.sum(x * x), x).hbm_bytes == pytest.approx(size, rel=0.05)


@pytest.mark.parametrize("topology", ONE_CHIP)
def test_bytes_of_a_product(topology):
    a, b = array(2048, 4096, dtype="bfloat16"), array(4096, 1024, dtype="bfloat16")
    needed = 2 * (2048 * 4096 + 4096 * 1024 + 2048 * 1024)
    found = cost(topology, lambda a, b: jnp.dot(a, b), a, b).hbm_bytes
    # A CPU multiplies in float32 and keeps the converted operands.
    assert needed <= found <= (6 if topology == "cpu" else 1.5) * needed


@pytest.mark.parametrize("topology", ONE_CHIP)
def test_a_slice_is_read_alone_and_written_in_place(topology):
    stack, row = array(64, 512, 512), array(512, 512)
    size = 512 * 512 * 4

    def read(stack, i):
        return lax.dynamic_index_in_dim(stack, i, keepdims=False) * 2

    assert cost(topology, read, stack, array(dtype="int32")).hbm_bytes == pytest.approx(2 * size, rel=0.01)

    def write(stack, row):  # what is carried by the loop is not copied by it
        return lax.fori_loop(0, 64, lambda i, s: lax.dynamic_update_index_in_dim(s, row * i, i, 0), stack)

    whole = 64 * size
    assert whole <= cost(topology, write, stack, row).hbm_bytes <= (2 + 2 + 0.1) * whole  # 2: a copy of the argument


# Hand-written kernels

ROWS, TOKENS = 2, 1024
MODEL = ModelConfig(vocab_size=64, width=64, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=128, mlp_width=64,
                    dtype="bfloat16")  # fmt: skip


def attend(q, k, v, intervals):
    return attention(q, k, v, intervals)


def attend_back(q, k, v, intervals):
    return jax.grad(lambda *qkv: jnp.sum(attend(*qkv, intervals).astype(jnp.float32)), (0, 1, 2))(q, k, v)


def block_causal():
    intervals = jnp.zeros((ROWS, TOKENS, 4), jnp.int32)
    return intervals.at[..., 1].set((jnp.arange(TOKENS) // 4 + 1) * 4)


ATTENTION_SHAPES = [array(ROWS, TOKENS, heads, 128, dtype="bfloat16") for heads in (4, 2, 2)]
ATTENTION_SHAPES.append(array(ROWS, TOKENS, 4, dtype="int32"))


@pytest.mark.parametrize("topology", ONE_CHIP[1:])
def test_kernels_are_counted(topology):
    module = compiled(topology, attend_back, *ATTENTION_SHAPES)
    others = program_cost(module, ONE, kernel_cost=lambda instruction, operands: (0.0, 0.0))
    backward = {"attention_backward"} if topology == "v5e:1x1" else {"attention_dq", "attention_dkv"}
    assert set(others.kernels) == {"attention_forward"} | backward

    kernel_cost = attention_cost(MODEL, mesh_of(topology, 1, 1, 1), block_causal(), ROWS)
    known = program_cost(module, ONE, kernel_cost=kernel_cost)
    assert known.kernels == others.kernels and not known.unknown_kernels
    tiles = TOKENS // GRAIN
    pairs = ROWS * tiles * (tiles + 1) / 2 * GRAIN**2 * MODEL.num_heads
    products = 2 + 5 if topology == "v5e:1x1" else 2 + 3 + 4
    assert known.flops - others.flops == 2 * 128 * products * pairs
    arrays = 2 * ROWS * TOKENS * 128 * 2  # in bf16, of two key/value heads
    assert known.hbm_bytes - others.hbm_bytes >= 10 * arrays

    # A Triton call tells the compiler nothing; on TPUs ours say what all pairs would cost.
    unknown = program_cost(module, ONE)
    assert unknown.unknown_kernels == (set(others.kernels) if topology == "h100:1" else set())
    assert unknown.flops > known.flops if topology == "v5e:1x1" else unknown.flops == others.flops


def call_of_a_kernel(attributes, operand="bf16[64,64]"):
    return program_cost(
        parse(f"""
ENTRY %main (x: {operand}) -> {operand} {{
  %x = {operand} parameter(0)
  ROOT %call = {operand} custom-call(%x), custom_call_target="tpu_custom_call", {attributes}
}}"""),
        ONE,
    )


def test_kernels_that_nobody_knows_are_named():
    named = 'metadata={op_name="jit(f)/while/body/mystery/pallas_call"}'
    found = call_of_a_kernel(named)
    assert (found.unknown_kernels, found.flops, found.hbm_bytes) == ({"mystery"}, 0, 2 * 64 * 64 * 2)
    said = named + ', backend_config={"custom_call_config":{"cost_estimate":{"flops":"12345","transcendentals":"0",' \
        '"bytes_accessed":"678"}}}'
    found = call_of_a_kernel(said)
    assert (found.unknown_kernels, found.flops, found.hbm_bytes) == (set(), 12345, 678)
    assert call_of_a_kernel(named, "s32[64,64]").unknown_kernels == set()


def test_products_with_experts_on_tpus():
    """The TPU compiler makes kernels of `ragged_dot` that say what they cost: only what the tokens need."""
    tokens, width, inner, experts, chosen = 512, 256, 128, 16, 4
    shapes = [array(1, tokens, width, dtype="bfloat16"), array(1, tokens, experts)]
    shapes += [array(experts, *shape, dtype="bfloat16") for shape in ((width, inner), (width, inner), (inner, width))]

    def mixed(x, probs, *kernels):
        return mix_experts(x, *top_experts(probs, chosen), Kernels(*kernels))

    found = cost("v5e:1x1", mixed, *shapes)
    assert found.flops == pytest.approx(3 * 2 * tokens * chosen * width * inner, rel=0.01)
    assert not found.unknown_kernels and found.kernels["ragged-dot-none"] == 3


@pytest.mark.parametrize("windows", [1, 2])
def test_windows_of_the_backward_kernel_add_up(windows):
    """Where a row's keys do not fit into vector memory the kernel is called once per window of them."""
    keys = TOKENS // windows
    call = parse(f"""
ENTRY %main (q: bf16[2,2,2,1024,128]) -> bf16[2,2,{keys},128] {{
  %q = bf16[2,2,2,1024,128]{{4,3,2,1,0}} parameter(0)
  %call = (f32[2,2,2,1024,128]{{4,3,2,1,0}}, bf16[2,2,{keys},128], bf16[2,2,{keys},128]) custom-call(%q), \
custom_call_target="tpu_custom_call", metadata={{op_name="jit(f)/transpose(jvp(attention_backward))/pallas_call"}}
  ROOT %out = bf16[2,2,{keys},128] get-tuple-element(%call), index=1
}}""")
    kernel_cost = attention_cost(MODEL, mesh_of("cpu", 1, 1, 1), block_causal(), ROWS)
    found = program_cost(call, ONE, kernel_cost=kernel_cost)
    assert found.kernels == {"attention_backward": 1} and not found.unknown_kernels
    assert windows * found.flops == 2 * 128 * 5 * ROWS * 36 * GRAIN**2 * MODEL.num_heads


def test_rows_like_those_given():
    """The intervals of a few rows stand for those of as many as the program has."""
    mesh, call = mesh_of("cpu", 2, 2, 2), 'op_name="attention_forward"'
    instruction = parse(f"""
ENTRY %main (q: bf16[8]) -> bf16[8] {{
  ROOT %q = bf16[8] custom-call(), custom_call_target="tpu_custom_call", metadata={{{call}}}
}}""").computations["main"].root
    few, many = (attention_cost(MODEL, mesh, block_causal(), rows)(instruction, ()) for rows in (ROWS, 8 * ROWS))
    assert many == (8 * few[0], 8 * few[1])
    # 4 shards of rows, 2 of heads
    assert few[0] == 2 * 128 * 2 * ROWS * 36 * GRAIN**2 * MODEL.num_heads / 8
