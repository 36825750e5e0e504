"""`benchmarks/rollout.py --family llada|dream`: full-attention decoding with each cache, in one run.

Random weights: ids mean nothing, and a cache's effect on them is not what is measured here. Speed depends on weights
only through the tokens that a step reveals. `static` reveals one. `threshold` reveals what exceeds the one given with
--threshold, or else one at which a step without a cache reveals about three tokens. All ways decode the same requests:
prompts of 64 tokens, responses of 256 in blocks of 32.
"""

import argparse
import json
import statistics
import time

import jax
import numpy as np

from tracerl_jax.diffusion.trace import tokens_per_denoise_step
from tracerl_jax.models import Model, ModelConfig
from tracerl_jax.rollout.engine import Engine, EngineConfig, Request, SamplingOptions

FAMILIES = {"llada": "same_position", "dream": "shifted"}
BLOCK, PROMPT, RESPONSE = 32, 64, 256
SIZES = {
    "tiny": {"vocab_size": 512, "width": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "head_dim": 16,
             "mlp_width": 192},
    "small": {"vocab_size": 32000, "width": 512, "num_layers": 8, "num_heads": 8, "num_kv_heads": 8, "head_dim": 64,
              "mlp_width": 1536},
}  # fmt: skip
SLOTS, TOKENS_PER_STEP = 2, 3.0
CACHES = {
    "none": {}, "prefix": {"cache": "prefix", "horizon": 64}, "dual": {"cache": "dual", "horizon": 64},
    "dual, block only": {"cache": "dual", "horizon": BLOCK},
}  # fmt: skip


def caches(args: argparse.Namespace) -> None:
    config = ModelConfig(
        **SIZES[args.size], attention_mode="full", logit_alignment=FAMILIES[args.family], qk_norm=False,
        block_size=BLOCK, mask_token_id=SIZES[args.size]["vocab_size"] - 1, initializer_range=0.1,
    )  # fmt: skip
    model = Model(config)
    params = model.init(jax.random.key(0))
    engines = {name: Engine(model, params, EngineConfig(SLOTS, **cache)) for name, cache in CACHES.items()}
    threshold = args.threshold or _threshold(engines["none"], config)
    reveals = {"static": {"strategy": "static"}, "threshold": {"strategy": "dynamic", "threshold": threshold}}
    ways = {
        (reveal, name): (engine, how) for reveal, how in reveals.items() for name, engine in engines.items()
    }
    for engine in engines.values():  # the same programs serve both; dynamic needs fewer steps
        list(engine.generate(_requests(config, **reveals["threshold"])))
    seconds, traces = {way: [] for way in ways}, {}
    for _ in range(args.repeats):
        for way, (engine, how) in ways.items():
            began = time.process_time()  # of all cores; other work on the machine disturbs it less
            traces[way] = list(engine.generate(_requests(config, **how)))
            seconds[way].append(time.process_time() - began)
    tokens, base = SLOTS * RESPONSE, statistics.median(seconds["static", "none"])
    rows = [
        {
            "reveal": way[0], "cache": way[1], "tokens_per_cpu_second": tokens / statistics.median(times),
            "speedup": base / statistics.median(times), "tokens_per_step": tokens_per_denoise_step(traces[way]),
        }
        for way, times in seconds.items()
    ]  # fmt: skip
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    shape = f"{SLOTS} slots, prompt {PROMPT}, response {RESPONSE}, block {BLOCK}"
    print(f"{args.family}, {shape}; threshold {threshold:.3f}")
    print("".join(f"{head:>23}" for head in rows[0]))
    for row in rows:
        print("".join(f"{value:>23.2f}" if isinstance(value, float) else f"{value:>23}" for value in row.values()))


def _requests(config: ModelConfig, **how) -> list[Request]:
    rng = np.random.default_rng(0)
    options = SamplingOptions(max_tokens=RESPONSE, temperature=0.0, **how)
    return [Request(rng.integers(0, config.mask_token_id, PROMPT).tolist(), options, i) for i in range(SLOTS)]


def _threshold(engine: Engine, config: ModelConfig) -> float:
    """At which steps without a cache reveal about TOKENS_PER_STEP."""
    low, high = 1 / config.vocab_size, 1.0
    for _ in range(6):
        middle = (low * high) ** 0.5
        traces = list(engine.generate(_requests(config, strategy="dynamic", threshold=middle)))
        low, high = (middle, high) if tokens_per_denoise_step(traces) > TOKENS_PER_STEP else (low, middle)
    return (low * high) ** 0.5
