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

The drawing is what the model is given, not what the host makes. A row holds the ids and steps (`shown_after`) of each
of its items once, and a table of segments: the clean stream, then a line for each group. What a column holds follows
from these, and is worked out inside the program that needs it:

    ids           p0 p1 p2  a  b  c       segment      column  length  source  position  round
    shown_after   -1 -1 -1  0  0  1       clean             0       4       0         0    all
                                          step 1            4       2       2         2      0
                                          step 2            6       2       4         4      0
                                          step 3            8       2       4         4      1
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tracerl_jax.diffusion.grid import block_of, block_start, round_up
from tracerl_jax.diffusion.replay import ReplayItem
from tracerl_jax.errors import DataError

# Shapes come from few buckets, as each is compiled. Target slots of a row come in multiples of row_length / 4; where
# rows are whole canvases, which have few targets, also in halves of it down to row_length / 64.
TARGET_STEPS_PER_ROW, FEWEST_TARGETS_PER_ROW = 4, 64

_ALL = np.iinfo(np.int32).max  # the round of the clean stream
Array = np.ndarray | jax.Array


class TargetRows:
    """The targets of a batch of training rows: fields [N,P] that both kinds of rows have.

    target_index: int32, column of the target itself (see `Model.predicting`).
    target_ids, target_weight: int32; f32, 0 = padding.
    target_item: int32, -1 = padding.
    target_pos: int32, index into the response.
    target_round: int32, index of the replay group among the states of its block.
    response_lens: of every item, also of those in other parts of a split. It stays on the host: gather, scatter and
        split belong there, and it is lost inside a jitted function.
    """

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

    def _flat_index(self) -> np.ndarray:
        """[N,P] index of the target in the concatenated responses; padding points one behind their end."""
        starts = np.cumsum((0, *self.response_lens))
        return np.where(self.target_item >= 0, starts[self.target_item] + self.target_pos, starts[-1])


TARGETS = ("target_index", "target_ids", "target_weight", "target_item", "target_pos", "target_round")


def no_targets(N: int, P: int) -> dict[str, np.ndarray]:
    """The fields TARGETS of rows of padding."""
    arrays = {name: np.zeros((N, P), np.int32) for name in TARGETS}
    return arrays | {"target_weight": np.zeros((N, P), np.float32), "target_item": np.full((N, P), -1, np.int32)}


class Segments(NamedTuple):
    """Stretches of a row from left to right, each [N,G] int32. What is not used comes last, behind the row's end."""

    column: Array
    length: Array  # 0: not used
    source: Array  # index into the row's sources of the first token
    position: Array  # of the first token, in the item's sequence
    round: Array  # tokens of earlier ones are shown
    item_column: Array  # where the clean stream begins
    block_size: Array
    grid_offset: Array


@partial(
    jax.tree_util.register_dataclass, data_fields=("source_ids", "shown_after", "segments", *TARGETS),
    meta_fields=("row_length", "mask_id"), drop_fields=("response_lens",),
)  # fmt: skip
@dataclasses.dataclass(frozen=True, eq=False)
class PackedRows(TargetRows):
    """A batch of training rows; a pytree of its arrays. Built in numpy and moved to the devices as it is: `ids`,
    `positions` and `intervals` are worked out where they are asked for, on the host or inside a jitted function.
    """

    source_ids: Array  # [N,L] int32, canvases of the items of a row
    shown_after: Array  # [N,L] int32, see `ReplayItem`
    segments: Segments
    target_index: Array
    target_ids: Array
    target_weight: Array
    target_item: Array
    target_pos: Array
    target_round: Array
    row_length: int  # T
    mask_id: int
    response_lens: tuple[int, ...] = ()

    @classmethod
    def empty(
        cls, N: int, T: int, P: int, response_lens: Sequence[int], *, L: int = 1, G: int = 1, mask_id: int = 0
    ) -> "PackedRows":
        """Rows of padding only."""
        zeros = partial(np.zeros, dtype=np.int32)
        segments = Segments(*(zeros((N, G)) for _ in Segments._fields))
        segments = segments._replace(column=segments.column + np.int32(T), block_size=segments.block_size + np.int32(1))
        return cls(
            source_ids=zeros((N, L)), shown_after=zeros((N, L)), segments=segments, **no_targets(N, P),
            row_length=T, mask_id=mask_id, response_lens=tuple(response_lens),
        )  # fmt: skip

    @property
    def shape(self) -> tuple[int, int]:
        """N, T"""
        return len(self.source_ids), self.row_length

    @property
    def ids(self) -> Array:
        """[N,T] int32"""
        at, within, used, xp = self._columns()
        source = xp.where(used, at.source + within, 0)
        ids, shown_after = (xp.take_along_axis(x, source, axis=1) for x in (self.source_ids, self.shown_after))
        return xp.where(used, xp.where(shown_after < at.round, ids, self.mask_id), 0).astype(np.int32)

    @property
    def positions(self) -> Array:
        """[N,T] int32, absolute position in the response's sequence"""
        at, within, used, xp = self._columns()
        return xp.where(used, at.position + within, 0)

    @property
    def intervals(self) -> Array:
        """[N,T,4] int32, key columns of the row that each token sees"""
        at, within, used, xp = self._columns()
        block = block_of(at.position + within, at.block_size, at.grid_offset)
        clean_end = at.item_column + block_start(block + 1, at.block_size, at.grid_offset)
        is_clean = at.round == _ALL
        bounds = xp.stack([
            at.item_column, xp.where(is_clean, clean_end, at.item_column + at.position),
            xp.where(is_clean, at.item_column, at.column), xp.where(is_clean, at.item_column, at.column + at.length),
        ], -1)  # fmt: skip
        return xp.where(used[..., None], bounds, 0)

    def _columns(self):
        """(segment of each column as Segments [N,T], index of the column in it [N,T], which are used, numpy or jnp)"""
        columns = np.arange(self.row_length, dtype=np.int32)
        # How many segments have begun at each column. On devices by comparing all with all, which they do at once.
        if isinstance(self.source_ids, np.ndarray):
            xp, begun = np, np.stack([np.searchsorted(row, columns, side="right") for row in self.segments.column])
        else:
            xp, begun = jnp, jnp.sum(self.segments.column[:, None] <= columns[:, None], axis=-1, dtype=np.int32)
        index = xp.maximum(begun - 1, 0).astype(np.int32)
        at = Segments(*(xp.take_along_axis(x, index, axis=1) for x in self.segments))
        within = columns - at.column
        return at, within, (within >= 0) & (within < at.length), xp

    @property
    def token_count(self) -> int:
        """Tokens that are not padding; N x T are computed."""
        return int(self.segments.length.sum())

    def split(self, n: int) -> list["PackedRows"]:
        """Micro-batches of n rows, in order; the last one is filled up with padding, so all have one shape."""
        (N, T), P, L, G = self.shape, *(x.shape[1] for x in (self.target_ids, self.source_ids, self.segments.column))
        padding = PackedRows.empty(round_up(N, n) - N, T, P, self.response_lens, L=L, G=G, mask_id=self.mask_id)
        whole = jax.tree.map(lambda a, b: np.concatenate([a, b]), self, padding)
        parts = [jax.tree.map(lambda a, at=at: a[at : at + n], whole) for at in range(0, N, n)]
        return [dataclasses.replace(part, response_lens=self.response_lens) for part in parts]


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
    rows_of = [_Row([pieces[i] for i in row]) for row in members]
    P = _target_slots(rows_of, T, targets_multiple)
    L = round_up(max((row.sources for row in rows_of), default=1), T)
    # As many segments as groups find room, whatever these items have.
    groups = T // min((item.block_size for item in items if len(item.group_start)), default=T)
    G = 1 << (max([groups, *(row.segments for row in rows_of)]) - 1).bit_length()
    N = round_up(max(len(members), 1), rows_multiple)
    mask_id = max((item.mask_id for item in items), default=0)  # causal items have none
    rows = PackedRows.empty(N, T, P, [item.response_len for item in items], L=L, G=G, mask_id=mask_id)
    for n, row in enumerate(rows_of):
        row.write(rows, n)
    return rows


