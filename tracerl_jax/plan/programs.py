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
from tracerl_jax.interop.hf_reward import describe_reward_model
from tracerl_jax.kernels.decode.chunked import CHUNK
from tracerl_jax.kernels.dispatch import target_platform
from tracerl_jax.kernels.logprob.draws import group_size
from tracerl_jax.models import PRESETS, Model, ModelConfig
from tracerl_jax.parallel.sharding import batch_sharding, row_shards
from tracerl_jax.plan.hlo_cost import KernelCost
from tracerl_jax.plan.kernel_costs import attention_cost, decode_cost
from tracerl_jax.plan.workload import Workload, sample_traces
from tracerl_jax.rewards.scorer import row_length, rows_of_batch, score_rows
from tracerl_jax.rl.experience import Sample
from tracerl_jax.rl.loop import make_learner
from tracerl_jax.rl.update import Learner, Replay, plan_replays
from tracerl_jax.rollout.engine import Engine, Request
from tracerl_jax.rollout.weights import abstract_rollout_params, convert, needs_copy, rollout_model, snapshot
from tracerl_jax.training.run import engine_config, rollout_options
from tracerl_jax.training.step import sharded_abstract_params

log = logging.getLogger(__name__)

KERNELS = ("attention:", "decode_attention:", "token_logprobs:", "sample_tokens:")  # how their errors begin

# Responses that are really packed to find the shapes of micro-batches; the number of rows is scaled up from them.
PACKED_SAMPLES = 64


@dataclass(frozen=True)
class PlannedProgram:
    name: str
    traced: jax.stages.Traced
    mesh: Mesh  # of the program's own devices: decoding sees them otherwise than training
    runs: float  # per RL step
    resident: Any  # those of its arguments that stay on the devices between programs
    loops: dict[str, float] = field(default_factory=dict)  # of lengths that depend on data, see program_cost
    kernel_cost: KernelCost = lambda instruction, operands: None


@dataclass(frozen=True)
class PlannedRun:
    model: Model
    rollout_mesh: Mesh
    programs: list[PlannedProgram]
    resident: dict[str, Any]  # what stays on the devices during RL, by what it is
    beside: tuple[str, ...]  # programs that run while those of training do, by name
    tokens_per_step: float  # response tokens of an RL step


def model_config(config: RunConfig) -> ModelConfig:
    """The run's model: of its folder, or where that is not at hand, the preset that its name begins with.

    Raises ConfigError when there is neither.
    """
    section = config.model
    how = {name: getattr(section, name) for name in ("dtype", "remat", "scan_layers", "attention")}
    if section.preset is not None:
        if section.preset not in PRESETS:
            raise ConfigError(f"unknown model.preset {section.preset!r}; there are {', '.join(PRESETS)}")
        return PRESETS[section.preset].replace(**how)
    if Path(section.path).is_dir():
        return read_model_config(section.path, **how)
    if name := preset_like(section.path):
        return PRESETS[name].replace(**how)
    raise ConfigError(f"model.path={section.path!r} is no folder here and no preset has its name: give the folder, or "
                      f"--config.model.path=none --config.model.preset=NAME with one of {', '.join(PRESETS)}.")


def preset_like(path: str) -> str | None:
    """ "models/SDAR-8B-Chat" -> "sdar_8b"."""
    words = re.sub(r"[^a-z0-9]+", "_", Path(path).name.lower())
    matches = [name for name in PRESETS if f"{words}_".startswith(f"{name}_")]
    return max(matches, key=len, default=None)


def plan_run(config: RunConfig, mesh: Mesh, workload: Workload) -> PlannedRun:
    """Trace what `tracerl rl` with this config would compile on this mesh. Nothing is allocated.

    Raises ConfigError as the run itself would, for a model that cannot be split over the mesh, say, and for a run
    without RL.
    """
    if config.rl.steps == 0:
        raise ConfigError("rl.steps is 0: a plan is of the programs of RL, and this run has only supervised training")
    model = Model(model_config(config), mesh=mesh)
    config.check_states(model.config.block_size)
    learner = make_learner(model, config)
    resident = _resident(config, learner)
    decoder = rollout_model(model, config.rollout.tensor)
    try:
        # Kernels are chosen for the devices of the mesh in force.
        with jax.sharding.use_abstract_mesh(decoder.mesh.abstract_mesh):
            programs = _rollout_programs(config, decoder, resident, workload)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            programs += _training_programs(config, learner, resident, workload)
            programs += _reward_programs(config, mesh, resident, workload)
    except ValueError as error:
        if not str(error).startswith(KERNELS):
            raise
        raise ConfigError(str(error)) from error  # a kernel that is not made for these sizes says so
    beside = () if config.rl.overlap == "none" else ("prefill", "decode")
    return PlannedRun(model, decoder.mesh, programs, resident, beside, _samples(config) * workload.response_tokens)


def _samples(config: RunConfig) -> int:
    """Responses of an RL step."""
    return config.rollout.prompts_per_step * config.rollout.samples_per_prompt


