"""tracerl generate on the golden folder: without and with a tokenizer, bad rows, and its rows fed to tracerl score."""

import json
import re
import shutil

import numpy as np
import pytest
from golden_utils import GOLDEN, load_golden
from page_utils import page_data
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tracerl_jax.interop.tokenizer import StreamDecoder, load_tokenizer
from tracerl_jax.launch.cli import main
from tracerl_jax.models import Model
from tracerl_jax.rollout.engine import Engine, EngineConfig, Request, SamplingOptions
from tracerl_jax.rollout.stream import stream

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


def test_columns_of_a_row_are_kept_and_its_output_can_be_completed_again(tmp_path):
    row = {"id": "a", "prompt_ids": [5, 6, 7], "seed": 3, "topic": None, "text": "mine", "max_tokens": 6}
    (first,) = generate(tmp_path, [row])
    assert first | {"text": "mine"} == first | row and first["text"] is None
    assert first["forwards"] > 0 and first["denoise_forwards"] >= max(first["step_map"])
    assert len(first["logprobs"]) == len(first["ids"])
    assert generate(tmp_path, [first]) == [first]


def complete(folder, *flags):
    return main(["generate", "--model", str(folder), "--prompt", "w3 w4", "--ignore_eos", *flags])


def test_a_prompt_is_completed_on_the_terminal(tmp_path, folder_with_tokenizer, capsys):
    flags = ("--max_tokens", "30", "--temperature", "0.5", "--seed", "7")
    assert complete(folder_with_tokenizer, *flags, "--output", str(tmp_path / "prompt.jsonl")) == 0
    shown = capsys.readouterr()
    rows = [{"prompt": "w3 w4"}]
    (want,) = generate(tmp_path, rows, "--ignore_eos", *flags, model=folder_with_tokenizer)
    assert shown.out == want["text"] + "\n"
    assert re.search(r"^memory.*: weights [\d.]+ MiB, cache [\d.]+ MiB", shown.err)
    assert f"30 tokens, {want['denoise_forwards']} denoise steps" in shown.err and " forwards, " in shown.err
    (row,) = read_rows(tmp_path / "prompt.jsonl")
    assert {"line", *row} == set(want)
    for name in ("prompt", "ids", "step_map"):
        assert row[name] == want[name]


def test_samples_of_a_prompt_are_shown_one_after_the_other(tmp_path, folder_with_tokenizer, capsys):
    flags = ("--max_tokens", "9", "--num_samples", "3")
    assert complete(folder_with_tokenizer, *flags) == 0
    shown = capsys.readouterr().out
    rows = generate(tmp_path, [{"prompt": "w3 w4"}], "--ignore_eos", *flags, model=folder_with_tokenizer)
    assert shown == "\n".join(f"[sample {i} of 3]\n{row['text']}\n" for i, row in enumerate(rows, start=1))


def test_an_interrupted_completion_leaves_nothing_behind(tmp_path, folder_with_tokenizer, capsys, monkeypatch):
    steps, step = [], Engine.step

    def interrupted(engine):
        if len(steps) == 2:
            raise KeyboardInterrupt
        steps.append(engine)
        return step(engine)

    monkeypatch.setattr(Engine, "step", interrupted)
    files = {flag: tmp_path / name for flag, name in (("--output", "out.jsonl"), ("--trace", "page.html"))}
    before = sorted(tmp_path.iterdir())
    assert complete(folder_with_tokenizer, *(str(word) for pair in files.items() for word in pair)) == 130
    shown = capsys.readouterr()
    assert shown.out.strip() and shown.err.endswith("tracerl: interrupted\n")
    assert sorted(tmp_path.iterdir()) == before and not steps[0].busy


def test_a_prompt_without_a_tokenizer(capsys):
    assert complete(FOLDER) == 2
    error = capsys.readouterr().err
    assert "has none" in error and "--prompts IN.jsonl" in error and "prompt_ids" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "one of the arguments --prompt --prompts is required"),
        (["--prompt", "a", "--prompts", "b"], "not allowed with"),
        (["--prompts", "b"], "--prompts needs --output"),
    ],
)
def test_what_is_to_be_completed_and_where_it_goes(capsys, flags, message):
    assert main(["generate", "--model", str(FOLDER), *flags]) == 2
    assert message in capsys.readouterr().err


