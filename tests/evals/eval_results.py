"""Reading and comparing results folders of `tracerl eval`."""

import json

import numpy as np

from tracerl_jax.report.run_dir import intact_rows

TIMES = {"tokens_per_second", "decode_seconds", "wall_seconds", "starts"}


def rows_of(folder):
    """{(file, problem, sample): row} without a torn line; no item twice."""
    rows = {}
    for path in sorted((folder / "items").iterdir()):
        for row in intact_rows(path):
            key = (path.name, row["index"], row["sample_index"])
            assert key not in rows
            rows[key] = row
    return rows


def results_of(folder):
    """results.json without what measures time."""
    results = json.loads((folder / "results.json").read_text())
    return {t: {s: {k: v for k, v in r.items() if k not in TIMES} for s, r in by.items()} for t, by in results.items()}


def assert_same_results(one, other):
    """All numbers, and every answer, are the same; log-probs to rounding (sums depend on the size of a batch)."""
    assert results_of(one) == results_of(other)
    rows, expected = rows_of(one), rows_of(other)
    assert rows.keys() == expected.keys()
    for key, row in rows.items():
        for name in ("logprobs", "behaviour_logprobs"):
            np.testing.assert_allclose(row.pop(name), expected[key].pop(name), rtol=1e-5, atol=1e-5)
        assert row == expected[key]
