"""The evaluation's numbers on hand-made traces, and the command on a tiny model folder."""

import json
import math

import jax
import numpy as np
import pytest

from tracerl_jax.data.char_tokenizer import build_char_tokenizer
from tracerl_jax.data.jsonl import read_jsonl, write_jsonl
from tracerl_jax.data.prompts import Problem
from tracerl_jax.diffusion.trace import Trace
from tracerl_jax.errors import ConfigError
from tracerl_jax.evals.runner import evaluate, protocol
from tracerl_jax.interop.hf_save import save_hf
from tracerl_jax.launch.cli import main
from tracerl_jax.models import Model, ModelConfig


class ScriptedEngine:
    """Answers request i with `answers[i]`: (text ids, denoise forwards, stop reason); a commit per further block."""

    def __init__(self, answers):
        self.answers = answers
        self.requests = []

    def generate(self, requests):
        self.requests = list(requests)
        for request, (ids, forwards, stop) in zip(self.requests, self.answers, strict=True):
            nothing = np.zeros(0, np.int32)
            yield Trace(
                prompt_ids=np.asarray(request.prompt_ids, np.int32),
                ids=np.array(ids, np.int32),
                step_map=np.ones(len(ids), np.int32),
                logprobs=np.zeros(len(ids), np.float32),
                behaviour_logprobs=np.zeros(len(ids), np.float32),
                tail_ids=nothing,
                tail_step_map=nothing,
                block_size=4,
                temperature=request.options.temperature,
                denoise_forwards=forwards,
                stop_reason=stop,
                sample_index=request.sample_index,
                forwards=forwards + (len(ids) - 1) // 4,
            )


def problems(*golds):
    return [
        Problem(index, f"q{index}", np.array([1, 2, 3, 4 + index]), {"ground_truth_answer": gold})
        for index, gold in enumerate(golds)
    ]


def text_of(ids):
    return "".join(str(i) for i in ids)


def test_numbers():
    engine = ScriptedEngine(
        [
            ([7, 2], 1, "stop"),  # right
            ([7, 3, 1, 1], 2, "stop"),
            ([8], 1, "stop"),  # right
            ([8, 0, 0, 0, 0, 0, 0, 0], 6, "length"),
            ([1], 1, "stop"),  # no reference answer
            ([1], 1, "stop"),
        ]
    )
    options = protocol("dynamic", max_tokens=8, seed=3)
    seen = []
    result = evaluate(
        engine, problems("72", "8", None), {"exact_match": 0.5}, "exact_match", options=options, decode=text_of,
        samples_per_prompt=2, watch=lambda traces: (seen.append(trace) or trace for trace in traces),
    )  # fmt: skip
    assert [request.sample_index for request in engine.requests] == [0, 1] * 3
    assert all(request.options is options for request in engine.requests)
    assert len(seen) == 6
    tokens, steps, commits = 17, 12, 1  # only the fourth answer fills two blocks
    assert result.summary() == {
        "accuracy": 0.5,
        "tokens_per_step": tokens / steps,
        "tokens_per_forward": tokens / (steps + commits),
        "response_length": tokens / 6,
        "truncated_fraction": 1 / 6,
        "n": 3,
        "samples": 6,
        "no_verdict": 2,
    }
    first, last = result.records[0], result.records[-1]
    assert (first["index"], first["prompt"], first["text"]) == (0, "q0", "72")
    assert (first["correct"], first["reward"], first["rewards"]) == (True, 0.5, {"exact_match": 1.0})
    assert (last["index"], last["sample_index"], last["correct"]) == (2, 1, None) and math.isnan(last["reward"])
    assert first["ids"] == [7, 2] and first["step_map"] == [1, 1]


def test_unknown_accuracy_is_null():
    engine = ScriptedEngine([([1], 1, "stop")])
    options = protocol("dynamic", max_tokens=8)
    result = evaluate(engine, problems(None), {"exact_match": 1.0}, "exact_match", options=options, decode=text_of)
    assert math.isnan(result.accuracy) and result.summary()["accuracy"] is None
    json.dumps(result.summary(), allow_nan=False)


