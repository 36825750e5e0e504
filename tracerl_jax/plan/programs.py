"""The programs of a run, traced for devices that are not there, and how often an RL step runs each."""

import dataclasses
import logging
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tracerl_jax.config import RunConfig
from tracerl_jax.data.prompts import Problem
from tracerl_jax.errors import ConfigError
from tracerl_jax.interop.hf_config import read_model_config
from tracerl_jax.models import PRESETS, Model, ModelConfig
from tracerl_jax.parallel.sharding import batch_sharding, row_shards
from tracerl_jax.plan.hlo_cost import KernelCost
from tracerl_jax.plan.kernel_costs import attention_cost, decode_cost
from tracerl_jax.plan.workload import Workload, sample_traces
from tracerl_jax.rl.experience import Sample
from tracerl_jax.rl.update import Learner, plan_replays
from tracerl_jax.rollout.engine import Engine
from tracerl_jax.rollout.options import Request
from tracerl_jax.rollout.weights import abstract_rollout_params, convert, needs_copy, rollout_model
from tracerl_jax.training.optimizer import make_optimizer
from tracerl_jax.training.run import rollout_options

log = logging.getLogger(__name__)

# Responses that are really packed to find the shapes of micro-batches; the number of rows is scaled up from them.
PACKED_SAMPLES = 64


@dataclass(frozen=True)
class PlannedProgram:
    name: str
    traced: jax.stages.Traced
    mesh: Mesh  # of the program's own devices: decoding sees them otherwise than training
    runs: float  # per RL step
    resident: Any  # those of its arguments that stay on the devices between programs
    loops: dict[str, float] = field(default_factory=dict)  # op_name of a loop whose length depends on data -> its runs
    kernel_cost: KernelCost = lambda instruction, operands: None


@dataclass(frozen=True)
class PlannedRun:
    model: Model
    programs: list[PlannedProgram]
    resident: dict[str, Any]  # what stays on the devices during RL, by what it is
    tokens_per_step: float  # response tokens of an RL step


def model_config(config: RunConfig) -> ModelConfig:
    """The run's model: of its folder, or where that is not at hand, the preset that its name begins with.

    Raises ConfigError when there is neither.
    """
    section = config.model
    how = {name: getattr(section, name) for name in ("dtype", "remat", "scan_layers", "attention")}
    if section.path is not None and Path(section.path).is_dir():
        return read_model_config(section.path, **how)
    name = section.preset or preset_like(section.path)
    if name not in PRESETS:
        raise ConfigError(f"model.path={section.path!r} is no folder here and no preset has its name: give the folder, "
                          f"or --config.model.path=none --config.model.preset=NAME with one of {', '.join(PRESETS)}.")
    return PRESETS[name].replace(**how)


def preset_like(path: str) -> str | None:
    """ "models/SDAR-8B-Chat" -> "sdar_8b"."""
    words = re.sub(r"[^a-z0-9]+", "_", Path(path).name.lower())
    matches = [name for name in PRESETS if f"{words}_".startswith(f"{name}_")]
    return max(matches, key=len, default=None)


def plan_run(config: RunConfig, mesh: Mesh, workload: Workload) -> PlannedRun:
    """Trace what `tracerl rl` with this config would compile on this mesh. Nothing is allocated.

    Raises ConfigError as the run itself would, for a model that cannot be split over the mesh, say.
    """
    model = Model(model_config(config), mesh=mesh)
    updates = config.rl.steps * config.rl.minibatches * config.rl.epochs
    learner = Learner(
        model,
        dataclasses.replace(config.rl, normaliser_constant=config.rl.normaliser_constant or workload.response_tokens),
        config.value,
        make_optimizer(config.rl.optimizer, updates),
        make_optimizer(config.value.optimizer, updates),
    )
    resident = _resident(config, learner)
    samples = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    decoder = rollout_model(model, config.rollout.tensor)
    # Kernels are chosen for the devices of the mesh in force.
    with jax.sharding.use_abstract_mesh(decoder.mesh.abstract_mesh):
        programs = _rollout_programs(config, decoder, resident["policy"], workload, samples)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        programs += _training_programs(config, learner, resident, workload, samples)
    return PlannedRun(model, programs, resident, samples * workload.response_tokens)


def _resident(config: RunConfig, learner: Learner) -> dict[str, Any]:
    trees = learner.abstract_trees()
    resident = {"policy": trees["params"], "policy optimizer": trees["train"]["policy"]}
    if config.rl.kl_to == "reference":
        resident["reference"] = trees["params"]
    if config.value.enabled:
        resident |= {"value": trees["value"], "value optimizer": trees["train"]["value"]}
    return resident


