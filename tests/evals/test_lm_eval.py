"""Real tasks of the lm-evaluation-harness, from local files, with the model `tracerl`."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tracerl_jax.data.jsonl import write_jsonl
from tracerl_jax.errors import ConfigError
from tracerl_jax.interop.tokenizer import decode

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra eval: pip install 'tracerl_jax[eval]'")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from tracerl_jax.evals.likelihood import log_likelihoods  # noqa: E402
from tracerl_jax.evals.lm_eval import TracerlLM  # noqa: E402
from tracerl_jax.rollout.options import Request, SamplingOptions  # noqa: E402

QUESTIONS = ["1+1=", "12+3=", "4+4=", "99+1="]

SUMS = """
task: local_sums
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["#"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""

CHOICES = """
task: local_choices
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: ["7", "30", "x"]
doc_to_target: "{{best}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def lm(model_folder):
    return TracerlLM(str(model_folder), slots=8, max_gen_toks=16, mc_samples=4)


def greedy(lm, text, max_tokens=12):
    ids = lm.tok_encode(text)
    options = SamplingOptions(strategy="static", temperature=0.0, max_tokens=max_tokens)
    (trace,) = lm._engine.generate([Request(ids, options)])
    return decode(lm.tokenizer, trace.ids)


def instances(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=pair, idx=i) for i, pair in enumerate(arguments)]


@pytest.fixture
def tasks(lm, tmp_path):
    """Half of the reference answers are what the model says, a third of the choices what it thinks likeliest."""
    best = []
    for question in QUESTIONS:
        pairs = [(lm.tok_encode(question), lm.tok_encode(choice)) for choice in ("7", "30", "x")]
        values = log_likelihoods(lm._engine.model, lm._engine.params, pairs, draws=4)
        best.append(int(np.argmax(values)))
    rows = [
        {"question": q, "answer": greedy(lm, q) if i < 2 else "no", "best": best[i] if i < 1 else (best[i] + 1) % 3}
        for i, q in enumerate(QUESTIONS)
    ]
    data = tmp_path / "rows.jsonl"
    write_jsonl(data, rows)
    (tmp_path / "tasks").mkdir()
    for name, text in (("sums", SUMS), ("choices", CHOICES)):
        (tmp_path / "tasks" / f"{name}.yaml").write_text(text.replace("DATA", str(data)))
    return tmp_path / "tasks"


def test_tasks_of_the_harness(lm, tasks, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    results = lm_eval.simple_evaluate(
        lm, tasks=["local_sums", "local_choices"], task_manager=TaskManager(include_path=str(tasks)), bootstrap_iters=0
    )["results"]  # fmt: skip
    assert results["local_sums"]["exact_match,none"] == 0.5
    assert results["local_choices"]["acc,none"] == 0.25
    assert "torch" not in sys.modules


def test_text_ends_before_the_first_stop_string(lm):
    whole = greedy(lm, "12+3=", 16)
    stops = [whole[5:7], whole[9]]
    settings = {"until": stops, "do_sample": False}  # the limit of the model arguments
    requests = instances("generate_until", ("12+3=", settings), ("12+3=", {"until": []}), ("", {"max_gen_toks": 4}))
    cut, uncut, unprompted = lm.generate_until(requests, disable_tqdm=True)
    assert uncut == whole
    assert cut == whole[: min(whole.index(stop) for stop in stops)]
    assert len(unprompted) <= 4
    assert not lm._engine.busy and lm._engine.running == 0


def test_repeats_are_different_samples_and_come_again(lm):
    request = ("12+3=", {"until": [], "do_sample": True, "temperature": 1.0, "top_p": 0.99, "max_gen_toks": 12})
    first = lm.generate_until(instances("generate_until", request, request, request), disable_tqdm=True)
    assert len(set(first)) == 3
    assert lm.generate_until(instances("generate_until", request, request, request), disable_tqdm=True) == first


def test_long_prompts_lose_their_beginning(lm, monkeypatch):
    monkeypatch.setattr(TracerlLM, "max_length", 28)
    long = "7" * 50 + "12+3="
    (text,) = lm.generate_until(instances("generate_until", (long, {"max_gen_toks": 4})), disable_tqdm=True)
    assert text == greedy(lm, long[-20:], 4)  # room for the completion, and to end its last block
    with pytest.raises(ConfigError, match="leaves no room for a prompt"):
        lm.generate_until(instances("generate_until", ("1", {"max_gen_toks": 28})), disable_tqdm=True)


def test_likelihoods(lm, monkeypatch):
    said = greedy(lm, "12+3=", 4)
    pairs = [("12+3=", said), ("12+3=", said[:-1] + ("a" if said[-1] != "a" else "b")), ("", "12")]
    (logp, greedy_), (_, other), (unprompted, _) = lm.loglikelihood(instances("x", *pairs), disable_tqdm=True)
    assert greedy_ is True and other is False
    ids = (lm.tok_encode("12+3="), lm.tok_encode(said))
    assert logp == pytest.approx(log_likelihoods(lm._engine.model, lm._engine.params, [ids], draws=4)[0], rel=1e-5)
    monkeypatch.setattr(TracerlLM, "max_length", 12)
    rolling = lm.loglikelihood_rolling(instances("x", ("12",), ("1" * 15,)), disable_tqdm=True)
    assert rolling[0] == pytest.approx(unprompted, rel=1e-5) and rolling[1] < rolling[0]


def test_wrong_arguments(lm, model_folder):
    with pytest.raises(ConfigError, match="likelihood is 'exact'"):
        TracerlLM(str(model_folder), likelihood="exact")
    with pytest.raises(ConfigError, match="generation_kwargs of the task that this model does not know: num_beams"):
        lm.generate_until(instances("generate_until", ("1", {"num_beams": 2})), disable_tqdm=True)


@pytest.mark.slow
def test_the_command_line_of_the_harness(model_folder, tasks, tmp_path):
    words = ["run", "--model", "tracerl", "--model_args", f"pretrained={model_folder},slots=8", "--tasks", "local_sums",
             "--include_path", tasks, "--output_path", tmp_path / "out"]  # fmt: skip
    command = [sys.executable, "-m", "tracerl_jax.evals.lm_eval", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["local_sums"]["exact_match,none"] == 0.5
