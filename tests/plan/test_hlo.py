"""HLO text as data, and the lengths of loops in it."""

import jax.numpy as jnp
import pytest
from compiled import ONE_CHIP, array, compiled
from jax import lax

from tracerl_jax.plan.hlo import arrays, parse
from tracerl_jax.plan.hlo_cost import program_cost
from tracerl_jax.plan.hlo_loops import LoopLengths

TEXT = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[2,3]{1,0})->f32[2,3]{1,0}}

FileNames
1 "f.py"

%fused (p: f32[2,3], q: s32[]) -> f32[2,3] {
  %p = f32[2,3]{1,0:T(8,128)S(1)} parameter(0)
  %q = s32[]{:T(128)S(6)} parameter(1)
  ROOT %t = f32[2,3]{1,0:T(8,128)} tanh(%p), metadata={op_name="jit(f)/tanh"}
}

ENTRY %main.1 (x: f32[2,3]) -> (f32[2,3], s32[]) {
  %x = f32[2,3]{1,0:T(8,128)} parameter(0)
  %c = s32[] constant(-7)
  %fusion.2 = f32[2,3]{1,0} fusion(%x, %c), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/tanh" stack_frame_id=4}
  %big = (f32[2,3]{1,0}, /*index=1*/(bf16[4]{0:S(1)}, pred[])) custom-call(%x, /*index=1*/%c), \
custom_call_target="a(b)c", backend_config={"x":"(("}
  ROOT %tuple = (f32[2,3]{1,0}, s32[]) tuple(%fusion.2, %c)
}
"""


def test_parse():
    module = parse(TEXT)
    assert module.entry == "main.1" and set(module.computations) == {"fused", "main.1"}
    main, fused = module.computations["main.1"], module.computations["fused"]
    assert list(main) == ["x", "c", "fusion.2", "big", "tuple"]
    assert main.root.name == "tuple" and fused.root.opcode == "tanh"
    fusion, big = main["fusion.2"], main["big"]
    assert (fusion.opcode, fusion.operands, fusion.called("calls")) == ("fusion", ("x", "c"), "fused")
    assert fusion.op_name == "jit(f)/tanh" and fusion.target is None
    assert main["c"].literal == "-7" and main.operand(fusion, 1) is main["c"] and main.operand(fusion, 2) is None
    assert big.target == "a(b)c" and big.operands == ("x", "c")
    assert [(a.dtype, a.shape, a.in_hbm) for a in big.outputs] == [
        ("f32", (2, 3), True), ("bf16", (4,), False), ("pred", (), True)
    ]  # fmt: skip
    assert fused["p"].outputs[0].hbm_bytes == 0 and fused["t"].outputs[0].hbm_bytes == 24


def test_array_sizes():
    sizes = {"s4[10]": [5], "pred[]": [1], "f8e4m3fn[3]": [3], "c64[2]{0}": [16], "token[]": []}
    assert {text: [a.bytes for a in arrays(text)] for text in sizes} == sizes
    assert [a.elements for a in arrays("(f32[2,3]{1,0:T(8,128)S(1)}, s32[])")] == [6, 1]


def test_work_that_is_started_is_work():
    text = """
%slice (s: f32[12,8], i: s32[]) -> f32[1,8] {
  %s = f32[12,8] parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %d = f32[1,8] dynamic-slice(%s, %i, %zero), dynamic_slice_sizes={1,8}
}

ENTRY %main (s: f32[12,8], i: s32[]) -> f32[1,8] {
  %s = f32[12,8] parameter(0)
  %i = s32[] parameter(1)
  %f = ((f32[12,8], s32[]), f32[1,8], u32[]) fusion-start(%s, %i), kind=kLoop, calls=%slice
  ROOT %done = f32[1,8] fusion-done(%f)
}"""
    module = parse(text)
    start = module.computations["main"]["f"]
    assert (start.opcode, [a.shape for a in start.outputs]) == ("fusion", [(1, 8)])
    assert program_cost(module, {"data": 1}).hbm_bytes == 2 * 8 * 4 + 4  # the index is read too


@pytest.mark.parametrize("text", ["", "HloModule empty", "module @jit_f { }"])
def test_what_is_no_hlo_is_refused(text):
    with pytest.raises(ValueError, match="not HLO text"):
        parse(text)


# Loops


def loop(start, step, compare, *, body="add", more=""):
    """A while loop over (counter, limit, data) of the notation that the TPU compiler leaves."""
    return parse(f"""
