"""`tracerl plan` end to end: the real SDAR-8B run on H100s and TPUs, and a tiny one on a TPU slice.

Compiling takes most of the time, so programs are compiled once and looked at by many tests. The TPU compiler is told to
make less of an effort: a third of the time, and a program that is a little worse.
"""

import contextlib
import dataclasses
import io
import json

import pytest
from buffers import arrays_of, gathers_of_all_layers
from compiled import compile_program, mesh_of

from tracerl_jax.config import RunConfig
from tracerl_jax.config_io import load_config
from tracerl_jax.diffusion.packing import pack
from tracerl_jax.errors import ConfigError
from tracerl_jax.launch.cli import main
from tracerl_jax.models import PRESETS, ModelConfig
from tracerl_jax.plan import estimate, programs
from tracerl_jax.plan.estimate import COMPILER_OPTIONS, chip_bytes, estimate_run
from tracerl_jax.plan.hlo import parse
from tracerl_jax.plan.kernel_costs import live_pairs
from tracerl_jax.plan.programs import model_config, plan_run, preset_like
from tracerl_jax.plan.replays import made_up_replays
from tracerl_jax.plan.topology import parse_topology
from tracerl_jax.plan.workload import assume

EFFORT_O0 = 9  # xla.ExecutionOptions.EffortLevel
ROLLOUT = ["sync", "prefill", "decode"]
POLICY = ["replay", "policy gradient", "policy apply"]
VALUE = ["values", "value gradient", "value apply"]

TINY = ModelConfig(vocab_size=1024, width=256, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=64, mlp_width=512,
                   mask_token_id=1000, eos_token_id=1001, pad_token_id=1001, stop_token_ids=(1001,))  # fmt: skip
TINY_FLAGS = [
    f"--config.{key}={value}" for key, value in {
        "model.path": "none", "model.preset": "tiny", "task.max_prompt_tokens": 100, "rollout.max_tokens": 256,
        "rollout.slots_per_device": 8, "rollout.samples_per_prompt": 4, "rollout.prompts_per_step": 16,
        "rl.row_length": 1024, "rl.minibatches": 2,
    }.items()
]  # fmt: skip
MODEL, GPUS, CHIPS = PRESETS["sdar_8b"], "h100:32", 32
# Prompts of 1500 tokens are encoded as 1536: no size of the model is confused with that.
LONG_PROMPTS = "--config.task.max_prompt_tokens=1500"
TOKENS = {"prefill": [1536], "decode": [256], "replay": [8192, 2048], "policy gradient": [8192, 2048],
          "values": [8192, 2048], "value gradient": [8192, 2048]}  # fmt: skip


