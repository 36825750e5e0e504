"""Two-interval attention: tiles computed, bytes and FLOPs moved, and its speed on this CPU against dense attention.

    python benchmarks/attention.py               everything
    python benchmarks/attention.py tiles         one of: tiles, roofline, cpu

Rows are packs of replayed random traces (prompts of 64 to 256 tokens, responses of log-normal length, 2.6 tokens per
denoise step).

tiles     Query-key pairs computed per visible pair. `square`: tiles of one size, each computed if it holds a visible
          pair. `kernel`: the TPU kernel, 128-tiles visited two at a time. `splash`: the tiles that JAX's splash
          attention visits; `own` if every row had its mask compiled in, `shared` with one static mask for these rows
          (their union), which the next pack would not fit, `causal` with the mask that fits every pack. Its own count
          is compared with ours at 2048 tokens; beyond, its preparation of a mask takes minutes.
roofline  Of one row of 8192 tokens of an 8B model (32 heads, 8 key/value heads, D = 128, bfloat16), forward and
          backward: what has to be moved and computed, what the kernel moves and computes with the vector memory of the
          chip, and by which tile size the time is least, grid steps of 0.35 us included. All by arithmetic: no
          accelerator is used, and the time of the vector unit (the softmax) is left out.
cpu       Chunked attention against jax.nn.dot_product_attention with the mask of the same rows, forward and backward,
          repeats interleaved, medians; memory is what the compiled program allocates besides arguments and results.
          The ratios are of wall time and of processor time, which other work on the machine disturbs less.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask, splash_attention_mask_info
from timing import in_turn

from tracerl_jax.diffusion.packing import pack
from tracerl_jax.diffusion.replay import trace_item
from tracerl_jax.kernels.attention import attention
from tracerl_jax.kernels.attention.masks import live_tiles, visible_keys
from tracerl_jax.kernels.attention.tpu_tiles import TILE, Plan, fetched_windows, make_plan, tile_lists
from tracerl_jax.plan.chips import CHIPS
from tracerl_jax.plan.workload import Workload, sample_traces

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
VMEM = {"v5p": 64 * 2**20, "v6e": 128 * 2**20}  # bytes of a core
CORES = {"v5p": 2, "v6e": 1}
STEP_SECONDS = 0.35e-6  # fixed cost of a grid step


def packed_intervals(T: int, B: int, rows: int, seed: int = 0) -> np.ndarray:
    """[rows,T,4] of traces whose responses have a median of T / 8 tokens."""
    rng, items, room = np.random.default_rng(seed), [], 2 * rows * T
    while room > 0:
        prompt, response = rng.integers(64, 257), np.clip(rng.lognormal(np.log(T / 8), 0.6), 16, T // 3)
        trace = sample_traces(Workload(int(prompt), int(response)), 1, block_size=B, temperature=1.0,
                              seed=int(rng.integers(2**31)))[0]  # fmt: skip
        item = trace_item(trace.prompt_ids, trace.ids, trace.step_map, block_size=B, mask_id=0)
        if item.size <= T:
            items.append(item)
            room -= item.size
    return pack(items, row_length=T).intervals[:rows]


def visible_count(intervals: np.ndarray) -> int:
    s1, e1, s2, e2 = np.moveaxis(intervals.astype(np.int64), -1, 0)
    return int((np.maximum(e1 - s1, 0) + np.maximum(e2 - s2, 0)).sum())


count_live = jax.jit(live_tiles, static_argnums=(1, 2, 3))
list_tiles = jax.jit(tile_lists, static_argnums=1)


def square_pairs(intervals: np.ndarray, tile: int) -> int:
    return int(count_live(intervals, tile, tile, intervals.shape[1] // tile).sum()) * tile**2


class RowsMask(splash_attention_mask.Mask):
    """What any of the rows sees, made slice by slice."""

    def __init__(self, intervals: np.ndarray):
        self.intervals = intervals

    @property
    def shape(self) -> tuple[int, int]:
        return (self.intervals.shape[1],) * 2

    def __getitem__(self, index) -> np.ndarray:
        queries, keys = index
        s1, e1, s2, e2 = np.moveaxis(self.intervals[:, queries], -1, 0)[..., None]
        key = np.arange(self.shape[1])[keys]
        return (((key >= s1) & (key < e1)) | ((key >= s2) & (key < e2))).any(0)


def union_pairs(intervals: np.ndarray, tile: int) -> int:
    """Pairs of the tiles in which any of the rows sees a key: what splash visits for one mask of all of them."""
    T = intervals.shape[1]
    count = int(count_live(intervals, tile, tile, T // tile).any(0).sum())
    if T == 2048:
        heads = splash_attention_mask.MultiHeadMask([RowsMask(intervals)])
        info, _ = splash_attention_mask_info.process_mask(heads, (tile, tile))
        assert np.count_nonzero(info.block_mask) == count
    return count * tile**2


def report_tiles() -> None:
    print("computed / visible query-key pairs")
    print(f"{'':>6}{'':>4}{'visible':>9}{'square tiles of':>28}{'kernel':>9}{'splash, 128-tiles':>26}{'512-tiles':>20}")
    print(f"{'T':>6}{'B':>4}{'of T*T':>9}" + "".join(f"{t:>7}" for t in (64, 128, 256, 512)) + f"{'':>9}"
          + f"{'own':>10}{'shared':>8}{'causal':>8}{'own':>6}{'shared':>7}{'causal':>7}")  # fmt: skip
    for T in (2048, 8192, 32768):
        for B in (4, 16):
            intervals = packed_intervals(T, B, rows=4 if T < 32768 else 2)
            visible = visible_count(intervals)
            N = len(intervals)
            ratios = [square_pairs(intervals, tile) / visible for tile in (64, 128, 256, 512)]
            plan = forward_plan(T, VMEM["v5p"])
            kernel = int(list_tiles(intervals, plan)[..., 0].sum()) * plan.visit * TILE**2 / visible
            splash = []
            for tile in (128, 512):
                causal = T // tile * (T // tile + 1) // 2 * tile**2
                splash += [sum(union_pairs(row[None], tile) for row in intervals) / visible,
                           N * union_pairs(intervals, tile) / visible, N * causal / visible]  # fmt: skip
            print(f"{T:>6}{B:>4}{visible / N / T**2:>9.3f}" + "".join(f"{r:>7.2f}" for r in ratios) + f"{kernel:>9.2f}"
                  + "{:>10.2f}{:>8.2f}{:>8.2f}{:>6.2f}{:>7.2f}{:>7.2f}".format(*splash), flush=True)  # fmt: skip


def forward_plan(T: int, vmem: int) -> Plan:
    shape = (T, T, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)
    return make_plan(shape, vmem=vmem, query_bytes=12, key_bytes=8, itemsize=2)


def backward_plan(T: int, vmem: int) -> Plan:
    shape = (T, T, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)
    return make_plan(shape, vmem=vmem, query_bytes=20, key_bytes=24, itemsize=2)


def moved_bytes(intervals: np.ndarray, forward: Plan, backward: Plan) -> tuple[float, float]:
    """What the kernels copy of one row, forward and backward."""
    T = intervals.shape[1]
    queries, keys = T * HEADS * HEAD_DIM * 2, T * KV_HEADS * HEAD_DIM * 2
    per_query = T * HEADS * 4  # log-sum-exp
    lists = list_tiles(intervals, forward)
    fetched = np.asarray(fetched_windows(lists))[0]
    copies = 1 + np.count_nonzero(np.diff(fetched))
    window = 2 * KV_HEADS * forward.window * TILE * HEAD_DIM * 2
    if forward.windows == 1:
        copies = 1
    side = KV_HEADS // forward.heads * (T * 16 + 4 * lists.size)  # intervals and lists, for every group of heads
    ahead = 2 * queries + per_query + copies * window + side
    # Every window walks the queries; with several windows their d_q is summed in fp32 outside (read, read, write).
    passes = backward.windows
    d_q = queries if passes == 1 else passes * 4 * 2 * queries
    side = KV_HEADS // backward.heads * (passes * T * 16 + 4 * list_tiles(intervals, backward).size)
    return ahead, passes * (2 * queries + 2 * per_query) + d_q + 4 * keys + side


def report_roofline() -> None:
    T = 8192
    intervals = packed_intervals(T, 4, rows=1)
    visible = visible_count(intervals)
    queries, keys = T * HEADS * HEAD_DIM * 2, T * KV_HEADS * HEAD_DIM * 2
    # Forward: q, k, v in; out, log-sum-exp out. Backward: those, d_out and mean in; d_q, d_k, d_v out.
    per_query = T * HEADS * 4
    least = {
        "forward": (2 * queries + 2 * keys + per_query, 4),
        "backward": (3 * queries + 4 * keys + 2 * per_query, 10),
    }
    print(f"\none row, T = {T}, B = 4, {HEADS}/{KV_HEADS} heads of {HEAD_DIM}, bfloat16; ms")
    print(f"{'':6}{'':10}{'must GFLOP':>11}{'MiB':>7}{'FLOPs':>8}{'bytes':>8}{'kernel GFLOP':>14}{'MiB':>7}{'steps':>7}"
          f"{'FLOPs':>8}{'bytes':>8}{'steps':>8}{'sum':>8}")  # fmt: skip
    for name in ("v5p", "v6e", "h100"):
        chip = CHIPS[name]
        for direction, (bytes_, flops_per_lane) in least.items():
            flops = visible * HEADS * HEAD_DIM * flops_per_lane
            line = (f"{name:6}{direction:10}{flops / 1e9:>11.0f}{bytes_ / 2**20:>7.0f}{flops / chip.flops * 1e3:>8.2f}"
                    f"{bytes_ / chip.hbm_bandwidth * 1e3:>8.2f}")  # fmt: skip
            if name in VMEM:
                plans = forward_plan(T, VMEM[name]), backward_plan(T, VMEM[name])
                plan = plans[direction == "backward"]
                moved = moved_bytes(intervals, *plans)[direction == "backward"]
                computed = int(list_tiles(intervals, plan)[..., 0].sum()) * plan.visit * TILE**2
                steps = KV_HEADS // plan.heads * plan.blocks * plan.windows
                work = computed * HEADS * HEAD_DIM * flops_per_lane
                times = work / chip.flops, moved / chip.hbm_bandwidth, steps / CORES[name] * STEP_SECONDS
                times += (max(times[:2]) + times[2],)
                line += f"{work / 1e9:>14.0f}{moved / 2**20:>7.0f}{steps:>7}"
                line += "".join(f"{t * 1e3:>8.2f}" for t in times)
            print(line)
    print(
        "\nforward, ms by tile size: with one tile of one key/value head in a grid step, and with the kernel's blocks"
    )
    print(f"{'':6}{'tile':>6}{'computed / visible':>20}{'FLOPs':>8}{'one tile a step':>17}{'blocks':>8}")
    for name in VMEM:
        chip, plan = CHIPS[name], forward_plan(T, VMEM[name])
        for tile in (64, 128, 256, 512):
            pairs = square_pairs(intervals, tile)
            # Of a smaller tile's 128 lanes some do nothing.
            compute = pairs * HEADS * HEAD_DIM * 4 / chip.flops * max(1, 128 / tile)
            steps = pairs / tile**2 * KV_HEADS / CORES[name]
            blocks = KV_HEADS * plan.blocks * plan.windows / CORES[name]
            print(f"{name:6}{tile:>6}{pairs / visible:>20.2f}{compute * 1e3:>8.2f}"
                  f"{(compute + steps * STEP_SECONDS) * 1e3:>17.2f}"
                  f"{(compute + blocks * STEP_SECONDS) * 1e3:>8.2f}")  # fmt: skip


def dense(q: jax.Array, k: jax.Array, v: jax.Array, intervals: jax.Array) -> jax.Array:
    mask = visible_keys(intervals, jnp.arange(k.shape[1]))[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask)


def report_cpu(repeats: int) -> None:
    H, K, D = 8, 4, 64
    print(f"\n{jax.devices()[0].device_kind}, fp32, {H}/{K} heads of {D}, forward and backward, median of {repeats}")
    print(f"{'T':>6}{'B':>4}{'dense s':>9}{'chunked s':>11}{'ratio':>7}{'processor':>11}{'dense MiB':>11}"
          f"{'chunked MiB':>13}{'bytes/token':>13}")  # fmt: skip
    for T in (1536, 4096):
        for B in (4, 16):
            intervals = jnp.asarray(packed_intervals(T, B, rows=1))
            keys = jax.random.split(jax.random.key(0), 4)
            q, k, v, d_out = (jax.random.normal(key, (1, T, h, D)) for key, h in zip(keys, (H, K, K, H), strict=True))
            programs = {}
            for name, run in {"dense": dense, "chunked": partial(attention, implementation="chunked")}.items():

                def gradients(q, k, v, d_out, intervals, run=run):
                    out, pull = jax.vjp(lambda *qkv: run(*qkv, intervals), q, k, v)
                    return out, *pull(d_out)

                programs[name] = jax.jit(gradients).lower(q, k, v, d_out, intervals).compile()
            seen = np.asarray(intervals[..., 1] > 0)  # a query without keys is zeros here and a mean in JAX
            d_seen = jnp.where(seen[..., None, None], d_out, 0)
            results = [program(q, k, v, d_seen, intervals) for program in programs.values()]
            np.testing.assert_allclose(*(np.asarray(r[0])[seen] for r in results), atol=1e-5)
            for a, b in zip(*(r[1:] for r in results), strict=True):
                np.testing.assert_allclose(a, b, atol=1e-4)
            calls = {name: partial(program, q, k, v, d_out, intervals) for name, program in programs.items()}
            (slow, spent), (fast, saved) = in_turn(calls, repeats).values()
            large, small = (p.memory_analysis().temp_size_in_bytes for p in programs.values())
            print(f"{T:>6}{B:>4}{slow:>9.3f}{fast:>11.3f}{slow / fast:>7.1f}{spent / saved:>11.1f}"
                  f"{large / 2**20:>11.1f}{small / 2**20:>13.1f}{small / T:>13.0f}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("tiles", "roofline", "cpu"))
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.part in (None, "tiles"):
        report_tiles()
    if args.part in (None, "roofline"):
        report_roofline()
    if args.part in (None, "cpu"):
        report_cpu(args.repeats)


if __name__ == "__main__":
    main()
