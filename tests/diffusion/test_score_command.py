"""tracerl score: what it writes and which rows it refuses."""

import json
import shutil

import numpy as np
import pytest
from golden_utils import GOLDEN, Arrays

from tracerl_jax.launch.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    for file in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / "sdar_tiny" / file, folder)
    return folder


def golden_rows():
    """The golden decoding runs as rows; their log-probs are those of the sampler."""
    arrays = Arrays(GOLDEN / "sdar_tiny")
    meta = json.loads(str(arrays("generate")["meta"]))
    rows, logps = [], []
    for name, case in meta.items():
        data, p = arrays("generate", name), case["prompt_len"]
        done = int((data["step_map"] > 0).sum())  # whole blocks: a run with stop ids ends early
        rows.append({
            "prompt_ids": data["prompt"].tolist(), "ids": data["output"][p : p + done].tolist(),
            "step_map": data["step_map"][:done].tolist(), "block_size": case["block_size"], "name": name,
        })  # fmt: skip
        logps.append(data["logp"][:done])
    return rows, logps


def score(folder, tmp_path, lines, *flags):
    traces, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    traces.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    status = main(["score", "--model", str(folder), "--traces", str(traces), "--output", str(output), *flags])
    return status, [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else None


def test_gives_back_the_samplers_logprobs(folder, tmp_path):
    rows, logps = golden_rows()
    status, scored = score(folder, tmp_path, rows)
    assert status == 0
    assert [row["name"] for row in scored] == [row["name"] for row in rows]
    for row, logp in zip(scored, logps, strict=True):
        np.testing.assert_allclose(row["logprobs"], logp, atol=2e-4, err_msg=row["name"])


GOOD = {"prompt_ids": [1, 2, 3], "ids": [4, 5], "step_map": [1, 1], "block_size": 4}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"step_map": [1]}, "'step_map' has 1 entries but 'ids' has 2"),
        ({"step_map": [0, 1]}, "'step_map'"),
        ({"ids": [4, 384]}, "'ids' holds ids beyond the model's 384"),
        ({"prompt_ids": [-1]}, "'prompt_ids'"),
        ({"block_size": 0}, "'block_size' is 0"),
        ({"block_size": "4"}, "'block_size' is '4'"),
        ({"temperature": -1}, "'temperature' is -1"),
        ({"tail_ids": [1], "tail_step_map": [1]}, "'tail_ids'"),
        ({"ids": None}, "'ids'"),
        ("{", "not JSON"),
    ],
)  # fmt: skip
def test_bad_rows(folder, tmp_path, capsys, change, named):
    bad = change if isinstance(change, str) else GOOD | change
    status, scored = score(folder, tmp_path, [GOOD, bad])
    message = capsys.readouterr().err
    assert status == 2 and scored is None
    assert "in.jsonl:2: " in message and named in message and "on_bad_row=skip" in message


def test_skips_bad_rows(folder, tmp_path, capsys):
    status, scored = score(folder, tmp_path, [GOOD | {"ids": "x"}, GOOD | {"temperature": 0.5}], "--on_bad_row", "skip")
    assert status == 0 and len(scored) == 1 and len(scored[0]["logprobs"]) == 2
    assert "scored 1 traces, 2 tokens" in capsys.readouterr().out


def test_no_usable_row(folder, tmp_path, capsys):
    status, _ = score(folder, tmp_path, [GOOD | {"ids": "x"}], "--on_bad_row", "skip")
    assert status == 2 and "no usable trace" in capsys.readouterr().err
