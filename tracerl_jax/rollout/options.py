"""What a caller asks of the engine: decoding options and requests, validated before anything runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tracerl_jax.diffusion.reveal import DYNAMIC, LINSPACE, LONGEST_LINSPACE, SCORES, strategy_code
from tracerl_jax.diffusion.sampling import CONFIDENCES
from tracerl_jax.errors import ConfigError

COMMITS = ("auto", "separate", "fused")
CACHES = ("none", "prefix", "dual")
KV_DTYPES = ("compute", "int8")
LARGEST = float(np.finfo(np.float32).max)  # the device counts in float32


@dataclass(frozen=True)
class SamplingOptions:
    """How one request is decoded. Requests with different options may share a batch if their block_size agrees.

    Raises ConfigError naming the field on construction.
    """

    strategy: str = "dynamic"  # static, dynamic, sequential, entropy_bounded, linspace; see diffusion/reveal.py
    threshold: float = 0.9  # dynamic: reveal what has a higher score
    entropy_bound: float = 0.35  # entropy_bounded: nats per denoise step
    denoising_steps: int | None = None  # per block, at least 1; None = block_size, that is one token at a time
    block_size: int | None = None  # None = the model's
    max_tokens: int = 256  # length limit of the completion
    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # 0 = off
    top_p: float = 1.0  # 1 = off
    seed: int = 0
    ignore_eos: bool = False  # do not stop at the engine's stop ids; `stop_ids` still count
    # What probabilities scores come from: the policy's, those that top-k and top-p leave ("truncated", as in SDAR's and
    # Dream's reference samplers), or the model's at temperature 1 ("untempered", as in LLaDA's).
    confidence: str = "policy"
    stop_ids: tuple[int, ...] | None = None  # stop at these too
    score: str = "confidence"  # what static, dynamic and linspace rank by: confidence, margin, entropy, uncertainty
    first_token: bool = False  # the first step of a block reveals its first position alone, as Dream's sampler does
    pad_penalty: float = 1.0  # a proposal of the pad token counts so many times worse; 1 = off

    def __post_init__(self) -> None:
        strategy_code(self.strategy)
        for name, choices in (("score", SCORES), ("confidence", CONFIDENCES)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; use one of {', '.join(choices)}")
        if strategy_code(self.strategy) == DYNAMIC and self.score in ("entropy", "uncertainty"):
            raise ConfigError(
                f"strategy dynamic compares the score with a threshold from 0 to 1, and score is {self.score!r}; use "
                "confidence or margin, or the strategy entropy_bounded"
            )
        _check_number(self, "threshold", 0, 1)
        _check_number(self, "entropy_bound", 0, math.inf)
        longest = LONGEST_LINSPACE if strategy_code(self.strategy) == LINSPACE else 2**31 - 1
        _check_int(self, "denoising_steps", 1, longest, optional=True)
        _check_int(self, "block_size", 1, 2**31 - 1, optional=True)
        _check_int(self, "max_tokens", 1, 2**31 - 1)
        _check_number(self, "temperature", 0, math.inf)
        _check_int(self, "top_k", 0, 2**31 - 1)
        _check_number(self, "top_p", 0, 1)
        if self.top_p == 0:
            raise ConfigError("top_p is 0; it must be above 0 (1 is off, temperature 0 is greedy)")
        _check_int(self, "seed", 0, 2**32 - 1)
        for name in ("ignore_eos", "first_token"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be true or false")
        _check_number(self, "pad_penalty", 1, math.inf)
        if self.stop_ids is not None:
            if not isinstance(self.stop_ids, Sequence) or not all(_is_int(i) and i >= 0 for i in self.stop_ids):
                raise ConfigError(f"stop_ids is {self.stop_ids!r}; it must be a list of token ids")
            object.__setattr__(self, "stop_ids", tuple(self.stop_ids))


@dataclass(frozen=True)
class Request:
    """One sample to draw. Its result depends on the prompt, the options and the sample index only."""

    prompt_ids: Sequence[int]
    options: SamplingOptions = field(default_factory=SamplingOptions)
    sample_index: int = 0  # tells samples of one prompt apart


@dataclass(frozen=True)
class EngineConfig:
    """Size and manner of an engine. Raises ConfigError naming the field on construction.

    `valid_vocab` and `stop_ids` apart, none of it changes what a request to a block-causal model gets, but for the
    order in which sums are taken, and for `kv_dtype="int8"`: what is encoded behind a cached prefix reads rounded
    numbers, so a result depends on whether its prefix was cached. For a full-attention model `cache`, `horizon`,
    `refresh` and `kv_dtype` are part of what is computed: its caches are approximations (rollout/canvas.py).
    """

    slots: int = 64  # sequences decoded together
    max_length: int | None = None  # tokens of prompt and completion; None = what each `generate` needs
    commit: str = "auto"  # separate, fused, or whichever should be faster; see rollout/decode.py
    drafts: int = 1  # denoise steps guessed ahead and verified by a forward, where commits are fused
    forwards_per_chunk: int = 256  # at most, until the host looks again
    page_size: int = 64  # tokens of a cache page, rounded up to whole blocks
    pages: int | None = None  # of the cache, per shard of the slots; None = enough for all slots at full length
    cache: str = "none"  # of full-attention models: none (exact), prefix or dual; see rollout/canvas.py
    horizon: int | None = None  # tokens that a step with a cache computes, from its block on; None = all that follow
    refresh: int | None = None  # denoise steps of a block after which its cache is made anew; None = only at its start
    prefix_cache: bool = True  # keep the pages of prompts for later requests while there is room
    kv_dtype: str = "compute"  # of the cache: "compute" (the model's) or "int8"
    valid_vocab: int | None = None  # ids from here on are never sampled (the tokenizer's size); None = all may be
    stop_ids: tuple[int, ...] | None = None  # end a completion; None = the model's stop_token_ids

    def __post_init__(self) -> None:
        for name in ("slots", "drafts", "forwards_per_chunk", "page_size"):
            _check_int(self, name, 1, 2**31 - 1)
        for name in ("max_length", "pages", "valid_vocab", "horizon", "refresh"):
            _check_int(self, name, 1, 2**31 - 1, optional=True)
        for name, choices in (("commit", COMMITS), ("cache", CACHES), ("kv_dtype", KV_DTYPES)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; use one of {', '.join(choices)}")


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_int(options: object, name: str, low: int, high: int, optional: bool = False) -> None:
    value = getattr(options, name)
    if optional and value is None:
        return
    if not _is_int(value) or not low <= value <= high:
        raise ConfigError(f"{name} is {value!r}; it must be an integer from {low} to {high}")


def _check_number(options: SamplingOptions, name: str, low: float, high: float) -> None:
    value = getattr(options, name)
    is_number = _is_int(value) or isinstance(value, float)
    if not is_number or not low <= value <= min(high, LARGEST):  # NaN is not, either
        raise ConfigError(f"{name} is {value!r}; it must be a number from {low} to {high}")
