"""One policy update, forward and backward, on packed rows and on the reference's one row per replay round.

    python benchmarks/update.py                      B = 4
    python benchmarks/update.py --block_size 16
    python benchmarks/update.py --dense              also one row per round with dense attention

Both layouts train on the same targets of the same random traces, in one jitted call each, with the same attention op
and the log-prob head at the targets only; the losses are compared before anything is timed. Repeats are interleaved and
their medians reported, so that other work on the machine hits both layouts. FLOPs are counted by hand: matrix products
and visible query-key pairs, backward twice the forward, no recomputation. (XLA's own count takes the body of a loop
once, so it is of no use for scanned layers.) Memory is what the compiled program allocates besides its arguments and
results.
"""

import argparse
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from timing import in_turn

from tracerl_jax.diffusion.grid import round_up
from tracerl_jax.diffusion.packing import PackedRows, pack
from tracerl_jax.diffusion.replay import trace_item
from tracerl_jax.diffusion.rounds import round_rows, trace_states
from tracerl_jax.models import Model, ModelConfig
from tracerl_jax.plan.workload import random_steps
from tracerl_jax.rl.logprobs import packed_logprobs
from tracerl_jax.rl.objectives import policy_loss

ROW_MULTIPLE = 32


def flops(config: ModelConfig, rows: PackedRows) -> float:
    """Of one forward and backward pass over all tokens that are not padding."""
    c = config
    s1, e1, s2, e2 = np.moveaxis(rows.intervals.astype(np.int64), -1, 0)
    pairs = (np.maximum(e1 - s1, 0) + np.maximum(e2 - s2, 0)).sum()
    projections = 2 * c.width * c.head_dim * (c.num_heads + c.num_kv_heads) + 3 * c.width * c.mlp_width
    layer = 2 * projections * rows.token_count + 4 * c.num_heads * c.head_dim * pairs
    return 3 * (c.num_layers * layer + 2 * c.width * c.vocab_size * rows.target_count)


def matmul_peak(n: int = 2048) -> float:
    """Best measured fp32 FLOP/s of a square matrix product on this machine."""
    product, x = jax.jit(jnp.dot), jnp.ones((n, n))
    product(x, x).block_until_ready()
    return max(2 * n**3 / seconds(partial(product, x, x)) for _ in range(5))


def seconds(call) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def compile_update(model: Model, params, rows: PackedRows, old: list, advantages: list):
    """The compiled program and a call of it: (loss, gradient)."""

    def update(params, rows, old, advantages):
        def loss(params):
            logp, _ = packed_logprobs(model, params, rows)
            return policy_loss(logp, old, advantages, rows.target_weight, clip_low=0.2, clip_high=0.2, kl_coef=0.01)[0]

        return jax.value_and_grad(loss)(params)

    arguments = jax.device_put((params, rows, rows.gather(old), rows.gather(advantages)))
    program = jax.jit(update).lower(*arguments).compile()
    return program, partial(program, *arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--block_size", type=int, default=4)
    flag("--tokens_per_step", type=float, default=2.6)
    flag("--prompt", type=int, default=128, help="tokens")
    flag("--response", type=int, default=512, help="tokens, a multiple of the block size")
    flag("--responses", type=int, default=1, help="in one update")
    flag("--repeats", type=int, default=5)
    flag("--dense", action="store_true", help="time dense attention on one row per round too")
    flag("--seed", type=int, default=0)
    args = parser.parse_args()

    B, mask_id = args.block_size, 31999
    config = ModelConfig(vocab_size=32000, width=512, num_layers=8, num_heads=8, num_kv_heads=4, head_dim=64,
                         mlp_width=1536, block_size=B, mask_token_id=mask_id, attention="chunked")  # fmt: skip
    rng = np.random.default_rng(args.seed)
    prompts = list(rng.integers(0, mask_id, (args.responses, args.prompt)))
    ids = list(rng.integers(0, mask_id, (args.responses, args.response)))
    steps = [random_steps(rng, args.response, B, args.tokens_per_step) for _ in ids]
    items = [trace_item(p, x, s, block_size=B, mask_id=mask_id) for p, x, s in zip(prompts, ids, steps, strict=True)]
    states = [trace_states(args.prompt, s, block_size=B, alignment="absolute") for s in steps]
    packed = pack(items, row_length=round_up(sum(item.size for item in items), ROW_MULTIPLE))
    rounds = round_rows(prompts, ids, states, block_size=B, mask_id=mask_id, pad_id=0, alignment="absolute")
    layouts = {"packed": (config, packed), "one row per round": (config, rounds)}
    if args.dense:
        layouts["the same, dense attention"] = (config.replace(attention="reference"), rounds)

    params = Model(config).init(jax.random.key(args.seed))
    old = [rng.normal(-10.4, 0.2, args.response) for _ in ids]
    advantages = [rng.normal(size=args.response) for _ in ids]
    programs = {
        name: compile_update(Model(c), params, rows, old, advantages) for name, (c, rows) in layouts.items()
    }
    losses = [float(call()[0]) for _, call in programs.values()]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-4)
    times = in_turn({name: call for name, (_, call) in programs.items()}, args.repeats)
    peak = matmul_peak()

    per_step = args.response * args.responses / sum(s.max() for s in steps)
    print(
        f"{jax.devices()[0].device_kind}, fp32, best matmul {peak / 1e9:.0f} GFLOP/s; B {B}, {per_step:.2f} tokens per "
        f"step, {args.responses} x ({args.prompt} + {args.response}) tokens, median of {args.repeats}"
    )
    head = f"{'':27}{'rows':>6}{'tokens':>8}{'fill':>6}{'targets':>9}{'TFLOP':>8}"
    print(f"{head}{'memory MiB':>12}{'seconds':>9}{'of peak':>9}{'ratio':>7}")
    fastest = times["packed"].wall
    for name, (c, rows) in layouts.items():
        middle, work = times[name].wall, flops(c, rows)
        memory = programs[name][0].memory_analysis().temp_size_in_bytes / 2**20
        print(f"{name:27}{len(rows.ids):>6}{rows.token_count:>8}{rows.token_count / rows.ids.size:>6.0%}"
              f"{rows.target_count:>9}{work / 1e12:>8.3f}{memory:>12.0f}{middle:>9.2f}{work / middle / peak:>9.0%}"
              f"{middle / fastest:>7.2f}")


if __name__ == "__main__":
    main()
