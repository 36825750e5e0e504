"""The fused head: bytes and FLOPs moved, and its time and memory on this CPU beside the dense oracle.

    python benchmarks/logprob.py               everything
    python benchmarks/logprob.py roofline      one of: roofline, cpu

roofline  P tokens against the head of an 8B model, bfloat16 [4096, 151936]: `token_logprobs` forward and backward, and
          `sample_tokens` with noise. `must`: every operand and result once, and the products that are needed when no
          [P, V] array is kept (forward 1, backward 3: the logits again). `compiled`: what the chip's compiler makes of
          the XLA version, counted in its text with every window of the vocabulary; whether the logits of a window (or
          their gradient) stay on the chip; what the program allocates; and, for a TPU, its compiler's own estimate:
          cycles of all operations one after another, vector unit included, at 1.75 GHz. No accelerator is used. Takes
          a few minutes.
cpu       The windowed version and the oracle, which holds [P, V]: seconds, median of interleaved repeats, and what the
          compiled programs allocate besides arguments and results.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from timing import in_turn

from tracerl_jax.kernels.logprob import sample_tokens, token_logprobs
from tracerl_jax.plan.chips import CHIPS
from tracerl_jax.plan.hlo import Module, parse
from tracerl_jax.plan.hlo_cost import program_cost
from tracerl_jax.plan.hlo_loops import LoopLengths
from tracerl_jax.plan.topology import compile_devices, missing_compiler

E, V = 4096, 151_936
Q = 4  # tokens of a slot: sample_tokens takes [P / Q, Q, E]
TOPOLOGIES = {"v5p": "v5p:1x1x1", "v6e": "v6e:1x1", "h100": "h100:1"}
CLOCK = 1.75e9  # of the TPUs, per second
ROWS = {"draws": (256, 1024, 4096), "forward": (256, 1024, 8192), "backward": (1024, 8192)}
PRODUCTS = {"draws": 1, "forward": 1, "backward": 3}


def must_bytes(program: str, P: int) -> int:
    """bfloat16 matrices; of the numbers per row only the backward's two gradients matter, being matrices too."""
    return (2 if program == "backward" else 1) * 2 * (P * E + E * V)


def draw(hidden, kernel, words, banned, temperature, implementation=None):
    keys = jax.random.wrap_key_data(words, impl="threefry2x32")
    return sample_tokens(hidden, kernel, keys, banned, temperature, use_entropy=False, implementation=implementation)


def pull_of(hidden, kernel, targets):
    """The gradient of `token_logprobs` at these arguments, with what it keeps of the forward pass."""
    return jax.vjp(lambda hidden, kernel: token_logprobs(hidden, kernel, targets), hidden, kernel)[1]