%body (s: (s32[], s32[], f32[8])) -> (s32[], s32[], f32[8]) {{
  %s = (s32[], s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %step = s32[] constant({step})
  %next = s32[] {body}(%i, %step)
  %limit = s32[] get-tuple-element(%s), index=1
  %x = f32[8] get-tuple-element(%s), index=2
  %y = f32[8] tanh(%x)
  ROOT %out = (s32[], s32[], f32[8]) tuple(%next, %limit, %y)
}}

%cond (s: (s32[], s32[], f32[8])) -> pred[] {{
  %s = (s32[], s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %limit = s32[] get-tuple-element(%s), index=1
  %ten = s32[] constant(10)
  ROOT %less = pred[] {compare}
}}

ENTRY %main (x: f32[8], n: s32[]) -> f32[8] {{
  %x = f32[8] parameter(0)
  %n = s32[] parameter(1)
  %start = s32[] constant({start})
  %twenty = s32[] constant(20)
  {more or "%limit = s32[] copy(%twenty)"}
  %state = (s32[], s32[], f32[8]) tuple(%start, %limit, %x)
  %w = (s32[], s32[], f32[8]) while(%state), condition=%cond, body=%body
  ROOT %out = f32[8] get-tuple-element(%w), index=2
}}""")


def length(module):
    return LoopLengths(module).length(module.computations["main"]["w"], "main")


@pytest.mark.parametrize(
    "start, step, compare, runs",
    [
        (0, 1, "compare(%i, %ten), direction=LT", 10),
        (0, 2, "compare(%i, %ten), direction=LT", 5),
        (0, 3, "compare(%i, %ten), direction=LT", 4),
        (3, 2, "compare(%i, %ten), direction=LT", 4),
        (0, 1, "compare(%i, %ten), direction=LE", 11),
        (0, 5, "compare(%i, %ten), direction=LE", 3),
        (10, 1, "compare(%i, %ten), direction=LT", 0),
        (12, 1, "compare(%i, %ten), direction=LT", 0),
        (30, -1, "compare(%i, %ten), direction=GT", 20),
        (30, -3, "compare(%i, %ten), direction=GE", 7),
        (0, 2, "compare(%i, %ten), direction=NE", 5),
        (0, 1, "compare(%i, %limit), direction=LT", 20),
        (0, 4, "compare(%limit, %i), direction=GT", 5),
        (0, 3, "compare(%i, %ten), direction=NE", None),  # passes 10 by
        (0, -1, "compare(%i, %ten), direction=LT", None),
        (0, 0, "compare(%i, %ten), direction=LT", None),
        (0, 1, "compare(%i, %ten), direction=EQ", None),
    ],
)
def test_lengths_of_counting_loops(start, step, compare, runs):
    assert length(loop(start, step, compare)) == runs


def test_what_does_not_count_has_no_length():
    assert length(loop(1, 2, "compare(%i, %ten), direction=LT", body="multiply")) is None
    assert length(loop(0, 1, "compare(%i, %limit), direction=LT", more="%limit = s32[] copy(%n)")) is None
    assert length(loop(0, 1, "compare(%ten, %limit), direction=LT")) is None
    assert length(loop(0, 1, "custom-call(%i)")) is None


def test_start_and_limit_from_an_outer_loop():
    """The TPU compiler carries the constants of inner loops through the state of outer ones, and fuses the sums."""
    module = parse("""
%sum (a: s32[], b: s32[]) -> s32[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %c = s32[] add(%a, %b)
}

%less (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %c = pred[] compare(%a, %b), direction=LT
}

%inner_body (s: (s32[], s32[], s32[])) -> (s32[], s32[], s32[]) {
  %s = (s32[], s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %limit = s32[] get-tuple-element(%s), index=1
  %two = s32[] get-tuple-element(%s), index=2
  %next = s32[] fusion(%i, %two), kind=kLoop, calls=%sum
  ROOT %out = (s32[], s32[], s32[]) tuple(%next, %limit, %two)
}

%inner_cond (s: (s32[], s32[], s32[])) -> pred[] {
  %s = (s32[], s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %limit = s32[] get-tuple-element(%s), index=1
  ROOT %go = pred[] fusion(%i, %limit), kind=kLoop, calls=%less
}

%outer_body (s: (s32[], s32[], s32[])) -> (s32[], s32[], s32[]) {
  %s = (s32[], s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %eight = s32[] get-tuple-element(%s), index=1
  %two = s32[] get-tuple-element(%s), index=2
  %zero = s32[] constant(0)
  %start = s32[] copy(%zero)
  %state = (s32[], s32[], s32[]) tuple(%start, %eight, %two)
  %inner = (s32[], s32[], s32[]) while(%state), condition=%inner_cond, body=%inner_body
  %handed = s32[] get-tuple-element(%inner), index=1
  ROOT %out = (s32[], s32[], s32[]) tuple(%next, %eight, %two)
}

%outer_cond (s: (s32[], s32[], s32[])) -> pred[] {
  %s = (s32[], s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %limit = s32[] constant(36)
  ROOT %go = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main () -> s32[] {
  %zero = s32[] constant(0)
  %eight = s32[] constant(8)
  %two = s32[] constant(2)
  %state = (s32[], s32[], s32[]) tuple(%zero, %eight, %two)
  %w = (s32[], s32[], s32[]) while(%state), condition=%outer_cond, body=%outer_body
  ROOT %out = s32[] get-tuple-element(%w), index=1
}""")
    lengths = LoopLengths(module)
    assert lengths.length(module.computations["main"]["w"], "main") == 36
    assert lengths.length(module.computations["outer_body"]["inner"], "outer_body") == 4
    assert lengths.value("main", "out") == 8


@pytest.mark.parametrize("topology", ONE_CHIP)
def test_lengths_without_the_compilers_own_count(topology):
    """CPU and GPU programs say how long their loops are; what is found without must agree."""

    def nested(x):
        inner = lambda x: lax.fori_loop(2, 9, lambda i, x: jnp.sin(x + i), x)  # noqa: E731
        return lax.fori_loop(0, 6, lambda i, x: inner(x) * i, x)

    module = compiled(topology, nested, array(8, 128))
    lengths, found = LoopLengths(module), []
    for name, scope in module.computations.items():
        for i in scope.values():
            if i.opcode == "while":
                known = lengths.length(i, name)
                counted = type(i)(**{**vars(i), "attributes": i.attributes.replace("known_trip_count", "hidden")})
                assert lengths.length(counted, name) == known
                found.append(known)
    assert sorted(found) == [6, 7]
