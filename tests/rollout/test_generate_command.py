"""tracerl generate on the golden folder: without and with a tokenizer, bad rows, and its rows fed to tracerl score."""

import json
import shutil

import numpy as np
import pytest
from golden_utils import GOLDEN, load_golden
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tracerl_jax.launch.cli import main

FOLDER = GOLDEN / "sdar_tiny"
TEMPLATE = "{% for m in messages %}<user> {{ m.content }} <bot>{% endfor %}"


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def generate(tmp_path, rows, *flags, model=FOLDER):
    """The output rows, or None when the command failed."""
    prompts, output = write_rows(tmp_path / "prompts.jsonl", rows), tmp_path / "out.jsonl"
    status = main(["generate", "--model", str(model), "--prompts", str(prompts), "--output", str(output), *flags])
    assert status in (0, 2)
    assert output.exists() == (status == 0)
    return read_rows(output) if status == 0 else None


def golden_row(case):
    arrays = load_golden("sdar_tiny").arrays
    want, meta = arrays("generate", case), json.loads(str(arrays("generate")["meta"]))[case]
    row = {key: meta[key] for key in ("strategy", "threshold", "denoising_steps")}
    row |= {"prompt_ids": want["prompt"].tolist(), "max_tokens": len(want["output"]) - len(want["prompt"])}
    return row, want


def test_golden_rows_and_their_scores(tmp_path, capsys):
    rows, wants = zip(*map(golden_row, ("g00", "g12", "g39")), strict=True)
    flags = ("--temperature", "0", "--ignore_eos", "--slots", "4")
    got = generate(tmp_path, [*rows, {"prompt_ids": [5, 6, 7], "temperature": 0.7, "max_tokens": 5}], *flags)
    for row, want in zip(got, wants, strict=False):
        assert row["ids"] == want["output"][len(want["prompt"]) :].tolist()
        assert row["step_map"] == want["step_map"].tolist()
        np.testing.assert_allclose(row["logprobs"], want["logp"], atol=2e-4)
        assert row["stop_reason"] == "length"
        assert row["text"] is None
    assert [row["line"] for row in got] == [1, 2, 3, 4]
    assert [row["temperature"] for row in got] == [0.0, 0.0, 0.0, 0.7]

    scored = tmp_path / "scored.jsonl"
    command = ["score", "--model", str(FOLDER), "--traces", str(tmp_path / "out.jsonl"), "--output", str(scored)]
    assert main(command) == 0, capsys.readouterr().err
    for row, again in zip(got, read_rows(scored), strict=True):
        np.testing.assert_allclose(again["logprobs"], row["logprobs"], atol=1e-4)


def test_samples_of_a_prompt_are_consecutive_rows(tmp_path):
    rows = [{"prompt_ids": [5, 6, 7]}, {"prompt_ids": [8], "seed": 4}]
    got = generate(tmp_path, rows, "--num_samples", "2", "--max_tokens", "6", "--slots", "4")
    assert [(row["line"], row["sample_index"]) for row in got] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert len({tuple(row["ids"]) for row in got}) == 4


@pytest.fixture
def folder_with_tokenizer(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(FOLDER / name, folder)
    vocabulary = {f"w{i}": i for i in range(200)} | {"<user>": 200, "<bot>": 201, "<unk>": 202}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", chat_template=TEMPLATE)
    fast.save_pretrained(folder)
    return folder


def test_text_prompts(tmp_path, folder_with_tokenizer):
    flags = ("--max_tokens", "4", "--ignore_eos")
    chat, ids = generate(
        tmp_path, [{"prompt": "w3 w4"}, {"prompt_ids": [200, 3, 4, 201]}], *flags, model=folder_with_tokenizer
    )
    assert chat["prompt_ids"] == [200, 3, 4, 201]
    assert chat["ids"] == ids["ids"]
    assert max(chat["ids"]) < 203  # ids without a token are never sampled
    names = {200: "<user>", 201: "<bot>"}
    assert chat["text"].split() == [names.get(i, f"w{i}") for i in chat["ids"] if i != 202]
    (raw,) = generate(tmp_path, [{"prompt": "w3 w4"}], *flags, "--raw", model=folder_with_tokenizer)
    assert raw["prompt_ids"] == [3, 4]


BAD_ROWS = [
    ({"max_tokens": 4}, "'prompt' (text) or 'prompt_ids' is needed"),
    ({"prompt": "hello"}, "no tokenizer"),
    ({"prompt_ids": []}, "prompt_ids is empty"),
    ({"prompt_ids": [1, [2]]}, "list of integers"),
    ({"prompt_ids": [1, 999]}, "from 0 to 383"),
    ({"prompt_ids": [375]}, "contains the mask id 375"),
    ({"prompt_ids": [1], "strategy": "best"}, "strategy is 'best'"),
    ({"prompt_ids": [1], "temperature": "hot"}, "temperature is 'hot'"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_a_bad_row_is_named_with_its_line(tmp_path, capsys, row, message):
    assert generate(tmp_path, [{"prompt_ids": [1]}, row], "--max_tokens", "4") is None
    error = capsys.readouterr().err
    assert "prompts.jsonl:2: " in error
    assert message in error


def test_bad_rows_can_be_skipped(tmp_path):
    rows = [row for row, _ in BAD_ROWS]
    got = generate(tmp_path, [*rows, {"prompt_ids": [1], "max_tokens": 3}], "--on_bad_row", "skip")
    assert [row["line"] for row in got] == [len(rows) + 1]


def test_a_file_without_usable_rows(tmp_path, capsys):
    assert generate(tmp_path, []) is None
    assert "holds no usable row" in capsys.readouterr().err


def test_a_bad_flag_is_named(tmp_path, capsys):
    assert generate(tmp_path, [{"prompt_ids": [1]}], "--top_p", "0") is None
    assert "top_p is 0" in capsys.readouterr().err