@pytest.fixture(scope="module")
def presets():
    """PRESETS with a tiny model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", TINY)
        yield PRESETS


@pytest.fixture(scope="module")
def large():
    """(plan, config, workload, {program: its compiled text as data}) of rl_sdar_8b_math:value."""
    mesh, texts = mesh_of(GPUS, 1, CHIPS, 1), []
    config = load_config(RunConfig, "rl_sdar_8b_math:value", [LONG_PROMPTS])
    workload = assume(config, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate, "parse", lambda text: texts.append(parse(text)) or texts[-1])
        run = plan_run(config, mesh, workload)
        plan = estimate_run(run, parse_topology(GPUS), mesh)
    return plan, config, workload, dict(zip([p.name for p in plan.programs], texts, strict=True))


def by_name(plan):
    return {program.name: program for program in plan.programs}


# What is planned


def test_every_program_of_a_run_is_there(large):
    plan, *_ = large
    assert {*ROLLOUT, *POLICY, *VALUE} == {p.name for p in plan.programs} and len(plan.programs) == 9
    assert plan.resident_bytes.keys() == {"policy", "policy optimizer", "value", "value optimizer"}
    assert (plan.mesh, plan.rollout_mesh) == (
        {"data": 1, "fsdp": CHIPS, "tensor": 1}, {"data": CHIPS, "fsdp": 1, "tensor": 1}
    )  # fmt: skip


def test_runs_are_those_of_an_rl_step(large):
    plan, config, workload, _ = large
    runs = {p.name: p.runs for p in plan.programs}
    responses = 128 * 32
    assert (runs["sync"], runs["decode"]) == (1, 1)
    # A response of 2000 tokens and its groups fill a row of 8192; a row of every chip is a micro-batch.
    for name in ("policy gradient", "value gradient", "replay", "values"):
        assert runs[name] == responses / CHIPS
    assert runs["policy apply"] == runs["value apply"] == config.rl.minibatches
    assert plan.response_tokens == responses * workload.response_tokens


def test_memory_adds_up(large):
    plan, *_ = large
    parameters = MODEL.num_params() * 4 / CHIPS
    assert plan.resident_bytes["policy"] == pytest.approx(parameters, rel=0.01)
    assert plan.resident_bytes["policy optimizer"] == pytest.approx(2 * parameters, rel=0.01)
    resident = sum(plan.resident_bytes.values())
    for p in plan.programs:
        assert p.overflow is None
        assert p.peak_bytes >= resident + p.temp_bytes
        assert p.peak_bytes >= p.argument_bytes + p.temp_bytes
    assert plan.peak_bytes == max(p.peak_bytes for p in plan.programs)
    found = by_name(plan)
    # Beside what stays: the sums of gradients; the decoding copy in bf16; and its cache, of pages of 64 tokens.
    assert found["policy gradient"].argument_bytes == pytest.approx(2 * parameters, rel=0.02)
    copy, cache = MODEL.num_params() * 2, 65 * 4096 * MODEL.num_layers * 2 * 8 * 128 * 2
    assert found["sync"].peak_bytes - resident >= copy
    assert found["decode"].argument_bytes == pytest.approx(copy + cache, rel=0.02)
    assert found["decode"].temp_bytes < cache / 4  # the cache is updated in place


def test_times_add_up(large):
    plan, *_ = large
    chip = plan.topology.chip
    for p in plan.programs:
        assert p.compute_seconds == p.cost.flops / chip.flops
        assert p.memory_seconds == p.cost.hbm_bytes / chip.hbm_bandwidth
        assert p.seconds == max(p.compute_seconds, p.memory_seconds, p.link_seconds)
    assert plan.step_seconds == pytest.approx(sum(p.runs * p.seconds for p in plan.programs))
    assert {p.name: p.bound for p in plan.programs if p.name in ("decode", "policy gradient", "replay")} == {
        "decode": "HBM", "policy gradient": "compute", "replay": "compute"
    }  # fmt: skip
    assert not any(p.cost.unknown_kernels | p.cost.unknown_loops for p in plan.programs)


def layer_parameters(model: ModelConfig) -> int:
    attention = 2 * model.width * model.head_dim * (model.num_heads + model.num_kv_heads)
    return model.num_layers * (attention + 3 * model.width * model.mlp_width)


def test_flops_of_training(large):
    """2 per parameter and token forward, 4 backward, 2 again for what is recomputed; the head on targets only."""
    plan, config, workload, _ = large
    model, tokens, targets = MODEL, 8192, 2048  # of a chip's row; 2000 targets in slots of 2048
    rows = pack([replay.item for replay in made_up_replays(config, config.rl, model, workload, 1)], row_length=tokens)
    found = {p.name: p.cost.flops for p in plan.programs}
    body, head = 2 * layer_parameters(model) * tokens, 2 * model.width * model.vocab_size * targets
    attention = 2 * 128 * live_pairs(rows.intervals) * model.num_heads * model.num_layers
    assert found["replay"] == pytest.approx(body + head + 2 * attention, rel=0.01)
    assert found["values"] == pytest.approx(body + 2 * attention, rel=0.01)
    # The last product of a layer is not needed again. Attention: scores and output, twice; 3 + 4 for the gradients.
    again = body - 2 * model.num_layers * model.mlp_width * model.width * tokens
    gradient = 3 * body + again + 4 * head + (2 + 2 + 7) * attention
    assert found["policy gradient"] == pytest.approx(gradient, rel=0.01)
    assert found["value gradient"] == pytest.approx(gradient - 4 * head, rel=0.01)
    assert found["policy apply"] == found["sync"] == 0


def test_cost_of_decoding(large):
    """Each forward reads every weight once and the committed keys and values of every slot."""
    plan, _, workload, _ = large
    model, slots, B = MODEL, 64, 4
    # 4096 responses in the slots of all chips; a forward for each denoise step and for each block but the last.
    response = workload.response_tokens
    forwards = 4096 / slots / CHIPS * (response / workload.tokens_per_step + response / B - 1)
    found = by_name(plan)["decode"].cost
    weights = layer_parameters(model) + model.width * model.vocab_size
    live = workload.prompt_tokens + response / 2
    attention = 4 * slots * B * (live + B) * model.num_heads * model.head_dim * model.num_layers
    assert found.flops == pytest.approx(forwards * (2 * weights * slots * B + attention), rel=0.02)
    cache = slots * live * model.num_layers * 2 * model.num_kv_heads * model.head_dim * 2
    needed = forwards * (2 * weights + cache)
    # XLA:GPU copies each layer's weights, and windows of the head, out of their stack before it reads them.
    assert needed <= found.hbm_bytes <= 3.5 * needed
    assert found.kernels["decode_attention"] == pytest.approx(forwards * model.num_layers)
    assert sum(found.collective_bytes.values()) < 1e6


def test_bytes_sent_in_training(large):
    """Weights are gathered in bf16 for the forward pass and for the backward pass; gradients are summed in pieces."""
    plan, *_ = large
    found = by_name(plan)["policy gradient"].cost.collective_bytes
    body, head, others = 2 * layer_parameters(MODEL), 2 * MODEL.width * MODEL.vocab_size, 1 - 1 / CHIPS
    assert found["all-gather", "fsdp"] == pytest.approx(others * (2 * body + 2 * head), rel=0.02)
    # The head's in float32.
    assert found["reduce-scatter", "fsdp"] == pytest.approx(others * (body + 2 * head), rel=0.02)
    assert {kind for kind, _ in found} <= {"all-gather", "reduce-scatter", "all-reduce", "all-to-all"}


# What the compiled 8B programs hold: nothing that grows with tokens^2 or tokens x vocabulary, never all layers at once


@pytest.mark.parametrize("shape", ["8192,151936", "1,151936,8192", "64,128,2,151936", "4,1244659712"])
def test_arrays_that_grow_too_fast_are_seen(shape):
    text = """
