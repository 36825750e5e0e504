"""Trace rows: round trip, defaults, and errors that name the field."""

import json

import numpy as np
import pytest

from tracerl_jax.diffusion.grid import block_of, block_start, round_up
from tracerl_jax.diffusion.trace import Trace, tokens_per_denoise_step, tokens_per_forward
from tracerl_jax.errors import DataError

ROW = {
    "prompt_ids": [5, 6, 7],
    "ids": [1, 2, 3],
    "step_map": [1, 3, 2],
    "logprobs": [-1.0, -0.5, -2.0],
    "behaviour_logprobs": [-0.75, -0.25, -1.5],
    "tail_ids": [4, 4],
    "tail_step_map": [4, 2],
    "block_size": 4,
    "temperature": 0.5,
    "denoise_forwards": 4,
    "stop_reason": "stop",
    "sample_index": 2,
    "canvas_len": 0,
    "forwards": 5,
}


def test_round_trip_through_json():
    trace = Trace.from_row(json.loads(json.dumps(ROW)))
    assert trace.to_row() == ROW
    assert trace.ids.dtype == trace.step_map.dtype == np.int32
    assert trace.logprobs.dtype == np.float32


def test_only_four_fields_are_needed():
    row = {key: ROW[key] for key in ("prompt_ids", "ids", "step_map", "block_size")}
    trace = Trace.from_row(row | {"text": "ignored"})
    assert np.isnan(trace.logprobs).all() and np.isnan(trace.behaviour_logprobs).all()
    assert trace.denoise_forwards == 3
    assert len(trace.tail_ids) == 0
    assert trace.to_row()["logprobs"] is None
    for field in row:
        with pytest.raises(DataError, match=rf"in\.jsonl:3: field '{field}' is missing"):
            Trace.from_row({key: value for key, value in row.items() if key != field}, where="in.jsonl:3")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ids", [1, 2]),
        ("ids", [1, 2, -3]),
        ("ids", [1, 2, 2**31]),
        ("ids", "123"),
        ("step_map", [0, 1, 2]),
        ("step_map", [1.0, 2.0, 3.0]),
        ("step_map", [1, 2]),
        ("block_size", 0),
        ("block_size", True),
        ("block_size", None),
        ("tail_ids", [4]),
        ("tail_step_map", [4]),
        ("logprobs", [-1.0]),
        ("logprobs", ["a", "b", "c"]),
        ("temperature", -1),
        ("temperature", float("nan")),
        ("denoise_forwards", 3),
        ("stop_reason", "eos"),
        ("sample_index", -1),
    ],
)
def test_a_bad_field_is_named(field, value):
    # A wrong length is reported at whichever of the two fields is read second.
    other = {"ids": "step_map", "tail_ids": "tail_"}.get(field, field)
    with pytest.raises(DataError, match=f"row 7: field '({field}|{other}.*)'"):
        Trace.from_row(ROW | {field: value}, where="row 7")


def test_the_tail_must_end_a_block():
    short = {"tail_ids": [4], "tail_step_map": [4]}
    with pytest.raises(DataError, match=r"tail_ids.*multiple of block_size"):
        Trace.from_row(ROW | short)
    long = {"tail_ids": [4] * 6, "tail_step_map": [4] * 6}
    with pytest.raises(DataError, match="must end the last block"):
        Trace.from_row(ROW | long)


def test_tokens_per_denoise_step():
    one = Trace.from_row(ROW)
    two = Trace.from_row(ROW | {"ids": [1] * 7, "step_map": [1] * 7, "logprobs": None, "behaviour_logprobs": None})
    assert tokens_per_denoise_step([one, two]) == 10 / 8
    assert tokens_per_denoise_step([]) == tokens_per_forward([]) == 0.0
    assert tokens_per_forward([one]) == 3 / 5


def test_grid():
    positions = np.arange(10)
    np.testing.assert_array_equal(block_of(positions, 4), [0, 0, 0, 0, 1, 1, 1, 1, 2, 2])
    np.testing.assert_array_equal(block_of(positions, 4, offset=2), [-1, -1, 0, 0, 0, 0, 1, 1, 1, 1])
    assert block_start(1, 4, offset=2) == 6
    assert [round_up(n, 4) for n in (0, 1, 4, 5)] == [0, 4, 4, 8]