def _target_slots(rows: Sequence["_Row"], T: int, multiple: int | None) -> int:
    targets = max((row.targets for row in rows), default=1)
    if multiple is None:
        multiple = max(1, T // TARGET_STEPS_PER_ROW)
        if not any(item.clean_len for row in rows for _, item in row.pieces):
            while targets <= multiple // 2 and multiple > T // FEWEST_TARGETS_PER_ROW:
                multiple //= 2
    return round_up(max(targets, 1), multiple)


def _choose_length(
    pieces: Sequence[tuple[int, ReplayItem]], sizes: list[int], row_length: int | Sequence[int]
) -> int:
    lengths = sorted([row_length] if isinstance(row_length, int) else row_length)
    longest = int(np.argmax(sizes)) if sizes else -1
    need = sizes[longest] if sizes else 0
    if need > lengths[-1]:
        index, item = pieces[longest]
        raise DataError(
            f"response {index} needs {need} tokens of a training row ({item.clean_len} clean and "
            f"{len(item.group_start)} replay groups of {item.block_size}) but row_length is {lengths[-1]}: "
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


class _Row:
    """The pieces (index of the item, piece) of one row, side by side."""

    def __init__(self, pieces: Sequence[tuple[int, ReplayItem]]):
        self.pieces, self.source_of = pieces, {}
        self.sources = self.segments = self.targets = 0
        for index, item in pieces:
            if index not in self.source_of:  # pieces of one item share its canvas
                self.source_of[index] = self.sources
                self.sources += len(item.canvas)
            self.segments += len(item.group_start) + (item.clean_len > 0)
            self.targets += len(item.target_ids)

    def write(self, rows: PackedRows, n: int) -> None:
        column = segment = slot = 0
        for index, item in self.pieces:
            source = self.source_of[index]
            canvas = slice(source, source + len(item.canvas))
            rows.source_ids[n, canvas], rows.shown_after[n, canvas] = item.canvas, item.shown_after

            clean, M = int(item.clean_len > 0), len(item.group_start)
            values = Segments(
                column=column + np.append(np.zeros(clean, int), item.clean_len + item.block_size * np.arange(M)),
                length=np.append([item.clean_len] * clean, [item.block_size] * M),
                source=source + np.append([0] * clean, item.group_source),
                position=np.append([0] * clean, item.group_start),
                round=np.append([_ALL] * clean, item.group_round),
                item_column=column, block_size=item.block_size, grid_offset=item.grid_offset,
            )  # fmt: skip
            for array, value in zip(rows.segments, values, strict=True):
                array[n, segment : segment + clean + M] = value

            targets = slice(slot, slot + len(item.target_ids))
            rows.target_index[n, targets] = column + item.target_column
            rows.target_ids[n, targets] = item.target_ids
            rows.target_weight[n, targets] = item.target_weight
            rows.target_item[n, targets] = index
            rows.target_pos[n, targets] = item.target_pos
            rows.target_round[n, targets] = item.target_round
            column, segment, slot = column + item.size, segment + clean + M, slot + len(item.target_ids)
