"""Shared by the replay tests: golden cases as training rows, and visibility as dense masks."""

from __future__ import annotations

import json
from typing import NamedTuple

import jax
import numpy as np
import optax

from tracerl_jax.diffusion.packing import PackedRows, pack
from tracerl_jax.diffusion.replay import ReplayItem, masking_item, trace_item
from tracerl_jax.diffusion.rounds import RoundRows, pad_response, round_rows, trace_states
from tracerl_jax.interop.families import FAMILIES
from tracerl_jax.interop.names import hf_tensors, leaves_by_path
from tracerl_jax.models import ModelConfig


class Case(NamedTuple):
    """One case of tracerl.npz, value.npz or sft.npz; lists have one entry per item (coupled: each sequence twice)."""

    meta: dict
    data: dict  # its arrays
    prompts: list
    responses: list  # padded to L1
    steps: list
    masks: list | None  # random masks instead of steps
    rows: RoundRows  # the reference's rows

    def items(self) -> list[ReplayItem]:
        """The same training problem on the response-aligned grid, to be packed."""
        common = dict(block_size=self.meta["block_size"], mask_id=self.meta["mask_id"], alignment="response")
        kept = [np.zeros(len(r), np.float32) for r in self.responses]
        for item, pos in zip(self.rows.target_item.ravel(), self.rows.target_pos.ravel(), strict=True):
            if item >= 0:
                kept[item][pos] = 1
        if self.masks is not None:
            return [
                masking_item(p, r, m, weights=w, **common)
                for p, r, m, w in zip(self.prompts, self.responses, self.masks, kept, strict=True)
            ]
        return [
            trace_item(p, r, s, weights=w, shrink=self.meta["shrink"], **common)
            for p, r, s, w in zip(self.prompts, self.responses, self.steps, kept, strict=True)
        ]

    def golden_row(self, rows: PackedRows) -> np.ndarray:
        """[N,P]: for every target of `rows` the golden row that trains it; 0 at padding."""
        index = np.zeros((len(self.prompts), self.rows.target_round.max() + 1), int)
        index[self.rows.target_item[:, 0], self.rows.target_round[:, 0]] = np.arange(len(self.rows.ids))
        return np.where(rows.target_item >= 0, index[rows.target_item, rows.target_round], 0)


def load_case(arrays, file: str, name: str) -> Case:
    meta = json.loads(str(arrays(file)["meta"]))[name]
    data = arrays(file, name)
    L1, pad_id = meta["L1"], meta["pad_id"]
    dataset = arrays(file, f"ds.{meta['dataset']}")
    prompts = read_lists(dataset, "prompts")
    padded = [
        pad_response(ids, steps, length=L1, pad_id=pad_id)
        for ids, steps in zip(read_lists(dataset, "responses"), read_lists(dataset, "steps"), strict=True)
    ]
    responses = [ids for ids, _ in padded]
    steps = [steps if meta.get("recorded_steps", True) else np.arange(L1) for _, steps in padded]
    masks = None
    if meta.get("method") in ("random_masking", "coupled", "semi-ar"):
        masks = list(data["draw_mask"])
        if meta["method"] == "coupled":
            masks, prompts, responses, steps = masks + [~m for m in masks], prompts * 2, responses * 2, steps * 2
        states = [[(mask, mask)] for mask in masks]
    else:
        states = [
            trace_states(len(p), s, block_size=meta["block_size"], shrink=meta["shrink"])
            for p, s in zip(prompts, steps, strict=True)
        ]
    rows = round_rows(
        prompts, responses, states, block_size=meta["block_size"], mask_id=meta["mask_id"], pad_id=pad_id,
        post_num=meta["post_num"],
    )  # fmt: skip
    return Case(meta, data, prompts, responses, steps, masks, rows)


def case_names(file: str) -> list[str]:
    prefix, count = {"tracerl": ("t", 13), "value": ("v", 7), "sft": ("f", 6)}[file]
    return [f"{prefix}{i:02}" for i in range(count)]


def visible(rows: PackedRows) -> np.ndarray:
    """[N,T,T] bool: which columns each token sees."""
    s1, e1, s2, e2 = (rows.intervals[..., i, None] for i in range(4))
    columns = np.arange(rows.ids.shape[1])
    return ((columns >= s1) & (columns < e1)) | ((columns >= s2) & (columns < e2))


def target_mask(rows: PackedRows, length: int) -> np.ndarray:
    """[N,length] bool: response positions that are targets of the row."""
    mask = np.zeros((len(rows.ids), length), bool)
    n, slot = np.nonzero(rows.target_item >= 0)
    mask[n, rows.target_pos[n, slot]] = True
    return mask


def fill_up(rows: RoundRows, shape: tuple[int, int, int]) -> RoundRows:
    """The same rows with padding up to N, T, P: one shape, one compilation."""
    return _into(RoundRows.empty(*shape, rows.response_lens), rows)


def pack_to(items: list[ReplayItem], shape: tuple[int, int, int]) -> PackedRows:
    """The items in rows of padding up to N, T, P, or what they need: one shape, one compilation."""
    N, T, P = shape
    rows = pack(items, row_length=T)
    L, G = max(2 * T, rows.source_ids.shape[1]), max(64, rows.segments.column.shape[1])
    P = max(P, rows.target_ids.shape[1])
    return _into(PackedRows.empty(N, T, P, rows.response_lens, L=L, G=G, mask_id=rows.mask_id), rows)


def _into(filled, rows):
    def write(new, old):
        new[tuple(map(slice, old.shape))] = old

    jax.tree.map(write, filled, rows)
    return filled


def by_checkpoint_name(tree: dict, family: str) -> dict[str, np.ndarray]:
    """Our tree as the family's checkpoint tensors, [out,in]."""
    leaves = leaves_by_path(tree)
    tensors = {}
    for tensor in hf_tensors(tree, FAMILIES[family].tensors):
        values = np.asarray(leaves[tensor.path][tensor.index])
        tensors[tensor.name] = values.T if tensor.transpose else values
    return tensors


def check_gradients(grads: dict, family: str, golden: dict, prefix: str, names) -> int:
    """Gradients against recorded norms and full ones, of which the number is returned."""
    grads = by_checkpoint_name(grads, family)
    norms = np.array([np.linalg.norm(grads[name]) for name in names])
    np.testing.assert_allclose(norms, golden[f"{prefix}grad_norms"], rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(norms), golden[f"{prefix}grad_global_norm"], rtol=1e-4)
    full = [key for key in golden if key.startswith(prefix + "grad.")]
    for key in full:
        want = golden[key]
        np.testing.assert_allclose(grads[key.removeprefix(prefix + "grad.")], want, rtol=0, atol=2e-4 * abs(want).max())
    return len(full)


def check_full_gradients(grads: dict, config: ModelConfig, golden: dict, names) -> int:
    """`check_gradients` of a full-attention model. Dream's code gives the pad's embedding no gradient; to ours it is a
    token like others."""
    if config.family == "dream":
        np.testing.assert_allclose(optax.tree.norm(grads), golden["grad_global_norm_no_padding_idx"], rtol=1e-4)
        grads["embed"]["embedding"] = grads["embed"]["embedding"].at[config.pad_token_id].set(0)
    return check_gradients(grads, config.family, golden, "", names)


def read_lists(dataset: dict, name: str) -> list[np.ndarray]:
    return [row[:n] for row, n in zip(dataset[name], dataset[f"{name}_len"], strict=True)]
