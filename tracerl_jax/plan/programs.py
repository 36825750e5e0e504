"""The programs of a run, traced for devices that are not there, and how often an RL step runs each."""

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
from tracerl_jax.errors import ConfigError
from tracerl_jax.interop.hf_config import read_model_config
from tracerl_jax.interop.hf_reward import describe_reward_model
from tracerl_jax.kernels.decode.chunked import CHUNK
from tracerl_jax.kernels.dispatch import target_platform
from tracerl_jax.kernels.logprob.draws import group_size
from tracerl_jax.models import PRESETS, Model, ModelConfig
from tracerl_jax.parallel.sharding import batch_sharding, row_shards
from tracerl_jax.plan.decoding import Forwards, decode_loop, response_forwards
from tracerl_jax.plan.hlo_cost import KernelCost
from tracerl_jax.plan.kernel_costs import attention_cost, decode_cost
from tracerl_jax.plan.replays import (
    StepReplay,
    built_responses,
    longest_replays,
    made_up_replays,
    samples_of,
    shrinks,
    step_replay,
)
from tracerl_jax.plan.workload import Workload
from tracerl_jax.rewards.scorer import row_length, rows_of_batch, score_rows
from tracerl_jax.rl.loop import make_learner
from tracerl_jax.rl.update import Learner
from tracerl_jax.rollout.canvas import Program as CanvasProgram
from tracerl_jax.rollout.decode import Program
from tracerl_jax.rollout.engine import Engine, Request
from tracerl_jax.rollout.weights import abstract_rollout_params, conversion, needs_copy, rollout_model
from tracerl_jax.training.run import check_canvas, engine_config, rollout_options
from tracerl_jax.training.step import sharded_abstract_params

log = logging.getLogger(__name__)