%fused (p: f32[8192,2]) -> f32[8192] {{
  %p = f32[8192,2] parameter(0)
  %inside = f32[8192,151936] broadcast(%p)
  ROOT %sum = f32[8192] reduce(%inside)
}}

ENTRY %main (x: f32[8192,2]) -> f32[8192] {{
  %x = f32[8192,2] parameter(0)
  %kernel = bf16[4096,151936] broadcast(%x)
  %f = f32[8192] fusion(%x), kind=kLoop, calls=%fused
  {line}
  ROOT %out = f32[8192] add(%f, %f)
}}"""
    assert arrays_of(parse(text.format(line="")), 8192, 151936) == set()
    found = arrays_of(parse(text.format(line=f"%logits = bf16[{shape}] broadcast(%x)")), 8192, 151936)
    assert [line.split()[1] for line in found] == ["logits"]


def test_gathers_of_all_layers_are_seen():
    text = """
ENTRY %main (x: bf16[5,512,1024]) -> bf16[5,4096,1024] {
  %x = bf16[5,512,1024] parameter(0)
  %one = bf16[1,512,1024] slice(%x)
  %layer = bf16[1,4096,1024] all-gather(%one), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={1}
  %norms = f32[5,512] slice(%x)
  %small = f32[5,4096] all-gather(%norms), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={1}
  ROOT %all = bf16[5,4096,1024] all-gather(%x), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={1}
}"""
    found = gathers_of_all_layers(parse(text), PRESETS["sdar_8b"].replace(num_layers=5))
    assert [line.split()[0] for line in found] == ["all"]


def check_buffers(name, module, model):
    for tokens in TOKENS.get(name, ()):
        assert not arrays_of(module, tokens, tokens)
        assert not arrays_of(module, tokens, model.vocab_size)
    if name != "sync":  # which makes the copy that decoding reads
        assert not gathers_of_all_layers(module, model)


@pytest.mark.parametrize("name", [*ROLLOUT, *POLICY, *VALUE])
def test_buffers_of_8b_programs_on_gpus(large, name):
    check_buffers(name, large[3][name], MODEL)


def test_buffers_of_8b_replay_on_tpus():
    config = load_config(RunConfig, "rl_sdar_8b_math", [LONG_PROMPTS])
    run = plan_run(config, mesh_of("v5p:2x2x2", 1, 8, 1), assume(config, 4))
    (replay,) = [program for program in run.programs if program.name == "replay"]
    check_buffers("replay", compile_program(replay, "tpu", optimization_level=EFFORT_O0), MODEL)


@pytest.mark.slow
@pytest.mark.parametrize("topology, chips", [("v5p:2x2x2", 8), ("v5p:4x4x4", 64)])
def test_buffers_of_8b_programs_on_tpus(topology, chips):
    config = load_config(RunConfig, "rl_sdar_8b_math:value", [LONG_PROMPTS])
    run = plan_run(config, mesh_of(topology, 1, chips, 1), assume(config, 4))
    for program in run.programs:
        module = compile_program(program, parse_topology(topology).chip.platform)
        check_buffers(program.name, module, MODEL)


# The command


def run_command(*argv):
    """(exit status, stdout, stderr) of `tracerl plan`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["plan", *argv])
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def low_effort():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(COMPILER_OPTIONS, "tpu", {"optimization_level": EFFORT_O0})
        yield


