"""Rollout speed on this machine: the engine against the loops it replaces, same model and prompts, in one run.

    python benchmarks/rollout.py                    tiny model, 32 requests of mixed length
    python benchmarks/rollout.py --size small       8 layers of width 512, vocabulary 32,000; slots 1 and 16
    python benchmarks/rollout.py --family llada     full attention (or dream): no cache, prefix and dual cache
    python benchmarks/rollout.py --json

(a)  a loop of the host, one request at a time: a jitted forward, what it says fetched, reveals chosen in numpy, a
     commit forward for every block
(b)  the same, requests in batches that end with their longest
(c)  the engine, with a separate and with a fused commit, the latter with one and with three drafts

Every way decodes the same requests by the same rule (static, or dynamic with --threshold; greedy) with random weights,
is warmed up by one whole run, and is then run `--repeats` times in turn; medians. Reported besides tokens/s: tokens per
forward of a sequence, forwards per block, the share of the time that the host took to choose reveals, programs compiled
after the warm-up, and how near the engine is to reading the weights once a forward, and nothing else, at the bandwidth
measured here (a sum over 256 MiB). The embedding, of which a forward reads some rows, is not counted.
"""

import argparse
import json
import logging
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from rollout_caches import FAMILIES, caches

from tracerl_jax.diffusion.trace import tokens_per_forward
from tracerl_jax.kernels.decode import KVCache
from tracerl_jax.models import Model, ModelConfig
from tracerl_jax.rollout.engine import Engine, EngineConfig, Request, SamplingOptions

B = 4
SIZES = {
    "tiny": ModelConfig(vocab_size=512, width=64, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, mlp_width=192,
                        block_size=B, mask_token_id=511),
    "small": ModelConfig(vocab_size=32000, width=512, num_layers=8, num_heads=8, num_kv_heads=4, head_dim=64,
                         mlp_width=1536, block_size=B, mask_token_id=31999),
}  # fmt: skip
# Requests and slots of each comparison: prompts of 5 to 60 tokens, completions of 16 to `longest`.
RUNS = {"tiny": [(32, 32, 128), (32, 8, 128)], "small": [(2, 1, 64), (32, 16, 64)]}


def draw_requests(count: int, longest: int, vocab: int, threshold: float | None) -> list[Request]:
    rng = np.random.default_rng(0)
    how = {"strategy": "static"} if threshold is None else {"strategy": "dynamic", "threshold": threshold}
    how |= {"temperature": 0.0, "ignore_eos": True}
    return [
        Request(
            rng.integers(0, vocab - 1, rng.integers(5, 61)).tolist(),
            SamplingOptions(max_tokens=int(rng.integers(16, longest + 1)), **how),
        )
        for _ in range(count)
    ]