def _rollout_programs(
    config: RunConfig, model: Model, policy: Any, workload: Workload, samples: int
) -> list[PlannedProgram]:
    slots = min(samples, config.rollout.slots_per_device * row_shards(model.mesh))
    weights = abstract_rollout_params(model)
    # The vocabulary is the model's: only a tokenizer would know of padding at its end.
    engine = Engine(model, weights, batch_size=slots)
    options = rollout_options(config, seed=0)
    requests = [
        Request(_prompt(i // config.rollout.samples_per_prompt, workload, model.config), options, sample_index=i)
        for i in range(engine.batch_size)
    ]
    traced = engine.traced(requests)
    batches = math.ceil(samples / engine.batch_size)
    B = options.block_size or model.config.block_size
    # Each block is denoised, then committed by one more forward; the last one is not.
    blocks = math.ceil(workload.response_tokens / B)
    forwards = workload.response_tokens / workload.tokens_per_step + blocks - 1
    copied, mesh = needs_copy(model, policy), model.mesh
    kept = () if copied else policy
    sync = [PlannedProgram("sync", convert.trace(model, policy), mesh, 1, policy)] if copied else []
    prompts = _block_causal(*traced["prefill"].args_info[0][1].shape, B)
    live = workload.prompt_tokens + workload.response_tokens / 2
    return sync + [
        PlannedProgram(
            "prefill", traced["prefill"], mesh, batches, kept,
            kernel_cost=attention_cost(model.config, mesh, prompts),
        ),
        PlannedProgram(
            "decode", traced["decode"], mesh, batches, kept, {"jit(decode)/while": forwards},
            decode_cost(model.config, mesh, engine.batch_size, B, live),
        ),
    ]  # fmt: skip


def _block_causal(rows: int, length: int, block_size: int) -> np.ndarray:
    """Intervals [rows, length, 4] of the prefill."""
    intervals = np.zeros((rows, length, 4), np.int32)
    intervals[..., 1] = np.minimum((np.arange(length) // block_size + 1) * block_size, length)
    return intervals


def _prompt(group: int, workload: Workload, config: ModelConfig) -> np.ndarray:
    """One that no other group has."""
    ids = np.zeros(workload.prompt_tokens, np.int32)
    for i in range(min(3, len(ids))):
        group, ids[i] = divmod(group, config.mask_token_id)
    return ids


def _training_programs(
    config: RunConfig, learner: Learner, resident: dict[str, Any], workload: Workload, samples: int
) -> list[PlannedProgram]:
    block_size = config.rl.block_size or config.rollout.block_size or learner.model.config.block_size
    count = min(samples, PACKED_SAMPLES)
    traces = sample_traces(workload, count, block_size=block_size, temperature=config.rollout.temperature)
    problem = Problem(index=0, prompt_text="", prompt_ids=traces[0].prompt_ids, columns={})
    replays = [
        dataclasses.replace(replay, **_numbers(config, replay.sample))
        for part in plan_replays(
            [Sample(problem, trace, "", 0, 0.0, {}, 0.0) for trace in traces],
            dataclasses.replace(config.rl, minibatches=1, epochs=1),
            mask_id=learner.model.config.mask_token_id, block_size=block_size, seed=0, step=1,
        )
        for replay in part
    ]  # fmt: skip
    batches, _ = learner.policy_batches(replays)
    rows = batches[0]["rows"]
    values = learner.value_batches(replays)[0][0] if config.value.enabled else None
    tokens = sum(replay.item.size for replay in replays) / count * samples * workload.kept_fraction
    # Rows that the packing of the sampled responses really filled, however few of them a micro-batch could have had.
    filled = sum(int((part["rows"].intervals.any((1, 2))).sum()) for part in batches)
    fullness = sum(replay.item.size for replay in replays) / (filled * rows.ids.shape[1])
    updates = config.rl.minibatches * config.rl.epochs
    micro_batches = max(1, round(tokens / fullness / rows.ids.size))

    def spec(batch):
        sharding = batch_sharding(learner.model.mesh)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), batch)

    traced = learner.traced(spec(batches[0]), None if values is None else spec(values))
    gradients = max(updates, micro_batches * config.rl.epochs)
    recompute = config.rl.old_logprobs == "recompute" or config.rl.kl_to == "reference"
    runs = {"replay": micro_batches if recompute else 1, "values": micro_batches}
    runs |= {f"{who} gradient": gradients for who in ("policy", "value")}
    runs |= {f"{who} apply": updates for who in ("policy", "value")}
    trunk = resident["policy"] if config.value.shared_trunk else ()
    kept = {
        "replay": resident["policy"],
        "policy gradient": resident["policy"],
        "policy apply": (resident["policy"], resident["policy optimizer"]),
    }
    if config.value.enabled:
        kept |= {
            "values": (resident["value"], trunk),
            "value gradient": (resident["value"], trunk),
            "value apply": (resident["value"], resident["value optimizer"]),
        }
    attention = attention_cost(learner.model.config, learner.model.mesh, np.asarray(rows.intervals))
    return [
        PlannedProgram(name, program, learner.model.mesh, runs[name], kept[name], kernel_cost=attention)
        for name, program in traced.items()
    ]


def _numbers(config: RunConfig, sample: Sample) -> dict[str, np.ndarray]:
    """The per-token numbers an update needs; their values do not matter here."""
    zeros = np.zeros(len(sample.trace.ids), np.float32)
    return {"old_logp": zeros, "reference_logp": zeros, "old_values": zeros, "returns": zeros, "advantages": zeros}
