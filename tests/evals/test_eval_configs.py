"""What a config says about evaluation: options of both strategies, and `tracerl eval --config`."""

import json

import pytest

from tracerl_jax.config import RunConfig
from tracerl_jax.config_io import load_config
from tracerl_jax.data.jsonl import write_jsonl
from tracerl_jax.errors import ConfigError
from tracerl_jax.evals import manifest as manifest_module
from tracerl_jax.evals.runner import eval_protocols
from tracerl_jax.launch.cli import main
from tracerl_jax.parallel import facts
from tracerl_jax.report.run_dir import compare_configs

OWN = {"max_tokens": 1024, "block_size": 32, "temperature": 0.1, "top_k": 40, "top_p": 0.95, "confidence": "truncated",
       "first_token": True}  # fmt: skip
LLADA = {**OWN, "max_tokens": 512, "top_k": 0, "top_p": 1.0, "confidence": "untempered", "first_token": False}
FAMILIES = {"dream_7b": OWN, "diffucoder_7b": OWN, "llada_8b": LLADA, "mmada_8b": LLADA}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_evaluated_with_the_papers_settings(family):
    config = load_config(RunConfig, f"eval_{family}", [])
    found = eval_protocols(config)
    assert list(found) == ["dynamic", "static"] and found["dynamic"].threshold == 0.95
    for name, options in found.items():
        assert options.strategy == name
        assert {key: getattr(options, key) for key in FAMILIES[family]} == FAMILIES[family]
    assert (config.eval.samples_per_prompt, config.rl.steps, config.task.eval_path) == (3, 0, None)
    assert (config.rollout.cache, config.rollout.horizon) == ("prefix", 32 + 128)


def test_defaults_are_those_of_the_papers_tables():
    found = eval_protocols(load_config(RunConfig, "rl_sdar_4b_math", []))
    assert (found["dynamic"].temperature, found["static"].temperature) == (1.0, 0.0)
    assert {(o.confidence, o.first_token, o.top_k, o.top_p) for o in found.values()} == {("policy", False, 0, 1.0)}


CONFIG = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({
        "model": {"preset": "sdar_tiny"}, "seed": 3,
        "rollout": {"max_tokens": 8, "block_size": 8, "slots_per_device": 2, "confidence": "truncated"},
        "eval": {"strategies": ("static",), "static_temperature": 0.5, "top_k": 3, "samples_per_prompt": 2, "limit": 2},
    })
"""


def test_hosts_whose_config_files_hold_different_settings_would_differ(model_folder, tmp_path, monkeypatch):
    """The processes of a job compare what the files say, not only their names."""
    told = []

    def check_alike(config):
        told.append(json.loads(json.dumps(config)))
        raise ConfigError("enough")

    monkeypatch.setattr(facts, "check_alike", check_alike)
    for text in (CONFIG, CONFIG.replace('"top_k": 3', '"top_k": 4')):
        (tmp_path / "own.py").write_text(text)
        words = ["--model", str(model_folder), "--config", str(tmp_path / "own.py"), "--tasks", "arithmetic"]
        assert main(["eval", *words]) == 2
    assert compare_configs(*told) == {"eval.top_k": (3, 4)}


def test_command_takes_a_config_and_flags_go_before_it(model_folder, tmp_path):
    (tmp_path / "own.py").write_text(CONFIG)
    words = ["--model", str(model_folder), "--config", str(tmp_path / "own.py"), "--tasks", "arithmetic",
             "--output", str(tmp_path / "out"), "--config.eval.top_p=0.5", "--seed", "7"]  # fmt: skip
    assert main(["eval", *words]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    (options,) = manifest["strategies"].values()
    wanted = {"strategy": "static", "temperature": 0.5, "top_k": 3, "top_p": 0.5, "max_tokens": 8, "block_size": 8,
              "confidence": "truncated", "seed": 7}  # fmt: skip
    assert wanted.items() <= options.items()
    assert manifest["tasks"]["arithmetic"]["samples"] == manifest["tasks"]["arithmetic"]["problems"] == 2
    result = json.loads((tmp_path / "out" / "results.json").read_text())["arithmetic"]["static"]
    assert result["samples"] == 4


TASK = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({"model": {"preset": "sdar_tiny"}, "rollout": {"max_tokens": 8}, "task": %r})
"""


@pytest.fixture
def evaluated(model_folder, tmp_path, monkeypatch):
    """What would be decoded, as {task: (Task, problems, samples)}; nothing is."""

    def of(section, *words):
        def make_manifest(model, dtype, tasks, *_):
            told.update(tasks)
            raise ConfigError("enough")

        told = {}
        monkeypatch.setattr(manifest_module, "make_manifest", make_manifest)
        (tmp_path / "own.py").write_text(TASK % section)
        assert main(["eval", "--model", str(model_folder), "--output", str(tmp_path / "out"), *words]) == 2
        return told

    return of


def test_the_task_of_a_config_is_evaluated_as_its_run_does(evaluated, tmp_path):
    config = ("--config", str(tmp_path / "own.py"))
    section = {"name": "arithmetic", "options": {"digits": 1, "train_count": 9, "test_count": 3}, "prefix": "so ",
               "rewards": {"exact_match": 1.0, "ascii_share": 0.5}}  # fmt: skip
    rows = [{"question": "1+1=", "ground_truth_answer": "2"}] * 2
    write_jsonl(tmp_path / "rows.jsonl", rows)
    of_rows = f"jsonl={tmp_path / 'rows.jsonl'}"
    told = evaluated(section, *config, "--tasks", "arithmetic,jsonl", "--path", of_rows)
    task, problems, _ = told["arithmetic"]
    assert task.rewards == section["rewards"] and len(problems) == 3
    assert all(problem.prompt_text.endswith("=so ") for problem in problems)
    task, problems, _ = told["jsonl"]  # of which the config says nothing
    assert task.rewards == {"math": 1.0} and [problem.prompt_text for problem in problems] == ["1+1="] * 2

    flags = ("--options", "arithmetic=train_count=9,test_count=4")
    assert len(evaluated(section, *config, "--tasks", "arithmetic", *flags)["arithmetic"][1]) == 4
    words = ("--config.task.name=arithmetic", "--config.task.prefix=so ", *flags)  # no run's config
    assert evaluated(section, "--tasks", "arithmetic", *words)["arithmetic"][1][0].prompt_text.endswith("=")


def test_the_held_out_file_of_a_config_is_read_unless_a_flag_names_another(evaluated, tmp_path):
    for name, count in (("own", 1), ("other", 2)):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"question": "1+1=", "ground_truth_answer": "2"}] * count)
    words = ("--config", str(tmp_path / "own.py"), "--tasks", "jsonl")
    section = {"name": "jsonl", "eval_path": str(tmp_path / "own.jsonl")}
    assert len(evaluated(section, *words)["jsonl"][1]) == 1
    assert len(evaluated(section, *words, "--path", f"jsonl={tmp_path / 'other.jsonl'}")["jsonl"][1]) == 2
