"""Packed rows: every response's clean stream once, all its replay groups behind it, several responses per row.

One item, B = 2, p = 3, response a b c, steps 1 | 2 3, M = MASK, `#` = the query on the left sees this key:

    column         0  1  2  3  4  5  6  7  8  9
    position       0  1  2  3  2  3  4  5  4  5
    key           p0 p1 p2  a|p2  M| M  M| b  M|      intervals (s1, e1, s2, e2)
    clean    p0    #  #                               (0, 2, -, -)    to the end of the own block
             p1    #  #                               (0, 2, -, -)
             p2    #  #  #  #                         (0, 4, -, -)
             a     #  #  #  #                         (0, 4, -, -)
    step 1   p2    #  #        #  #                   (0, 2, 4, 6)    clean tokens of earlier blocks, own group
             M     #  #        #  #                   (0, 2, 4, 6)    target a
    step 2   M     #  #  #  #        #  #             (0, 4, 6, 8)    target b
             M     #  #  #  #        #  #             (0, 4, 6, 8)
    step 3   b     #  #  #  #              #  #       (0, 4, 8, 10)
             M     #  #  #  #              #  #       (0, 4, 8, 10)   target c

A row is `[item | item | ... | padding]`, intervals shifted to the item's first column. Padding sees nothing and is not
seen. Groups without clean stream, as models with full attention have them, may lie in different rows.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import numpy as np

from tracerl_jax.diffusion.grid import block_of, block_start, round_up
from tracerl_jax.diffusion.replay import ReplayItem
from tracerl_jax.errors import DataError

# Target slots of a row come in multiples of row_length / 4: a row length is compiled for one or two shapes in practice.
TARGET_STEPS_PER_ROW = 4

_ARRAYS = (
    "ids", "positions", "intervals", "target_index", "target_ids", "target_weight", "target_item", "target_pos",
    "target_round",
)  # fmt: skip


@partial(jax.tree_util.register_dataclass, data_fields=_ARRAYS, meta_fields=(), drop_fields=("response_lens",))
@dataclasses.dataclass(frozen=True, eq=False)
class PackedRows:
    """A batch of training rows; a pytree of its arrays. Built in numpy; moved to the devices as it is.

    `response_lens` stays on the host: gather, scatter and split belong there, and it is lost inside a jitted function.
    """

    ids: np.ndarray  # [N,T] int32
    positions: np.ndarray  # [N,T] int32, absolute position in the response's sequence
    intervals: np.ndarray  # [N,T,4] int32, key columns of the row that each token sees
    target_index: np.ndarray  # [N,P] int32, column of the target itself (see `Model.predicting`)
    target_ids: np.ndarray  # [N,P] int32
    target_weight: np.ndarray  # [N,P] f32, 0 = padding
    target_item: np.ndarray  # [N,P] int32, -1 = padding
    target_pos: np.ndarray  # [N,P] int32, index into the response
    target_round: np.ndarray  # [N,P] int32, index of the replay group among the states of its block
    response_lens: tuple[int, ...] = ()  # of every item, also of those in other parts of a split

    @classmethod
    def empty(cls, N: int, T: int, P: int, response_lens: Sequence[int]) -> "PackedRows":
        """Rows of padding only."""
        zeros = partial(np.zeros, dtype=np.int32)
        return cls(
            ids=zeros((N, T)), positions=zeros((N, T)), intervals=zeros((N, T, 4)),
            target_index=zeros((N, P)), target_ids=zeros((N, P)), target_weight=np.zeros((N, P), np.float32),
            target_item=np.full((N, P), -1, np.int32), target_pos=zeros((N, P)), target_round=zeros((N, P)),
            response_lens=tuple(response_lens),
        )  # fmt: skip

    @property
    def token_count(self) -> int:
        """Tokens that are not padding; `ids.size` are computed."""
        s1, e1, s2, e2 = np.moveaxis(self.intervals, -1, 0)
        return int(((s1 < e1) | (s2 < e2)).sum())

    @property
    def target_count(self) -> int:
        return int((self.target_item >= 0).sum())

    def gather(self, per_item: Sequence[float | np.ndarray]) -> np.ndarray:
        """Per item a number or one number per response token [r] -> [N,P] f32; 0 at padding."""
        spread = [np.broadcast_to(x, (r,)) for x, r in zip(per_item, self.response_lens, strict=True)]
        return np.concatenate([*spread, [0.0]]).astype(np.float32)[self._flat_index()]

    def scatter(self, values: np.ndarray) -> list[np.ndarray]:
        """[N,P] -> per item one number per response token [r]; 0 where no row holds a target for it."""
        values = np.asarray(values)
        flat = np.zeros(sum(self.response_lens) + 1, values.dtype)
        flat[self._flat_index()] = values
        return np.split(flat[:-1], np.cumsum(self.response_lens)[:-1]) if self.response_lens else []

    def split(self, n: int) -> list["PackedRows"]:
        """Micro-batches of n rows, in order; the last one is filled up with padding, so all have one shape."""
        (N, T), P = self.ids.shape, self.target_ids.shape[1]
        padding = PackedRows.empty(round_up(N, n) - N, T, P, self.response_lens)
        whole = jax.tree.map(lambda a, b: np.concatenate([a, b]), self, padding)
        parts = [jax.tree.map(lambda a, at=at: a[at : at + n], whole) for at in range(0, N, n)]
        return [dataclasses.replace(part, response_lens=self.response_lens) for part in parts]

    def _flat_index(self) -> np.ndarray:
        """[N,P] index of the target in the concatenated responses; padding points one behind their end."""
        starts = np.cumsum((0, *self.response_lens))
        return np.where(self.target_item >= 0, starts[self.target_item] + self.target_pos, starts[-1])


def pack(
    items: Sequence[ReplayItem],
    *,
    row_length: int | Sequence[int],
    rows_multiple: int = 1,
    targets_multiple: int | None = None,
) -> PackedRows:
    """Lay items out in rows, first fit in order of falling size (ties by index): the same items give the same rows.

    An item lies in one row, but for the pieces of one without clean stream.

    Args:
      items: `target_item` counts them from 0; an item without targets takes no room.
      row_length: T, or several to choose from; the smallest one that holds the largest item is taken.
      rows_multiple: N is filled up to a multiple of it with rows of padding (say the devices that share a batch).
      targets_multiple: P is rounded up to a multiple of it; T / 4 when None.

    Raises DataError when an item is longer than the longest row.
    """
    pieces = [(index, piece) for index, item in enumerate(items) for piece in item.pieces()]
    sizes = [piece.size for _, piece in pieces]
    T = _choose_length(pieces, sizes, row_length)
    members = _first_fit(sizes, T)
    targets = max((sum(len(pieces[i][1].target_ids) for i in row) for row in members), default=0)
    P = round_up(max(targets, 1), targets_multiple or max(1, T // TARGET_STEPS_PER_ROW))
    N = round_up(max(len(members), 1), rows_multiple)
    rows = PackedRows.empty(N, T, P, [item.response_len for item in items])
    for n, row in enumerate(members):
        column = slot = 0
        for i in row:
            index, piece = pieces[i]
            _place(rows, n, column, slot, piece, index)
            column, slot = column + sizes[i], slot + len(piece.target_ids)
    return rows


def _choose_length(
    pieces: Sequence[tuple[int, ReplayItem]], sizes: list[int], row_length: int | Sequence[int]
) -> int:
    lengths = sorted([row_length] if isinstance(row_length, int) else row_length)
    longest = int(np.argmax(sizes)) if sizes else -1
    need = sizes[longest] if sizes else 0
    if need > lengths[-1]:
        index, item = pieces[longest]
        raise DataError(
            f"response {index} needs {need} tokens of a training row ({len(item.clean)} clean and "
            f"{len(item.group_ids)} replay groups of {item.block_size}) but row_length is {lengths[-1]}: "
            f"raise row_length to at least {need}, raise shrink, or lower max_tokens"
        )
    return next(length for length in lengths if need <= length)


def _first_fit(sizes: list[int], T: int) -> list[list[int]]:
    members: list[list[int]] = []
    free = np.full(len(sizes), T)  # of every row there may be
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if sizes[i] == 0:
            continue
        row = int(np.argmax(free >= sizes[i]))
        if row == len(members):
            members.append([])
        members[row].append(i)
        free[row] -= sizes[i]
    return members


def _place(rows: PackedRows, n: int, column: int, slot: int, item: ReplayItem, index: int) -> None:
    """Write one item into row n from token `column` and target `slot` on."""
    B, c, M = item.block_size, len(item.clean), len(item.group_ids)
    clean_pos = np.arange(c)
    clean_end = block_start(block_of(clean_pos, B, item.grid_offset) + 1, B, item.grid_offset)
    group_column = c + B * np.arange(M)
    clean_intervals = np.stack([0 * clean_end, clean_end, 0 * clean_end, 0 * clean_end], -1)
    group_intervals = np.stack([0 * group_column, item.group_start, group_column, group_column + B], -1)

    tokens = slice(column, column + item.size)
    rows.ids[n, tokens] = np.concatenate([item.clean, item.group_ids.ravel()])
    rows.positions[n, tokens] = np.concatenate([clean_pos, (item.group_start[:, None] + np.arange(B)).ravel()])
    rows.intervals[n, tokens] = column + np.concatenate([clean_intervals, np.repeat(group_intervals, B, axis=0)])

    targets = slice(slot, slot + len(item.target_ids))
    rows.target_index[n, targets] = column + item.target_column
    rows.target_ids[n, targets] = item.target_ids
    rows.target_weight[n, targets] = item.target_weight
    rows.target_item[n, targets] = index
    rows.target_pos[n, targets] = item.target_pos
    rows.target_round[n, targets] = item.target_round
