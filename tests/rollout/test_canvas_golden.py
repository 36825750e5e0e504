"""Greedy generation of the golden full-attention models, every case batched with the others of its cache."""

import itertools
import json

import numpy as np
import pytest
from golden_utils import load_golden

from tracerl_jax.models import Model
from tracerl_jax.rollout import batch
from tracerl_jax.rollout.engine import Engine, EngineConfig, Request, SamplingOptions

PENALISED = 215  # the pad token of the one case in which it matters
SCORES = {"confidence": "confidence", "margin_confidence": "margin"}


def rows_of(golden, dream):
    """(engine's settings, request, ids, steps, log-probs wanted of its first blocks), one for each row of each case.

    Where the steps of a case do not spread evenly over its blocks, those with one step less are a row of their own.
    """
    for case, meta in json.loads(str(golden.arrays("generate")["meta"])).items():
        want, K = golden.arrays("generate", case), meta["block_size"]
        cache = {}
        if meta["use_cache"]:
            horizon = meta["further_horizon"]
            cache = {"cache": "prefix"} | ({} if horizon is None else {"horizon": K + horizon})
        G, pad = meta["gen_length"], meta.get("pad_token_id")
        steps, longer = divmod(meta["steps"], G // K)
        parts = [(0, longer, steps + 1), (longer, G // K, steps)] if longer else [(0, G // K, steps)]
        static = meta["strategy"] == "static"
        for b, (first, last, S) in itertools.product(range(meta["batch"]), parts if static else [(0, G // K, None)]):
            P, at = want["prompt"].shape[1], first * K
            prompt = want["output"][b, P - want["prompt_len"][b] if dream else 0 : P + at]  # pads are visible elsewhere
            options = SamplingOptions(
                strategy=("linspace" if dream else "static") if static else "dynamic",
                score=SCORES.get(meta["target"], "entropy" if dream else "uncertainty"),
                threshold=0.9 if static else meta["threshold"], denoising_steps=S,
                first_token=dream, block_size=K, max_tokens=G - at, temperature=0.0, ignore_eos=True,
                top_k=meta.get("top_k") or 0, top_p=meta.get("top_p") or 1.0,
                confidence="truncated" if dream else "untempered",
                pad_penalty=meta.get("pad_target_penalty") or 1.0, stop_ids=(pad,) if meta["pad_exit"] else None,
            )  # fmt: skip
            expected = [want[name][b][at : last * K] for name in ("step_map", "logp")]
            ids = want["output"][b, P + at : P + last * K]
            if options.pad_penalty > 1:
                assert pad == PENALISED
            yield tuple(cache.items()), Request(prompt, options), ids, *expected


@pytest.mark.parametrize("name", ["dream_tiny", "llada_tiny", pytest.param("mmada_tiny", marks=pytest.mark.slow)])
def test_golden_generation(name, monkeypatch):
    monkeypatch.setattr(batch, "HALVINGS", 0)
    golden = load_golden(name)
    groups = {}
    for key, *row in rows_of(golden, name == "dream_tiny"):
        groups.setdefault(key, []).append(row)
    assert len(groups) == 4
    changes = {"pad_token_id": PENALISED} if name == "dream_tiny" else {"text_vocab_size": None}  # proposes image ids
    model = Model(golden.config.replace(**changes))
    for cache, rows in groups.items():
        engine = Engine(model, golden.params, EngineConfig(len(rows), **dict(cache)))
        for trace, (request, ids, steps, logp) in zip(engine.generate(r[0] for r in rows), rows, strict=True):
            got, got_steps = np.append(trace.ids, trace.tail_ids), np.append(trace.step_map, trace.tail_step_map)
            n = min(len(got), len(ids))
            assert n == len(ids) or trace.stop_reason == "stop", request
            np.testing.assert_array_equal(got[:n], ids[:n], err_msg=str(request))
            # The reference also counts steps that reveal nothing.
            ranks = np.unique(steps[:n], return_inverse=True)[1] + 1
            np.testing.assert_array_equal(got_steps[:n], ranks, err_msg=str(request))
            r = min(n, len(trace.ids))
            np.testing.assert_allclose(trace.logprobs[:r], logp[:r], atol=2e-4, err_msg=str(request))