def test_the_trace_page_holds_every_completion(tmp_path, folder_with_tokenizer):
    page = tmp_path / "page.html"
    flags = ("--max_tokens", "6", "--num_samples", "2", "--trace", str(page))
    rows = generate(tmp_path, [{"prompt": "w3 w4"}, {"prompt_ids": [8]}], *flags, model=folder_with_tokenizer)
    data = page_data(page.read_text())
    assert [sample["name"] for sample in data["samples"]] == [
        f"line {line}, sample {sample}" for line in (1, 2) for sample in (1, 2)
    ]
    for row, sample in zip(rows, data["samples"], strict=True):
        assert {key: sample[key] for key in ("ids", "step_map", "text")} == {
            key: row[key] for key in ("ids", "step_map", "text")
        }
    assert [sample["prompt"] for sample in data["samples"]] == ["w3 w4"] * 2 + ["w8"] * 2


def test_streamed_pieces_join_to_the_trace(folder_with_tokenizer):
    golden, tokenizer = load_golden("sdar_tiny"), load_tokenizer(folder_with_tokenizer)
    config = EngineConfig(slots=2, forwards_per_chunk=2, valid_vocab=200)
    engine = Engine(Model(golden.config), golden.params, config)
    requests = [Request([3, 4 + i], SamplingOptions(max_tokens=10 + 5 * i, ignore_eos=True)) for i in range(3)]
    ids, texts, traces = [[], [], []], ["", "", ""], {}
    decoders = [StreamDecoder(tokenizer) for _ in requests]
    for i, new, trace in stream(engine, requests):
        ids[i].append(new)
        texts[i] += decoders[i].push(new)
        if trace is not None:
            traces[i] = trace
    for i, trace in sorted(traces.items()):
        assert len(ids[i]) > 1 and np.concatenate(ids[i]).tolist() == trace.ids.tolist()
        assert texts[i].split() == [f"w{token}" for token in trace.ids]
    assert len(traces) == 3 and not engine.busy

    pieces = stream(engine, requests)
    next(pieces)
    assert engine.busy
    pieces.close()
    assert not engine.busy


BAD_ROWS = [
    ({"max_tokens": 4}, "'prompt' (text) or 'prompt_ids' is needed"),
    ({"prompt": "hello"}, "no tokenizer"),
    ({"prompt_ids": []}, "prompt_ids is empty"),
    ({"prompt_ids": [1, [2]]}, "list of integers"),
    ({"prompt_ids": [1, 999]}, "from 0 to 383"),
    ({"prompt_ids": [375]}, "contains the mask id 375"),
    ({"prompt_ids": [1], "strategy": "best"}, "strategy is 'best'"),
    ({"prompt_ids": [1], "temperature": "hot"}, "temperature is 'hot'"),
    ({"prompt_ids": [1], "max_token": 3}, "unknown field 'max_token'; did you mean 'max_tokens'?"),
    ({"prompt_ids": [1], "Denoise-Steps": 3}, "did you mean 'denoising_steps'?"),
    ({"prompt_ids": [1], "dynamic_threshold": 0.5}, "did you mean 'threshold'?"),
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


def test_flags_that_the_model_cannot_take_are_not_called_a_bad_row(tmp_path, capsys):
    """But a row's own field is, and rows that set it themselves need no good flag."""
    model, flags = GOLDEN / "llada_tiny", ("--block_size", "4", "--max_tokens", "10")
    assert generate(tmp_path, [{"prompt_ids": [1], "max_tokens": n} for n in (8, 9)], *flags, model=model) is None
    error = capsys.readouterr().err
    assert "prompts.jsonl:2: the row: max_tokens 9 is no multiple" in error and "correct the row" in error
    assert generate(tmp_path, [{"prompt_ids": [1]}], *flags, "--on_bad_row", "skip", model=model) is None
    error = capsys.readouterr().err
    assert "the decoding flags: max_tokens 10 is no multiple of block_size 4" in error and "the row" not in error
