"""Scores of chats by a reward model on the mesh: rendered, tokenised, batched by length, one forward per batch."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tracerl_jax.config_rewards import RewardModelSection
from tracerl_jax.errors import ConfigError
from tracerl_jax.interop.hf_reward import load_reward_model
from tracerl_jax.interop.tokenizer import load_tokenizer, render_chat
from tracerl_jax.models import Model
from tracerl_jax.parallel.order import in_order
from tracerl_jax.parallel.sharding import row_shards
from tracerl_jax.rewards.registry import Verdict
from tracerl_jax.training.step import put_batch
from tracerl_jax.units import format_bytes

SHORTEST_ROW = 64  # tokens; rows are this long, twice, four times ..


class Scorer:
    """A loaded reward model. Raises CheckpointError and ConfigError for a folder it cannot use."""

    def __init__(self, section: RewardModelSection, mesh: jax.sharding.Mesh | None = None):
        self._section = section
        self.tokenizer = load_tokenizer(section.path)
        if self.tokenizer is None or not self.tokenizer.chat_template:
            raise ConfigError(
                f"reward.model.path={section.path}: the folder has no "
                f"{'tokenizer' if self.tokenizer is None else 'chat template'}; put the reward model's own there"
            )
        self.model, self.params = load_reward_model(section.path, dtype=section.dtype, mesh=mesh)
        if len(self.tokenizer) > self.model.config.vocab_size:
            raise ConfigError(
                f"reward.model.path={section.path}: the tokenizer has {len(self.tokenizer)} ids, the model only "
                f"{self.model.config.vocab_size}: put the model's own tokenizer there"
            )

    def memory(self) -> str:
        leaves = jax.tree.leaves(self.params)
        held = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
        count = sum(leaf.size for leaf in leaves)
        return f"{count:,} parameters take {format_bytes(held)} of each device, all through the run"

    def score(self, chats: Sequence[Sequence[Mapping[str, str]]]) -> list[Verdict]:
        """One verdict per chat, in order."""
        most = min(self._section.max_tokens, self.model.config.max_positions)
        ids = [self._ids(chat) for chat in chats]
        fit = [i for i, of_chat in enumerate(ids) if 0 < len(of_chat) <= most]
        scores = self._scores([ids[i] for i in fit], most)
        verdicts = [Verdict(None, f"the chat has more than reward.model.max_tokens={most} tokens, or none")] * len(ids)
        for i, score in zip(fit, scores, strict=True):
            finite = np.isfinite(score)
            verdicts[i] = Verdict(float(score)) if finite else Verdict(None, "the reward model gave NaN or infinity")
        return verdicts

    def _ids(self, chat: Sequence[Mapping[str, str]]) -> list[int]:
        text = render_chat(self.tokenizer, chat, add_generation_prompt=False)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _scores(self, sequences: Sequence[Sequence[int]], most: int) -> np.ndarray:
        """[n] f32. Rows of a batch are of about one length, and there are few shapes, so few programs."""
        scores = np.zeros(len(sequences), np.float32)
        by_length: dict[int, list[int]] = {}
        for i, ids in enumerate(sequences):
            by_length.setdefault(row_length(len(ids), most), []).append(i)
        for length, members in by_length.items():
            rows = rows_of_batch(self._section, length, self.model.mesh)
            for first in range(0, len(members), rows):
                part = members[first : first + rows]
                ids, last = np.zeros((rows, length), np.int32), np.zeros(rows, np.int32)
                for row, i in enumerate(part):
                    ids[row, : len(sequences[i])] = sequences[i]
                    last[row] = last_token(sequences[i], self.model.config.pad_token_id)
                batch = put_batch((ids, last), self.model.mesh)
                with in_order(self.model.mesh):
                    found = score_rows(self.model, self.params, *batch)
                scores[part] = np.asarray(found)[: len(part)]
        return scores


def row_length(tokens: int, most: int) -> int:
    """Of the row that a chat of so many tokens, at most `most`, goes to."""
    length = SHORTEST_ROW
    while length < tokens:
        length *= 2
    return max(tokens, min(length, most))


def rows_of_batch(section: RewardModelSection, length: int, mesh: jax.sharding.Mesh | None) -> int:
    return max(1, section.tokens_per_device // length) * row_shards(mesh)


def last_token(ids: Sequence[int], pad_id: int | None) -> int:
    """Index of the token that is scored: the last one that is not the pad id. Like transformers, which asks the ids: a
    chat that ends with the pad token is scored at the token before it."""
    return next((i for i in range(len(ids) - 1, -1, -1) if ids[i] != pad_id), 0)


@partial(jax.jit, static_argnums=0)
def score_rows(model: Model, params: Any, ids: jax.Array, last: jax.Array) -> jax.Array:
    """Scores [N] f32 at token last[n] of ids [N,T], padded on the right, each token seeing itself and those before."""
    N, T = ids.shape
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (N, T))
    zero = jnp.zeros_like(positions)
    intervals = jnp.stack([zero, positions + 1, zero, zero], axis=-1)
    hidden = model.hidden(params, ids, positions, intervals)
    return model.values(params, jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])
