"""Replay rows of full attention: what the host makes and sends, and what it would with every state written out.

    python benchmarks/replay_rows.py --shrink 8        Dream's published canvas: block 32, responses of up to 1024

Written out, a row is ids, positions and intervals [T] and target slots of a quarter of T. Time is of the host's process
for all rows of an update; the device's part is inside the programs that train and is not in it.
"""

import argparse
import statistics
import time

import jax
import numpy as np

from tracerl_jax.diffusion.packing import TARGET_STEPS_PER_ROW, TARGETS, pack
from tracerl_jax.diffusion.replay import trace_item
from tracerl_jax.plan.workload import random_steps

BLOCK, MASK = 32, 151666


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--responses", type=int, default=16)
    flag("--prompt", type=int, default=256, help="tokens of the longest prompt")
    flag("--response", type=int, default=1024, help="tokens")
    flag("--tokens_per_step", type=float, default=1.0)
    flag("--shrink", type=int, default=8)
    flag("--row_length", type=int, default=2048)
    flag("--repeats", type=int, default=5)
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    items = []
    for prompt in rng.integers(args.prompt // 2, args.prompt + 1, args.responses):
        steps = random_steps(rng, args.response, BLOCK, args.tokens_per_step)
        ids = rng.integers(0, MASK, prompt + args.response)
        items.append(trace_item(ids[:prompt], ids[prompt:], steps, block_size=len(ids), mask_id=MASK,
                                shrink=args.shrink))  # fmt: skip
    times = {"made": [], "written out": []}
    for _ in range(args.repeats):
        began = time.process_time()
        rows = pack(items, row_length=args.row_length)
        middle = time.process_time()
        arrays = rows.ids, rows.positions, rows.intervals
        times["made"].append(middle - began)
        times["written out"].append(time.process_time() - began)
    made = sum(x.nbytes for x in jax.tree.leaves(rows))
    slots = 4 * len(TARGETS) * args.row_length // TARGET_STEPS_PER_ROW
    written = sum(x.nbytes for x in arrays) + len(rows.ids) * slots
    made_s, written_s = (statistics.median(t) for t in times.values())
    (N, T), P = rows.shape, rows.target_ids.shape[1]
    print(f"{args.responses} responses, {N} rows of {T} tokens, {P} target slots")
    print(f"bytes: {made / 2**20:.1f} MiB instead of {written / 2**20:.1f} ({written / made:.1f} times less)")
    print(f"host time: {written_s / made_s:.1f} times less")


if __name__ == "__main__":
    main()