@pytest.fixture(scope="module")
def tiny_json(presets, low_effort):
    mesh_of("v5e:2x2", 1, 4, 1)  # skips where there is no compiler
    return run_command("--config", "rl_sdar_4b_math", *TINY_FLAGS, "--topology", "v5e:2x2", "--json")


def test_output_of_a_run_that_fits(large, monkeypatch):
    """The command around what the tests above look at."""
    monkeypatch.setattr(programs, "plan_run", lambda *args: None)
    monkeypatch.setattr(estimate, "estimate_run", lambda *args: large[0])
    flags = ["--config", "rl_sdar_8b_math:value", LONG_PROMPTS, "--topology", GPUS]
    status, out, _ = run_command(*flags)
    assert status == 0 and "fits: " in out and "policy gradient" in out
    status, out, _ = run_command(*flags, "--json")
    document = json.loads(out)
    assert status == 0 and document["fits"] is True and document["config"] == "rl_sdar_8b_math:value"
    assert document["workload"] == {
        "prompt_tokens": 1500, "response_tokens": 2000, "tokens_per_step": 2.6, "kept_fraction": 1
    }  # fmt: skip


@pytest.mark.slow
def test_json_of_a_tiny_run_on_tpus(tiny_json):
    status, out, _ = tiny_json
    assert status == 0
    document = json.loads(out)
    assert document["fits"] is True and document["knobs"] == []
    assert (document["config"], document["topology"], document["chips"]) == ("rl_sdar_4b_math", "v5e:2x2", 4)
    found = {p["name"]: p for p in document["programs"]}
    assert list(found) == [*ROLLOUT, *POLICY]
    for p in found.values():
        assert p["seconds"] == max(p["compute_seconds"], p["hbm_seconds"], p["link_seconds"])
        assert p["peak_bytes"] <= document["peak_bytes"] < document["hbm_bytes"]
        assert p["not_counted"] == []
    assert document["step_seconds"] == pytest.approx(sum(p["runs_per_step"] * p["seconds"] for p in found.values()))
    assert found["policy gradient"]["kernels"] == {"attention_forward": 6, "attention_backward": 3}


OVERLAP_FLAGS = [*TINY_FLAGS, "--config.rl.overlap=one_step_off"]