class HostLoop:
    """What a straightforward port does: every step goes through the host."""

    def __init__(self, model: Model, params: dict, batch: int):
        self.model, self.params, self.batch = model, params, batch
        self.host_seconds = 0.0
        self.forward = jax.jit(partial(self._forward, model))
        self.commit = jax.jit(partial(self._commit, model), donate_argnums=1)
        self.prefill = jax.jit(partial(self._prefill, model), static_argnums=2)

    @staticmethod
    def _forward(model, params, cache, ids, start):
        hidden, _ = model.decode(params, ids, start[:, None] + jnp.arange(B), cache, start)
        logits = model.logits(params, hidden).at[..., model.config.mask_token_id].set(-jnp.inf)
        logprobs = jax.nn.log_softmax(logits)
        return jnp.argmax(logits, axis=-1), jnp.max(logprobs, axis=-1)

    @staticmethod
    def _commit(model, params, cache, ids, start):
        _, kv = model.decode(params, ids, start[:, None] + jnp.arange(B), cache, start)

        def write(array, new):  # [L,N,K,S,D], [L,N,B,K,D]
            put = jax.vmap(lambda a, x, at: jax.lax.dynamic_update_slice_in_dim(a, x, at, axis=2), (1, 1, 0), 1)
            return put(array, jnp.swapaxes(new, 2, 3), start)

        return cache._replace(k=write(cache.k, kv.k), v=write(cache.v, kv.v))

    @staticmethod
    def _prefill(model, params, ids, capacity):
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        end = (positions // B + 1) * B
        _, kv = model.hidden_and_kv(params, ids, positions, jnp.stack([0 * end, end, 0 * end, 0 * end], -1))
        pad = ((0, 0), (0, 0), (0, capacity - ids.shape[1]), (0, 0), (0, 0))
        return KVCache.from_tokens(*(jnp.pad(x, pad) for x in kv))

    def generate(self, requests: list[Request]) -> list[np.ndarray]:
        longest = max(len(r.prompt_ids) + r.options.max_tokens for r in requests)
        found, capacity = [], -(-longest // 32) * 32
        for at in range(0, len(requests), self.batch):
            found += self._decode(requests[at : at + self.batch], capacity)
        return found

    def _decode(self, requests: list[Request], capacity: int) -> list[np.ndarray]:
        N, mask = self.batch, self.model.config.mask_token_id
        canvas = np.full((N, capacity), mask, np.int32)
        start, limit = np.zeros(N, np.int32), np.zeros(N, np.int32)
        for n, request in enumerate(requests):
            canvas[n, : len(request.prompt_ids)] = request.prompt_ids
            start[n] = len(request.prompt_ids) // B * B
            limit[n] = len(request.prompt_ids) + request.options.max_tokens
        threshold = requests[0].options.threshold if requests[0].options.strategy == "dynamic" else np.inf
        cache = self.prefill(self.params, canvas[:, :64], capacity)
        while (start < limit).any():
            at = np.minimum(start, capacity - B)
            block = np.take_along_axis(canvas, at[:, None] + np.arange(B), axis=1)
            while (masked := (block == mask) & (start < limit)[:, None]).any():
                ids, logprobs = jax.device_get(self.forward(self.params, cache, block, at))
                began = time.perf_counter()
                confidence = np.where(masked, np.exp(logprobs), -1.0)
                best = np.arange(B) == confidence.argmax(1)[:, None]
                block = np.where(masked & (best | (confidence > threshold)), ids, block)
                self.host_seconds += time.perf_counter() - began
            cache = self.commit(self.params, cache, block, at)
            for n in range(N):
                canvas[n, at[n] : at[n] + B] = block[n]
            start = np.where(start < limit, start + B, start)
        return [canvas[n, len(r.prompt_ids) : limit[n]].copy() for n, r in enumerate(requests)]


def count_compilations(run) -> int:
    names = []
    handler = logging.Handler()
    handler.emit = lambda record: names.append(1) if record.getMessage().startswith("Compiling ") else None
    logger = logging.getLogger("jax")
    logger.addHandler(handler)
    level, propagate = logger.level, logger.propagate
    logger.propagate = False
    with jax.log_compiles():
        run()
    logger.removeHandler(handler)
    logger.level, logger.propagate = level, propagate
    return len(names)


def bandwidth() -> float:
    """Bytes per second, reading."""
    x = jnp.zeros(2**26, jnp.float32)
    total = jax.jit(jnp.sum)
    jax.block_until_ready(total(x))
    times = []
    for _ in range(5):
        began = time.perf_counter()
        jax.block_until_ready(total(x))
        times.append(time.perf_counter() - began)
    return x.nbytes / statistics.median(times)


def compare(size: str, count: int, slots: int, longest: int, args: argparse.Namespace) -> list[dict]:
    model = Model(SIZES[size])
    params = model.init(jax.random.key(0))
    requests = draw_requests(count, longest, model.config.vocab_size, args.threshold)
    tokens = sum(r.options.max_tokens for r in requests)
    engines = {
        name: Engine(model, params, EngineConfig(slots, **config))
        for name, config in (("separate", {"commit": "separate"}), ("fused", {"commit": "fused"}),
                             ("drafts", {"commit": "fused", "drafts": 3}))
    }  # fmt: skip
    loops = {"a": HostLoop(model, params, 1), "b": HostLoop(model, params, slots)}
    ways = {name: partial(loop.generate, requests) for name, loop in loops.items()}
    ways |= {f"c {name}": partial(lambda e: list(e.generate(requests)), e) for name, e in engines.items()}
    traces = {name: way() for name, way in ways.items()}
    for name in ("a", *(f"c {name}" for name in engines)):
        for one, two in zip(traces["b"], traces[name], strict=True):
            assert np.array_equal(one, two if name == "a" else two.ids), f"{name} decodes something else than b"
    compiled = {name: count_compilations(way) for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for loop in loops.values():
        loop.host_seconds = 0.0
    for _ in range(args.repeats):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - began)
    rows, speed = [], bandwidth()
    weights = sum(x.nbytes for x in jax.tree.leaves(params)) - params["embed"]["embedding"].nbytes
    base = statistics.median(seconds["b"])
    for name, times in seconds.items():
        t = statistics.median(times)
        row = {"size": size, "requests": count, "slots": slots, "way": name, "tokens_per_second": tokens / t,
               "speedup_over_b": base / t, "compiled_after_warm_up": compiled[name]}  # fmt: skip
        if name in loops:
            row["host_share"] = loops[name].host_seconds / sum(times)
        else:
            of_engine = traces[name]
            blocks = sum(-(-(len(x.prompt_ids) + len(x.ids)) // B) - len(x.prompt_ids) // B for x in of_engine)
            row["tokens_per_forward"] = tokens_per_forward(of_engine)
            row["forwards_per_block"] = sum(x.forwards for x in of_engine) / blocks
            # As if every forward served all slots: the fewest there can have been.
            forwards = sum(x.forwards for x in of_engine) / slots
            row["bandwidth_share"] = forwards * weights / speed / t
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny")
    parser.add_argument("--family", choices=("sdar", *FAMILIES), default="sdar")
    parser.add_argument("--threshold", type=float, help="decode dynamically with this threshold")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.family != "sdar":
        caches(args)
        return
    rows = [row for run in RUNS[args.size] for row in compare(args.size, *run, args)]
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    heads = ("slots", "way", "tokens/s", "over (b)", "tokens/forward", "forwards/block", "bandwidth", "host",
             "compiled")  # fmt: skip
    print("".join(f"{head:>16}" for head in heads))
    for row in rows:
        cells = [row["slots"], row["way"], f"{row['tokens_per_second']:.0f}", f"{row['speedup_over_b']:.2f}"]
        for key, form in (("tokens_per_forward", ".2f"), ("forwards_per_block", ".2f"), ("bandwidth_share", ".0%"),
                          ("host_share", ".0%"), ("compiled_after_warm_up", "d")):  # fmt: skip
            cells.append(format(row[key], form) if key in row else "")
        print("".join(f"{cell:>16}" for cell in cells))


if __name__ == "__main__":
    main()