def traced(program: str, P: int, device: jax.Device):
    def spec(shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    if program == "draws":
        rows = (spec((P // Q, 2), jnp.uint32), spec((V,), bool), spec((P // Q,), jnp.float32))
        return jax.jit(draw).trace(spec((P // Q, Q, E)), spec((E, V)), *rows)
    args = spec((P, E)), spec((E, V)), spec((P,), jnp.int32)
    if program == "forward":
        return jax.jit(token_logprobs).trace(*args)
    pull = jax.tree.map(lambda x: spec(x.shape, x.dtype), jax.eval_shape(pull_of, *args))
    per_row = spec((P,), jnp.float32)
    return jax.jit(lambda pull, *cotangents: pull(cotangents)).trace(pull, per_row, per_row)


def estimated_cycles(module: Module) -> float:
    """The TPU compiler's estimate, loop bodies as often as they run."""
    lengths = LoopLengths(module)

    def of(name: str) -> float:
        total = 0.0
        for i in module.computations[name].values():
            if i.opcode == "while":
                total += (lengths.length(i, name) or 1) * of(i.called("body"))
            else:
                total += float(i.attribute(r'"estimated_cycles":"(\d+)"') or 0)
        return total

    return of(module.entry)


def window_place(module: Module, P: int) -> str:
    """Where the compiler keeps a window of logits, or of their gradient, between two operations."""
    windows = [a for scope in module.computations.values() for i in scope.values() if i.opcode == "fusion"
               for a in i.outputs if a.dtype in ("f32", "bf16") and a.elements > P * 512 and a.elements != P * E
               and (P in a.shape or {P // Q, Q} <= set(a.shape))]  # fmt: skip
    return ("HBM" if any(a.in_hbm for a in windows) else "on chip") if windows else "-"


def report_roofline() -> None:
    print(f"[P, {E}] x [{E}, {V}], bfloat16; times in ms")
    print(f"{'':21}{'must':>8}{'':18}{'compiled':>14}")
    print(f"{'':6}{'':9}{'P':>6}{'GiB':>8}{'bytes':>9}{'FLOPs':>9}{'GiB':>14}{'ratio':>7}{'bytes':>9}{'FLOPs':>9}"
          f"{'window':>9}{'MiB':>6}{'estimate':>10}")  # fmt: skip
    for name, topology in TOPOLOGIES.items():
        chip = CHIPS[name]
        if missing := missing_compiler(chip.platform):
            print(f"{name:6}{missing}")
            continue
        for program, rows in ROWS.items():
            for P in rows:
                must, flops = must_bytes(program, P), PRODUCTS[program] * 2 * P * E * V
                compiled = traced(program, P, compile_devices(topology)[0]).lower(lowering_platforms=(chip.platform,))
                compiled = compiled.compile()
                module = parse(compiled.as_text())
                cost = program_cost(module, {})
                estimate = f"{estimated_cycles(module) / CLOCK * 1e3:>10.2f}" if chip.platform == "tpu" else ""
                print(f"{name:6}{program:9}{P:>6}{must / 2**30:>8.2f}{must / chip.hbm_bandwidth * 1e3:>9.2f}"
                      f"{flops / chip.flops * 1e3:>9.2f}{cost.hbm_bytes / 2**30:>14.2f}{cost.hbm_bytes / must:>7.2f}"
                      f"{cost.hbm_bytes / chip.hbm_bandwidth * 1e3:>9.2f}{cost.flops / chip.flops * 1e3:>9.2f}"
                      f"{window_place(module, P):>9}{compiled.memory_analysis().temp_size_in_bytes / 2**20:>6.0f}"
                      f"{estimate}", flush=True)  # fmt: skip


def report_cpu(repeats: int) -> None:
    P, E = 128, 256
    rng = jax.random.split(jax.random.key(0), 4)
    hidden, kernel = jax.random.normal(rng[0], (P, E)), jax.random.normal(rng[1], (E, V)) * E**-0.5
    targets = jax.random.randint(rng[2], (P,), 0, V)
    cotangents = jax.random.normal(rng[3], (2, P))
    rows = (jax.random.bits(rng[3], (P // Q, 2)), jnp.arange(V) >= V - 3, jnp.ones(P // Q))

    def gradients(hidden, kernel, implementation):
        def run(hidden, kernel):
            return token_logprobs(hidden, kernel, targets, implementation=implementation)

        out, pull = jax.vjp(run, hidden, kernel)
        return out, pull(tuple(cotangents))

    calls = {
        "forward": (token_logprobs, (hidden, kernel, targets)),
        "with gradient": (gradients, (hidden, kernel)),
        "draws": (draw, (hidden.reshape(-1, Q, E), kernel, *rows)),
    }
    print(f"\n{jax.devices()[0].device_kind}, fp32, [{P}, {E}] x [{E}, {V}]; median of {repeats}")
    print(f"{'':14}{'dense s':>9}{'windows s':>11}{'ratio':>7}{'processor':>11}{'dense MiB':>11}{'windows MiB':>13}")
    for name, (run, args) in calls.items():
        programs = {implementation: jax.jit(partial(run, implementation=implementation)).lower(*args).compile()
                    for implementation in ("reference", "chunked")}  # fmt: skip
        dense, windows = (program(*args) for program in programs.values())
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-4), windows, dense)
        calls = {implementation: partial(program, *args) for implementation, program in programs.items()}
        (slow, spent), (fast, saved) = in_turn(calls, repeats).values()
        large, small = (p.memory_analysis().temp_size_in_bytes / 2**20 for p in programs.values())
        print(f"{name:14}{slow:>9.3f}{fast:>11.3f}{slow / fast:>7.2f}{spent / saved:>11.2f}"
              f"{large:>11.0f}{small:>13.0f}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("roofline", "cpu"))
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.part in (None, "roofline"):
        report_roofline()
    if args.part in (None, "cpu"):
        report_cpu(args.repeats)


if __name__ == "__main__":
    main()
