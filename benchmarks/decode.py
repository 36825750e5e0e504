"""Block decode attention: bytes and FLOPs moved, and its speed on this CPU by chunk size and against dense attention.

    python benchmarks/decode.py               everything
    python benchmarks/decode.py roofline      one of: roofline, cpu

roofline  One layer of one step of an 8B model (32 heads, 8 key/value heads, D = 128, bfloat16): 64 slots of up to 4096
          tokens, lengths drawn evenly between none and all, 4 or 8 new tokens a slot, a cache of bfloat16 or of int8
          with scales. `must`: committed and new keys and values, queries and results once, products of visible pairs.
          `kernel`: what the TPU kernel copies and computes by its own schedule, grid steps of 0.35 us included.
          `chunked`: the program that the chip's compiler makes of the plain XLA version, counted in its text, with the
          loop as long as the longest slot needs. Times are bytes and FLOPs at the chip's peaks. No accelerator is used:
          the vector unit's time, and that few query rows fill a matrix unit badly, are left out.
cpu       Chunked attention by chunk size, and dense attention (the oracle), at several fills of the cache, in float32;
          repeats interleaved, medians. Beside the wall time stands the processor time, which other work on the machine
          disturbs less.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from timing import Seconds, in_turn

from tracerl_jax.kernels.decode import KVCache
from tracerl_jax.kernels.decode.chunked import CHUNK, chunked_decode_attention
from tracerl_jax.kernels.decode.pallas_tpu import MAX_TILE, STEP_BYTES, _power_of_two, _schedule
from tracerl_jax.kernels.decode.reference import reference_decode_attention
from tracerl_jax.kernels.dispatch import target_platform
from tracerl_jax.plan.chips import CHIPS
from tracerl_jax.plan.hlo import parse
from tracerl_jax.plan.hlo_cost import Cost, program_cost
from tracerl_jax.plan.topology import compile_devices, missing_compiler

SLOTS, CAPACITY = 64, 4096
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
TOPOLOGIES = {"v5p": "v5p:1x1x1", "v6e": "v6e:1x1", "h100": "h100:1"}
CORES = {"v5p": 2, "v6e": 1}
STEP_SECONDS = 0.35e-6  # fixed cost of a grid step
CACHES = {"bfloat16": jnp.bfloat16, "int8": jnp.int8}
SCALE_BYTES = {"bfloat16": 0, "int8": 4}  # of a token and head


def token_bytes(store: str) -> int:
    """Keys and values of a committed token, with their scales."""
    return 2 * KV_HEADS * (HEAD_DIM * jnp.dtype(CACHES[store]).itemsize + SCALE_BYTES[store])


def least(lengths: np.ndarray, Q: int, store: str) -> tuple[float, float]:
    """(FLOPs, bytes) that the step cannot do without."""
    pairs = Q * int(lengths.sum()) + SLOTS * Q * Q
    new = SLOTS * Q * 2 * (HEADS + KV_HEADS) * HEAD_DIM * 2  # queries and results, keys and values
    return 4 * HEADS * HEAD_DIM * pairs, int(lengths.sum()) * token_bytes(store) + new


def kernel_work(lengths: np.ndarray, Q: int, store: str, cores: int) -> tuple[float, float, int]:
    """(FLOPs, bytes, grid steps of the busiest core) of the TPU kernel."""
    kv_bytes = 2 * KV_HEADS * HEAD_DIM * jnp.dtype(CACHES[store]).itemsize
    tile = _power_of_two(STEP_BYTES // kv_bytes, 128, MAX_TILE)
    schedule = list_steps(lengths, np.arange(SLOTS)[:, None], tile, CAPACITY // tile, 1, cores)
    source = np.asarray(schedule.source).reshape(cores, -1)[:, : int(schedule.bound)]
    copies = cores + np.count_nonzero(np.diff(source, axis=1))
    tiles = int((-(-lengths // tile)).sum())
    rows = Q * HEADS // KV_HEADS
    # The intervals of the new tokens, two numbers a row, are padded to the 128 lanes of a register.
    _, new = least(0 * lengths, Q, store)
    moved = copies * tile * token_bytes(store) + new + SLOTS * rows * 128 * 4
    return 4 * HEADS * HEAD_DIM * Q * (tiles * tile + SLOTS * Q), moved, int(schedule.bound)


list_steps = jax.jit(_schedule, static_argnums=(2, 3, 4, 5))


def chunked_work(chip: str, Q: int, store: str, longest: int) -> Cost:
    """Of the compiled program, its loop run for a slot of `longest` tokens."""
    device = compile_devices(TOPOLOGIES[chip])[0]

    def spec(shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    kv = spec((2, SLOTS, KV_HEADS, CAPACITY, HEAD_DIM), CACHES[store])  # two layers: one must be picked
    scale = spec(kv.shape[:-1], jnp.float32) if store == "int8" else None
    new = spec((SLOTS, Q, KV_HEADS, HEAD_DIM))
    args = (spec((SLOTS, Q, HEADS, HEAD_DIM)), KVCache(kv, kv, scale, scale), spec((), jnp.int32), new, new,
            spec((SLOTS,), jnp.int32), spec((SLOTS, Q, 2), jnp.int32))  # fmt: skip
    chunk = CHUNK[target_platform(device)]
    traced = jax.jit(partial(chunked_decode_attention, chunk=chunk)).trace(*args)
    module = parse(traced.lower(lowering_platforms=(CHIPS[chip].platform,)).compile().as_text())
    (loop,) = program_cost(module, {}).unknown_loops
    return program_cost(module, {}, loops={loop: -(-longest // chunk)})


def report_roofline() -> None:
    lengths = np.random.default_rng(0).integers(0, CAPACITY + 1, SLOTS).astype(np.int32)
    print(f"{SLOTS} slots of {CAPACITY} tokens, on average {lengths.mean():.0f} committed, at most {lengths.max()}; "
          f"one layer, {HEADS}/{KV_HEADS} heads of {HEAD_DIM}; times in us")  # fmt: skip
    columns = f"{'MiB':>8}{'GFLOP':>7}{'bytes':>7}{'FLOPs':>7}"
    print(f"{'':19}{'must':>8}{'':21}{'kernel':>8}{'':42}{'chunked':>8}")
    print(f"{'':6}{'cache':10}{'Q':>3}{columns}{columns}{'grid steps':>14}{'sum':>7}{columns}")
    for name in TOPOLOGIES:
        chip = CHIPS[name]
        for store in CACHES:
            for Q in (4, 8):
                flops, moved = least(lengths, Q, store)
                line = f"{name:6}{store:10}{Q:>3}{figures(flops, moved, name)}"
                if name in CORES:
                    flops, moved, steps = kernel_work(lengths, Q, store, CORES[name])
                    fixed = steps * STEP_SECONDS
                    total = max(flops / chip.flops, moved / chip.hbm_bandwidth) + fixed
                    line += f"{figures(flops, moved, name)}{steps:>7}{fixed * 1e6:>7.0f}{total * 1e6:>7.0f}"
                else:
                    line += f"{'':50}"
                if missing := missing_compiler(chip.platform):
                    line += f"  {missing}"
                else:
                    cost = chunked_work(name, Q, store, int(lengths.max()))
                    line += figures(cost.flops, cost.hbm_bytes, name)
                print(line, flush=True)


def figures(flops: float, moved: float, name: str) -> str:
    chip = CHIPS[name]
    return (f"{moved / 2**20:>8.0f}{flops / 1e9:>7.1f}{moved / chip.hbm_bandwidth * 1e6:>7.0f}"
            f"{flops / chip.flops * 1e6:>7.0f}")  # fmt: skip


def report_cpu(repeats: int) -> None:
    N, Q, S, H, K, D = 8, 4, 2048, 8, 4, 64
    keys = jax.random.split(jax.random.key(0), 5)
    q = jax.random.normal(keys[0], (N, Q, H, D))
    new = [jax.random.normal(key, (N, Q, K, D)) for key in keys[1:3]]
    cache = KVCache(*(jax.random.normal(key, (2, N, K, S, D)) for key in keys[3:]))
    sees_all = jnp.broadcast_to(jnp.array([0, Q], jnp.int32), (N, Q, 2))
    programs = {"dense": jax.jit(reference_decode_attention)}
    for chunk in (64, 128, 256, 512):
        programs[chunk] = jax.jit(partial(chunked_decode_attention, chunk=chunk))
    print(f"\n{jax.devices()[0].device_kind}, fp32, {N} slots of {S} tokens, {Q} new ones, {H}/{K} heads of {D}; "
          f"ms, median of {repeats}")  # fmt: skip
    print(f"{'committed':>10}{'':10}" + "".join(f"{name:>9}" for name in programs))
    for share in (1 / 8, 1 / 4, 1 / 2, 1):
        lengths = np.linspace(0.5, 1, N) * share * S  # the longest slot has this share
        args = (q, cache, jnp.int32(1), *new, jnp.asarray(lengths, jnp.int32), sees_all)
        expected = programs["dense"](*args)
        for program in programs.values():
            np.testing.assert_allclose(program(*args), expected, atol=1e-5)
        times = in_turn({name: partial(program, *args) for name, program in programs.items()}, repeats)
        for kind in Seconds._fields:
            row = "".join(f"{getattr(found, kind) * 1e3:>9.2f}" for found in times.values())
            print(f"{f'{share:.3f} of S' if kind == 'wall' else '':>10}{kind:>10}{row}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("roofline", "cpu"))
    parser.add_argument("--repeats", type=int, default=31)
    args = parser.parse_args()
    if args.part in (None, "roofline"):
        report_roofline()
    if args.part in (None, "cpu"):
        report_cpu(args.repeats)


if __name__ == "__main__":
    main()