KERNELS = ("attention:", "decode_attention:", "token_logprobs:", "sample_tokens:")  # how their errors begin


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
    forwards: Forwards  # of a response
    replays: list[StepReplay]  # by `rl.shrink`, the run's own among them


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
    """The preset whose words come in this name in their order: "models/Dream-v0-Instruct-7B" -> "dream_7b"."""
    words = re.findall(r"[a-z0-9]+", Path(path).name.lower())

    def named(preset):
        rest = iter(words)
        return all(word in rest for word in preset.split("_"))  # which consumes `rest`

    return max(filter(named, PRESETS), key=len, default=None)


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
            programs, forwards = _rollout_programs(config, decoder, resident, workload)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            training, replays = _training_programs(config, learner, resident, workload)
            programs += training
            programs += _reward_programs(config, mesh, resident, workload)
    except ValueError as error:
        if not str(error).startswith(KERNELS):
            raise
        raise ConfigError(str(error)) from error  # a kernel that is not made for these sizes says so
    beside = () if config.rl.overlap == "none" else ("prefill", "decode")
    tokens = samples_of(config) * workload.response_tokens
    return PlannedRun(model, decoder.mesh, programs, resident, beside, tokens, forwards, replays)


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
) -> tuple[list[PlannedProgram], Forwards]:
    """Also what a response takes of them. Where rollouts overlap with updates, their weights and cache are added to
    `resident`."""
    section, policy, mesh = config.rollout, resident["policy"], model.mesh
    slots = section.slots_per_device * row_shards(mesh)
    # The vocabulary is the model's: only a tokenizer would know of padding at its end.
    engine = Engine(model, abstract_rollout_params(model), engine_config(section, slots))
    options = rollout_options(section, seed=0)
    requests = [
        Request(_prompt(i // section.samples_per_prompt, config, model.config), options, sample_index=i)
        for i in range(samples_of(config))
    ]
    state = engine.abstract_state(requests)
    if config.rl.overlap != "none":
        weights = abstract_rollout_params(model)
        resident |= {"rollout weights": weights, "rollout cache": state}
        kept = {"prefill": (weights, state.cache), "decode": (weights, state)}
        # What it makes takes the place of the weights before.
        sync = [PlannedProgram("sync", conversion(model, own=True).trace(policy), mesh, 1, (policy, weights))]
    else:
        copied = needs_copy(model, policy)
        kept = dict.fromkeys(("prefill", "decode"), () if copied else policy)
        sync = [PlannedProgram("sync", conversion(model).trace(policy), mesh, 1, policy)] if copied else []
    full = model.config.attention_mode == "full"
    if full:
        check_canvas(config, config.task.max_prompt_tokens)
    traced, program = engine.traced(requests), engine.program(requests)
    fused = not full and program.groups > 1
    prefill = [] if full else [_prefill(config, model, traced, kept["prefill"])]
    make = _canvas_decode if full else _block_decode
    loops, kernel_cost = make(config, model, program, workload, slots, state.canvas.shape[1])
    decode = PlannedProgram("decode", traced["decode"], mesh, 1, kept["decode"], loops, kernel_cost)
    forwards = response_forwards(
        config, model.config, workload.response_tokens, workload.tokens_per_step, fused=fused
    )
    return [*sync, *prefill, decode], forwards


def _prefill(
    config: RunConfig, model: Model, traced: dict[str, jax.stages.Traced], kept: Any
) -> PlannedProgram:
    mesh, B = model.mesh, config.rollout.block_size or model.config.block_size
    if "prefill" not in traced:
        raise ConfigError(f"task.max_prompt_tokens is {config.task.max_prompt_tokens}, less than a block of {B}")
    prompts = _block_causal(*traced["prefill"].args_info[0][2].shape, B)
    shards = row_shards(mesh)
    calls = math.ceil(config.rollout.prompts_per_step / shards / (len(prompts) // shards))
    cost = attention_cost(model.config, mesh, prompts[:1], len(prompts))
    return PlannedProgram("prefill", traced["prefill"], mesh, calls, kept, kernel_cost=cost)


def _block_decode(
    config: RunConfig, model: Model, program: Program, workload: Workload, slots: int, length: int
) -> tuple[dict[str, float], KernelCost]:
    """(lengths of its loops, cost of its kernels) of a block-causal model."""
    mesh, samples, B = model.mesh, samples_of(config), program.block_size
    loop = decode_loop(config, model.config, workload, samples, slots, fused=program.groups > 1)
    live = workload.prompt_tokens + workload.response_tokens / 2
    queries = program.groups * B
    loops = {
        "jit(decode)/while": loop.forwards,
        # Of the fused head, which no draft is assumed to spare anything, and of `chunked_decode_attention` for backends
        # without a kernel.
        f"body/{_sharded(mesh)}while": _head_groups(min(slots, samples) / row_shards(mesh) * queries, B, workload),
        "attention/shard_map/while": math.ceil(live / CHUNK[target_platform(mesh.devices.flat[0])]),
    }
    cost = decode_cost(model.config, mesh, min(slots, samples), queries, live, config.rollout.kv_dtype)
    return loops, cost


def _canvas_decode(
    config: RunConfig, model: Model, program: CanvasProgram, workload: Workload, slots: int, length: int
) -> tuple[dict[str, float], KernelCost]:
    """The same of a full-attention model, in slots of `length` tokens."""
    mesh, samples, B, c = model.mesh, samples_of(config), program.block_size, model.config
    shards, active = row_shards(mesh), min(slots, samples)
    cached = program.cache != "none"
    together = program.gathered * shards if cached else None
    loop = decode_loop(config, c, workload, samples, slots, gathered=together)
    limit = config.task.max_prompt_tokens + config.rollout.max_tokens
    canvas = np.zeros((1, length, 4), np.int32)
    canvas[:, :limit, 1] = limit
    whole = attention_cost(c, mesh, canvas, together or active)
    # Behind the window lies what is left of the canvas: half of it, on average, where the window is short.
    before = workload.prompt_tokens + workload.response_tokens / 2
    behind = max(0.0, limit - before - program.window) if program.cache == "dual" else 0.0
    cost = decode_cost(c, mesh, active, program.window + program.shift, before + behind, config.rollout.kv_dtype)

    def kernel_cost(instruction, operands):
        return whole(instruction, operands) or cost(instruction, operands)

    share = loop.whole / loop.forwards
    loops = {
        "jit(decode)/while": loop.forwards,
        "body/refresh/while": share, "body/step/while": 1 - share,  # whether a forward is the one or the other
        f"refresh/while/body/{_sharded(mesh)}while": _head_groups(program.gathered * B, B, workload),
        f"body/{_sharded(mesh)}while": _head_groups(active / shards * B, B, workload),
        "attention/shard_map/while": math.ceil((before + behind) / CHUNK[target_platform(mesh.devices.flat[0])]),
    }  # fmt: skip
    return loops, kernel_cost


def _sharded(mesh: Mesh) -> str:
    """How the compilers name what runs inside `jax.shard_map`."""
    return "shard_map/" if mesh.size > 1 else ""


def _head_groups(positions: float, block_size: int, workload: Workload) -> int:
    """How many groups of a chip's `positions` go through the fused head: of those still masked, which are
    (tokens_per_step + B) / 2 of a block on average."""
    masked = (workload.tokens_per_step + block_size) / (2 * block_size) * positions
    return math.ceil(masked / group_size(round(positions)))


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
            "reward", score_rows.trace(model, params, ids, last), mesh, math.ceil(samples_of(config) / rows), params,
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
) -> tuple[list[PlannedProgram], list[StepReplay]]:
    """Also how often an RL step runs them, by `rl.shrink`."""
    model, mesh, rl = learner.model.config, learner.model.mesh, config.rl
    replays = made_up_replays(config, rl, model, workload, built_responses(config, rl, model, workload))
    replays += longest_replays(config, rl, model, workload)
    batches, _ = learner.policy_batches(replays)
    values = learner.value_batches(replays)[0][0] if config.value.enabled else None
    intervals = np.concatenate([batch["rows"].intervals for batch in batches])
    intervals = intervals[intervals.any((1, 2))]  # of rows that hold something
    rows, T = batches[0]["rows"].shape

    def spec(batch):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh)), batch
        )

    block_size = config.rollout.block_size or model.block_size
    steps = [
        step_replay(config, model, workload, shrink, learner.row_lengths, rows * T)
        for shrink in shrinks(rl, block_size)
    ]
    (runs,) = (step.runs for step in steps if step.shrink == rl.shrink)
    traced = learner.traced(spec(batches[0]), None if values is None else spec(values))
    kept, attention = _training_arguments(config, resident), attention_cost(model, mesh, intervals, rows)
    programs = [
        PlannedProgram(name, program, mesh, runs[name], kept[name], kernel_cost=attention)
        for name, program in traced.items()
    ]
    return programs, steps


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