def _resident(config: RunConfig, learner: Learner) -> dict[str, Any]:
    trees = learner.abstract_trees()
    resident = {"policy": trees["params"], "policy optimizer": trees["train"]["policy"]}
    if config.rl.kl_to == "reference":
        resident["reference"] = trees["params"]
    if config.value.enabled:
        resident |= {"value": trees["value"], "value optimizer": trees["train"]["value"]}
    return resident


def _rollout_programs(
    config: RunConfig, model: Model, resident: dict[str, Any], workload: Workload
) -> list[PlannedProgram]:
    """Where rollouts overlap with updates, their weights and cache are added to `resident`."""
    if model.config.attention_mode == "full":
        raise ConfigError("the rollout of a full-attention model cannot be planned yet; with rl.steps=0 its supervised "
                          "training can")  # fmt: skip
    section, samples, policy = config.rollout, _samples(config), resident["policy"]
    slots, shards = section.slots_per_device * row_shards(model.mesh), row_shards(model.mesh)
    # The vocabulary is the model's: only a tokenizer would know of padding at its end.
    engine = Engine(
        model, abstract_rollout_params(model),
        engine_config(section, slots),
    )
    options = rollout_options(section, seed=0)
    requests = [
        Request(_prompt(i // section.samples_per_prompt, config, model.config), options, sample_index=i)
        for i in range(samples)
    ]
    traced, groups = engine.traced(requests), engine.groups(requests)
    B = options.block_size or model.config.block_size
    forwards, live = _decoding(config, workload, B, slots, groups > 1)
    mesh, overlap = model.mesh, config.rl.overlap != "none"
    if overlap:
        weights, state = abstract_rollout_params(model), engine.abstract_state(requests)
        resident |= {"rollout weights": weights, "rollout cache": state}
        kept = {"prefill": (weights, state.cache), "decode": (weights, state)}
        # What it makes takes the place of the weights before.
        sync = [PlannedProgram("sync", snapshot.trace(model, policy), mesh, 1, (policy, weights))]
    else:
        copied = needs_copy(model, policy)
        kept = dict.fromkeys(("prefill", "decode"), () if copied else policy)
        sync = [PlannedProgram("sync", convert.trace(model, policy), mesh, 1, policy)] if copied else []
    if "prefill" not in traced:
        raise ConfigError(f"task.max_prompt_tokens is {config.task.max_prompt_tokens}, less than a block of {B}")
    prompts = _block_causal(*traced["prefill"].args_info[0][2].shape, B)
    calls = math.ceil(section.prompts_per_step / shards / (len(prompts) // shards))
    # The head sees the positions still masked, (tokens_per_step + B) / 2 of a block on average, a group at a time. No
    # draft is assumed to be right.
    positions = min(slots, samples) / shards * B * groups
    head_groups = math.ceil((workload.tokens_per_step + B) / (2 * B) * positions / group_size(round(positions)))
    chunk = CHUNK[target_platform(mesh.devices.flat[0])]
    return sync + [
        PlannedProgram(
            "prefill", traced["prefill"], mesh, calls, kept["prefill"],
            kernel_cost=attention_cost(model.config, mesh, prompts[:1], len(prompts)),
        ),
        PlannedProgram(
            "decode", traced["decode"], mesh, 1, kept["decode"],
            # Of the engine, of the fused head, and of `chunked_decode_attention` for backends without a kernel.
            {"jit(decode)/while": forwards, "body/shard_map/while": head_groups,
             "attention/shard_map/while": math.ceil(live / chunk)},
            decode_cost(model.config, mesh, min(slots, samples), groups * B, live, section.kv_dtype),
        ),
    ]  # fmt: skip


def _decoding(
    config: RunConfig, workload: Workload, block_size: int, slots: int, fused: bool
) -> tuple[float, float]:
    """(forwards of an RL step's decoding, committed tokens of a slot on average over them).

    Slots are refilled as they become free, so all of them work until the samples run out, and then the last ones as
    long as the longest response takes beyond the mean. Each block is denoised and, unless commits are fused, then
    committed by one more forward, but not the last one.
    """

    def of(tokens: float) -> float:
        return tokens / workload.tokens_per_step + (0 if fused else math.ceil(tokens / block_size) - 1)

    longest, response = config.rollout.max_tokens, workload.response_tokens
    rounds = max(1.0, _samples(config) / slots)
    return rounds * of(response) + of(longest) - of(response), workload.prompt_tokens + response / 2


def _reward_programs(
    config: RunConfig, mesh: Mesh, resident: dict[str, Any], workload: Workload
) -> list[PlannedProgram]:
    """Of the reward model, where there is one; its weights are added to `resident`. Chats are taken to be as long as
    prompt and response are for the policy."""
    section = config.reward.model
    if "reward_model" not in config.task.rewards or section.path is None:
        return []
    model = describe_reward_model(section.path, dtype=section.dtype, mesh=mesh)
    resident["reward model"] = params = sharded_abstract_params(model)
    tokens = min(workload.prompt_tokens + workload.response_tokens, section.max_tokens)
    length = row_length(tokens, section.max_tokens)
    rows = rows_of_batch(section, length, mesh)
    ids, last = (
        jax.ShapeDtypeStruct(shape, np.int32, sharding=batch_sharding(mesh)) for shape in ((rows, length), (rows,))
    )
    return [
        PlannedProgram(
            "reward", score_rows.trace(model, params, ids, last), mesh, math.ceil(_samples(config) / rows), params,
            kernel_cost=attention_cost(model.config, mesh, _block_causal(1, length, 1), rows),
        )
    ]  # fmt: skip


def _block_causal(rows: int, length: int, block_size: int) -> np.ndarray:
    """Intervals [rows, length, 4] of the prefill."""
    intervals = np.zeros((rows, length, 4), np.int32)
    intervals[..., 1] = np.minimum((np.arange(length) // block_size + 1) * block_size, length)
    return intervals


def _prompt(group: int, config: RunConfig, model: ModelConfig) -> np.ndarray:
    """One that no other group has, of the greatest length: the caches of a batch are as long as its longest row."""
    ids = np.zeros(config.task.max_prompt_tokens, np.int32)
    for i in range(min(3, len(ids))):
        group, ids[i] = divmod(group, model.mask_token_id)
    return ids


def _training_programs(
    config: RunConfig, learner: Learner, resident: dict[str, Any], workload: Workload
) -> list[PlannedProgram]:
    model, mesh = learner.model.config, learner.model.mesh
    count = min(_samples(config), PACKED_SAMPLES)
    replays = _replays(config, model, workload, count)
    tokens = sum(replay.item.size for replay in replays) / count * _samples(config) * workload.kept_fraction
    # All rows are as long as the longest response needs.
    longest = Workload(config.task.max_prompt_tokens, config.rollout.max_tokens, workload.tokens_per_step)
    replays += _replays(config, model, longest, 1)
    batches, _ = learner.policy_batches(replays)
    values = learner.value_batches(replays)[0][0] if config.value.enabled else None
    intervals = np.concatenate([batch["rows"].intervals for batch in batches])
    intervals = intervals[intervals.any((1, 2))]  # of rows that hold something
    rows, T = batches[0]["rows"].ids.shape
    fullness = sum(replay.item.size for replay in replays) / (len(intervals) * T)
    micro_batches = tokens / fullness / (rows * T)

    def spec(batch):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh)), batch
        )

    traced = learner.traced(spec(batches[0]), None if values is None else spec(values))
    runs, kept = _training_runs(config, micro_batches), _training_arguments(config, resident)
    attention = attention_cost(model, mesh, intervals, rows)
    return [
        PlannedProgram(name, program, mesh, runs[name], kept[name], kernel_cost=attention)
        for name, program in traced.items()
    ]


def _replays(config: RunConfig, model: ModelConfig, workload: Workload, count: int) -> list[Replay]:
    """Those of `count` made-up responses. `coupled` makes two of each."""
    B = config.rollout.block_size or model.block_size
    traces = sample_traces(workload, count, block_size=B, temperature=config.rollout.temperature)
    problem = Problem(index=0, prompt_text="", prompt_ids=traces[0].prompt_ids, columns={})
    zeros = np.zeros(workload.response_tokens, np.float32)  # values do not matter here
    numbers = dict.fromkeys(("old_logp", "reference_logp", "old_values", "returns", "advantages"), zeros)
    updates = plan_replays(
        [Sample(problem, trace, "", 0, 0.0, {}, 0.0) for trace in traces],
        dataclasses.replace(config.rl, minibatches=1, epochs=1),
        mask_id=model.mask_token_id, block_size=config.rl.block_size or B, seed=0, step=1,
    )  # fmt: skip
    return [dataclasses.replace(replay, **numbers) for update in updates for replay in update]


def _training_runs(config: RunConfig, micro_batches: float) -> dict[str, float]:
    """How often an RL step runs each program, with so many micro-batches in a pass over its responses."""
    rl = config.rl
    updates = rl.minibatches * rl.epochs
    gradients = updates * max(1, math.ceil(micro_batches / rl.minibatches))
    forwards = max(1, math.ceil(micro_batches * rl.epochs))
    # Where the sampler's log-probs are used, one micro-batch is replayed to compare.
    replay = (forwards if rl.old_logprobs == "recompute" else 1) + (forwards if rl.kl_to == "reference" else 0)
    every = config.value.train_every
    return {
        "replay": replay, "policy gradient": gradients, "policy apply": updates,
        "values": forwards, "value gradient": gradients / every, "value apply": updates / every,
    }  # fmt: skip


def _training_arguments(config: RunConfig, resident: dict[str, Any]) -> dict[str, Any]:
    """Which arguments of each program stay on the devices."""
    policy = resident["policy"]
    kept = {
        "replay": policy, "policy gradient": policy, "policy apply": (policy, resident["policy optimizer"]),
    }  # fmt: skip
    if config.value.enabled:
        value, trunk = resident["value"], policy if config.value.shared_trunk else ()
        kept |= {
            "values": (value, trunk), "value gradient": (value, trunk),
            "value apply": (value, resident["value optimizer"]),
        }  # fmt: skip
    return kept