def test_greedy_answers_once():
    engine = ScriptedEngine([([8], 1, "stop"), ([9], 1, "stop")])
    result = evaluate(
        engine, problems("8", "8"), {}, "exact_match", options=protocol("static", max_tokens=8), decode=text_of,
        samples_per_prompt=5,
    )  # fmt: skip
    assert (result.accuracy, result.n, result.samples) == (0.5, 2, 2)


def test_protocols():
    dynamic = protocol("dynamic", max_tokens=9, block_size=8, seed=5)
    assert (dynamic.strategy, dynamic.threshold, dynamic.temperature) == ("dynamic", 0.9, 1.0)
    assert (dynamic.max_tokens, dynamic.block_size, dynamic.seed) == (9, 8, 5)
    static = protocol("static", max_tokens=9, threshold=0.5, temperature=0.7)
    assert (static.strategy, static.temperature, static.denoising_steps) == ("static", 0.0, None)
    with pytest.raises(ConfigError, match="unknown evaluation strategy 'greedy'; use one of dynamic, static"):
        protocol("greedy", max_tokens=9)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "hf"
    config = ModelConfig(
        vocab_size=32, width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=32,
        mask_token_id=2, eos_token_id=1, pad_token_id=0, stop_token_ids=(1,),
    )  # fmt: skip
    model = Model(config)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(leaf.dtype), model.abstract_params())
    save_hf(folder, model, params)
    build_char_tokenizer(folder)
    return folder


def test_command(model_folder, tmp_path, capsys):
    output, samples = tmp_path / "out.json", tmp_path / "samples.jsonl"
    arguments = ["eval", "--model", str(model_folder), "--task", "arithmetic", "--options", "digits=1,max_operands=4",
                 "--limit", "6", "--samples", "2", "--max_tokens", "8", "--slots", "8",
                 "--output", str(output), "--samples_output", str(samples)]  # fmt: skip
    assert main(arguments) == 0
    results = json.loads(output.read_text())
    assert list(results) == ["dynamic", "static"]
    for name, answers in (("dynamic", 12), ("static", 6)):
        assert (results[name]["n"], results[name]["samples"]) == (6, answers)
        assert 0 <= results[name]["accuracy"] <= 1
    assert results["static"]["tokens_per_step"] <= 1
    rows = [row for _, row in read_jsonl(samples, required=["strategy", "prompt", "text", "logprobs"])]
    assert len(rows) == 18
    for row in rows:
        Trace.from_row(row)
        assert 1 <= len(row["ids"]) <= 8 and len(row["text"]) <= len(row["ids"])
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:3] == ["strategy", "accuracy", "tokens/step"]
    assert [line.split()[0] for line in table[1:]] == ["dynamic", "static"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--task", "jsonl"], "task jsonl reads files: set its path"),
        (["--task", "arithmetic", "--strategies", "dynamic,greedy"], "unknown evaluation strategy 'greedy'"),
        (["--task", "arithmetic", "--limit", "0"], "--limit is 0; it must be at least 1"),
        (["--task", "arithmetic", "--options", "digits"], "--options: digits= is not of the form NAME=INTEGER"),
        (["--task", "jsonl", "--path", "ROWS"], "rows.jsonl:2: the prompt has 9 tokens, the limit is 8"),
    ],
)
def test_mistakes_are_one_line_and_status_2(model_folder, tmp_path, capsys, arguments, message):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"question": "1+1=", "ground_truth_answer": "2"}, {"question": "1" * 9, "response": "1"}])
    arguments = [str(path) if word == "ROWS" else word for word in arguments]
    assert main(["eval", "--model", str(model_folder), "--max_prompt_tokens", "8", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_model_without_tokenizer(model_folder, tmp_path, capsys):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((model_folder / name).read_bytes())
    assert main(["eval", "--model", str(tmp_path), "--task", "arithmetic"]) == 2
    assert "has no tokenizer" in capsys.readouterr().err
