"""The slots of an engine with a full-attention model: what differs from `Batch`, see rollout/canvas.py.

There is no prompt to encode beforehand and none to share: its keys and values depend on the whole canvas.
"""

from collections.abc import Sequence

from tracerl_jax.errors import ConfigError, DataError
from tracerl_jax.models.config import ModelConfig
from tracerl_jax.rollout import canvas
from tracerl_jax.rollout.batch import FREE_TOKENS, Batch, Entry, length_bucket
from tracerl_jax.rollout.options import EngineConfig
from tracerl_jax.rollout.slots import SlotState

# A full forward of a few slots takes so many times the tokens from which on every token costs.
GATHERED_TOKENS = 4


class CanvasBatch(Batch):
    run = staticmethod(canvas.decode)

    @staticmethod
    def check(model: ModelConfig, config: EngineConfig) -> None:
        if config.commit != "auto" or config.drafts != 1:
            raise ConfigError(
                f"commit is {config.commit!r} and drafts is {config.drafts}, but the model has full attention and "
                "nothing is committed; leave them out (rollout speed is a matter of cache, horizon and refresh)"
            )
        for name in ("horizon", "refresh"):
            if config.cache == "none" and getattr(config, name) is not None:
                value = getattr(config, name)
                raise ConfigError(f"{name} is {value}, but cache is 'none'; set cache to prefix or dual")

    @staticmethod
    def check_entry(entry: Entry, model: ModelConfig, config: EngineConfig, where: str) -> None:
        options, B = entry.options, entry.block_size
        if options.max_tokens % B:
            low = options.max_tokens // B * B
            fits = f"{low} or {low + B}" if low else str(B)
            raise DataError(
                f"{where}: max_tokens {options.max_tokens} is no multiple of block_size {B}, and a full-attention "
                f"model sees whole blocks to the end of the canvas; use {fits}, or another block_size"
            )
        if config.horizon is not None and config.horizon < B:
            raise DataError(
                f"{where}: horizon {config.horizon} is smaller than block_size {B}: a denoise step computes at least "
                f"its block; raise horizon to {B} or more"
            )
        if options.pad_penalty != 1 and model.pad_token_id is None:
            raise DataError(f"{where}: pad_penalty needs pad_token_id in the model's config.json")

    @staticmethod
    def window(config: EngineConfig, entries: Sequence[Entry], length: int) -> int:
        if config.cache == "none":
            return 0
        if config.horizon is not None:
            return min(config.horizon, length)
        if config.max_length is not None:
            return length
        return min(length_bucket(max((entry.options.max_tokens for entry in entries), default=1)), length)

    def fits(self, entry: Entry) -> bool:
        whole = self.config.cache == "none" or self.config.horizon is not None
        return super().fits(entry) and (whole or entry.options.max_tokens <= self.shape.window)

    @property
    def groups(self) -> int:
        return 1

    @property
    def _queries(self) -> int:
        return self.shape.window or self.shape.length

    def program(self) -> canvas.Program:
        config, shape = self.config, self.shape
        gathered = -(-GATHERED_TOKENS * FREE_TOKENS[self._platform] // shape.length)
        return canvas.Program(self.model, shape.block_size, self._needs, config.cache, shape.window, config.refresh,
                              min(gathered, shape.slots // self._shards))  # fmt: skip

    def abstract_state(self) -> SlotState:
        return SlotState(**self._slot_arrays(), cache=None if self.config.cache == "none" else self._abstract_cache())
