"""Truncated importance sampling: samples of one policy, trained on as if another one had drawn them.

    weight = min(pi_old / pi_behaviour, cap)         a constant: no gradient goes through it

pi_behaviour drew the tokens (`Trace.behaviour_logprobs`): older weights, an approximate cache, after bans, top-k and
top-p. pi_old is the centre of PPO's ratio. Truncation trades a bounded variance for some bias (Ionides 2008).

With shrink s > 1 (or another block size) pi_old is the policy that the objective trains: one that reveals the tokens of
s steps at once, each given what was visible before the first of them. Its log-probs in the merged states, summed over a
response, are the probability of the response under it, so the ratio is a proper weight. It corrects for the cache and
for the merging together:

    pi_old(token | merged state)      pi_old(token | merged state)     pi_old(token | sampler's state)
    ----------------------------  =  ------------------------------ x ---------------------------------
    pi_behaviour(token | cached)     pi_old(token | sampler's state)    pi_behaviour(token | cached)

To weight by the last factor alone, every step of the sampler would have to be replayed, which shrink is there to avoid.

    token      a ratio for every token                                      (https://fengyao.notion.site/off-policy-rl)
    sequence   the product of a response's ratios, the same for all of its tokens: the ratio of the whole response.
               Not its geometric mean: that is no ratio of probabilities    (https://richardli.xyz/rl-collapse)

The order in which a diffusion model revealed the tokens is taken as given, as in the objective itself.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from tracerl_jax.rl.objectives import LOG_RATIO_LIMIT

ImportanceLevel = Literal["token", "sequence"]


def importance_ratios(old_logp: np.ndarray, behaviour_logp: np.ndarray, level: ImportanceLevel) -> np.ndarray:
    """pi_old / pi_behaviour of a response's tokens, before truncation: [r] f32 from [r] and [r], within e^+-10."""
    log_ratios = np.asarray(old_logp, np.float32) - np.asarray(behaviour_logp, np.float32)
    if level == "sequence":
        log_ratios = np.full_like(log_ratios, log_ratios.sum(dtype=np.float64))
    return np.exp(np.clip(log_ratios, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def truncate(ratios: np.ndarray, cap: float) -> np.ndarray:
    """The weights of ratios, [...] f32."""
    return np.minimum(ratios, np.float32(cap))


def importance_metrics(ratios: Sequence[np.ndarray], cap: float, level: ImportanceLevel) -> dict[str, float]:
    """How far the samples are from the policy (docs/metrics.md), over tokens or, by `sequence`, over responses.

    `ratios`: [r] of every response, as `importance_ratios` gives them.
    """
    values = np.concatenate([r if level == "token" else r[:1] for r in ratios]).astype(np.float64)
    weights = np.minimum(values, cap)
    return {
        "importance/ratio_mean": float(values.mean()),
        "importance/ratio_max": float(values.max()),
        "importance/truncated_fraction": float(np.mean(values > cap)),
        "importance/effective_sample_size": float(weights.sum() ** 2 / (len(weights) * np.sum(weights**2))),
    }