def test_a_run_that_overlaps_keeps_weights_and_cache_for_decoding(presets):
    mesh = mesh_of("v5e:2x2", 1, 4, 1)
    config = load_config(RunConfig, "rl_sdar_4b_math", OVERLAP_FLAGS)
    resident = {name: chip_bytes(tree) for name, tree in plan_run(config, mesh, assume(config, 4)).resident.items()}
    # A whole copy in bfloat16, but for the norms, beside a fourth in float32.
    assert resident["rollout weights"] == pytest.approx(2 * resident["policy"], rel=0.01)
    slots, tokens, heads, width = 8, 384, 2, 64
    assert resident["rollout cache"] > 2 * slots * tokens * TINY.num_layers * heads * width * 2


@pytest.mark.slow
def test_a_reward_model_is_kept_and_scores_all_samples(presets, tmp_path):
    config = {"architectures": ["Qwen3ForSequenceClassification"], "model_type": "qwen3", "vocab_size": 1024,
              "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 4, "head_dim": 16}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = [f"--config.reward.model.path={tmp_path}", "--config.reward.model.tokens_per_device=1024"]
    flags.append("--config.task.rewards={'reward_model': 1.0}")
    config = load_config(RunConfig, "rl_sdar_4b_math", [*TINY_FLAGS, *flags])
    run = plan_run(config, mesh_of("cpu", 2, 2, 2), assume(config, 4))
    parameters = 1024 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128)
    assert chip_bytes(run.resident["reward model"]) == pytest.approx(2 * parameters / 4, rel=0.02)
    (program,) = [program for program in run.programs if program.name == "reward"]
    assert program.traced.args_info[0][1].shape == (2 * 4, 512)  # 356 tokens in rows of 512, on 4 x 1024 tokens
    assert program.runs == 8  # of 64 samples


@pytest.mark.slow
def test_peaks_of_a_run_that_overlaps_hold_both(presets, low_effort, tiny_json):
    _, out, _ = run_command("--config", "rl_sdar_4b_math", *OVERLAP_FLAGS, "--topology", "v5e:2x2", "--json")
    documents = [json.loads(text) for text in (tiny_json[1], out)]
    alone, both = ({p["name"]: p for p in document["programs"]} for document in documents)
    kept = sum(documents[1]["resident_bytes"].values()) - sum(documents[0]["resident_bytes"].values())
    assert kept > 0
    gradient = both["policy gradient"]["peak_bytes"] - alone["policy gradient"]["peak_bytes"]
    assert gradient >= kept + both["decode"]["temp_bytes"]
    assert both["decode"]["peak_bytes"] >= alone["decode"]["peak_bytes"] + both["policy gradient"]["temp_bytes"]
    # The copy's only extra is that it stays; the cache stays as well.
    cache = documents[1]["resident_bytes"]["rollout cache"]
    assert both["sync"]["peak_bytes"] == pytest.approx(alone["sync"]["peak_bytes"] + cache, rel=0.05)


@pytest.mark.slow
def test_flops_of_the_tiny_gradient_double_with_its_rows(presets, low_effort, tiny_json):
    document = json.loads(tiny_json[1])
    config = load_config(RunConfig, "rl_sdar_4b_math", [*TINY_FLAGS, "--config.rl.rows_per_device=2"])
    mesh = mesh_of("v5e:2x2", 1, 4, 1)
    run = plan_run(config, mesh, assume(config, 4))
    run = dataclasses.replace(run, programs=[p for p in run.programs if p.name == "policy gradient"])
    (two,) = estimate_run(run, parse_topology("v5e:2x2"), mesh).programs
    (one,) = [p for p in document["programs"] if p["name"] == "policy gradient"]
    assert two.cost.flops == pytest.approx(2 * one["flops"], rel=0.02)
    assert two.runs == pytest.approx(one["runs_per_step"] / 2)


def test_8b_on_one_small_chip_does_not_fit():
    """The compiler gives up early on each program."""
    mesh_of("v5e:1x1", 1, 1, 1)  # skips where there is no compiler
    status, out, err = run_command("--config", "rl_sdar_8b_math", "--topology", "v5e:1x1")
    assert status == 1 and err.endswith("tracerl plan: does not fit\n")
    assert "rl_sdar_8b_math on v5e:1x1: 1 chip with 15.8 GiB for programs" in out
    assert "DOES NOT FIT: at least " in out and "more chips with a larger mesh.fsdp (1)" in out
    assert "rollout.slots_per_device (64)" in out
    rows = {line.split("  ")[0]: line for line in out.splitlines()}
    for name in (*ROLLOUT, *POLICY):
        assert "> 1" in rows[name] or "> 2" in rows[name]


@pytest.mark.parametrize(
    "argv, complaint",
    [
        (["--topology", "b200:8"], "topology 'b200:8': unknown chip 'b200'"),
        (["--topology", "v5p:4x4x4", "--config.mesh.fsdp=3"], "mesh (data=1, fsdp=3, tensor=1) needs 3 devices but"),
        (["--topology", "v5e:2x4", "--config.mesh.fsdp=1", "--config.mesh.tensor=8", "--config.mesh.data=1",
          "--config.model.path=none", "--config.model.preset=sdar_tiny"], "model.num_heads: 4 (heads) cannot be split"),
        (["--topology", "h100:8", "--config.model.path=NoSuch-7B"], "no folder here and no preset has its name"),
        (["--topology", "h100:8", "--config.model.path=none", "--config.model.preset=x"], "unknown model.preset 'x'"),
        (["--topology", "h100:8", "--config.rl.rows=1"], "--config.rl.rows: unknown key"),
        (["--topology", "h100:8", "--config.rollout.strategy=fast"], "strategy is 'fast'"),
        (["--topology", "h100:8", "--prompt_tokens", "0"], "at least one prompt token"),
        (["--topology", "h100:8", "--response_tokens", "5000"], "response_tokens is 5000, more than rollout.max_"),
        (["--topology", "h100:8", "--tokens_per_step", "9"], "tokens_per_step is 9.0, more than the block size, 4"),
        (["--topology", "h100:8", "--kept_fraction", "2"], "kept_fraction is 2.0"),
        (["--topology", "h100:8", "--utilisation", "0"], "utilisation is 0.0, must lie in (0, 1]"),
        (["--topology", "h100:8", "--config.rollout.tensor=3"], "rollout.tensor is 3"),
        (["--topology", "h100:8", "--config.rl.steps=0"], "rl.steps is 0: a plan is of the programs of RL"),
        (["--topology", "h100:8", "--config.rl.block_size=8", "--config.rl.old_logprobs=rollout"], "another rl.block_"),
        (["--topology", "h100:8", "--config.model.attention=flash"], "attention: unknown implementation 'flash'"),
        ([], "required: --topology"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_and_status_2(argv, complaint):
    status, out, err = run_command("--config", "rl_sdar_4b_math", *argv)
    assert (status, out) == (2, "")
    assert complaint in err and "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("tracerl: error: ")]) == 1


def test_models_behind_names():
    def preset_of(path):
        config = load_config(RunConfig, "rl_sdar_4b_math", [f"--config.model.path={path}"])
        found = model_config(config)
        assert (found.dtype, found.remat) == ("bfloat16", "full")
        return next(name for name, preset in PRESETS.items() if preset.replace(dtype="bfloat16", remat="full") == found)

    assert preset_of("SDAR-4B-Chat") == "sdar_4b"
    assert preset_of("models/SDAR-1.7B-Chat") == "sdar_1_7b"
    assert preset_of("JetLM/SDAR-30B-A3B-Chat-b32") == "sdar_30b_a3b"
    for path, name in (("Dream-v0-Instruct-7B", "dream_7b"), ("DiffuCoder-7B-Instruct", "diffucoder_7b"),
                       ("LLaDA-1.5-8B", "llada_1_5_8b"), ("LLaDA-8B-Instruct", "llada_8b"),
                       ("MMaDA-8B-MixCoT", "mmada_8b")):  # fmt: skip
        assert PRESETS[preset_like(path)] == PRESETS[name]
    with pytest.raises(ConfigError, match="no preset has its name"):
        preset_of("SDAR-400B")
