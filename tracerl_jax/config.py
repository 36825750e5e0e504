"""The schema of a run: frozen dataclasses with defaults, checked when they are built.

Files in configs/ return an `ml_collections.ConfigDict` naming a subset of these fields; `--config.group.field=value`
overrides any of them (see `config_io`). Library code takes these dataclasses and never sees flags.
"""
# ruff: noqa: RUF009  (_doc is dataclasses.field with its documentation)

import re
from dataclasses import dataclass, replace
from typing import Literal

from tracerl_jax.config_fields import _doc, _require, _require_not_negative, _require_positive
from tracerl_jax.config_rewards import JudgeSection, ProcessSection, RewardModelSection


@dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float = _doc(1e-6, "peak learning rate of AdamW")
    schedule: Literal["constant", "cosine", "linear"] = _doc("constant", "shape after the warm-up, over the whole run")
    warmup_updates: int = _doc(0, "updates of linear warm-up")
    end_scale: float = _doc(0.0, "final learning rate as a fraction of the peak (cosine, linear)")
    b1: float = _doc(0.9, "AdamW first moment decay")
    b2: float = _doc(0.999, "AdamW second moment decay")
    eps: float = _doc(1e-8, "AdamW epsilon")
    weight_decay: float = _doc(0.0, "decoupled weight decay of matrices (never of norms and biases)")
    max_grad_norm: float = _doc(1.0, "global norm clipping, 0 switches it off")

    def __post_init__(self):
        _require(self.learning_rate >= 0, f"learning_rate is {self.learning_rate}, must not be negative")
        _require(0 <= self.b1 < 1 and 0 <= self.b2 < 1, f"b1={self.b1}, b2={self.b2} must lie in [0, 1)")
        for name in ("warmup_updates", "end_scale", "weight_decay", "max_grad_norm"):
            _require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}, must not be negative")
        _require(self.eps > 0, f"eps is {self.eps}, must be above 0")


@dataclass(frozen=True)
class ModelSection:
    path: str | None = _doc(None, "Hugging Face folder to start from")
    preset: str | None = _doc(None, "architecture to initialise at random instead of `path`")
    tokenizer: str | None = _doc(None, "tokenizer folder, default: `path`")
    dtype: Literal["float32", "bfloat16"] = _doc("float32", "compute dtype; parameters are always float32")
    remat: Literal["none", "full", "dots"] = _doc("none", "what the backward pass recomputes in each layer")
    scan_layers: bool = _doc(True, "lax.scan over layers; False unrolls them (debugging, same results)")
    attention: str | None = _doc(None, "name of an attention implementation, default: chosen per backend")


@dataclass(frozen=True)
class MeshSection:
    data: int = _doc(-1, "devices along the data axis, -1: all that remain")
    fsdp: int = _doc(1, "devices that share parameters and optimizer state (and the batch)")
    tensor: int = _doc(1, "devices that share heads, MLP and vocabulary")

    def __post_init__(self):
        for name in ("data", "fsdp", "tensor"):
            size = getattr(self, name)
            _require(size == -1 or size >= 1, f"mesh.{name} is {size}, must be at least 1, or -1: all that remain")


@dataclass(frozen=True)
class TaskSection:
    name: str = _doc("arithmetic", "task of the registry (tracerl_jax.data.tasks)")
    path: str | None = _doc(None, "training rows: a file, hub:.., package:.., default: the task's (docs/tasks.md)")
    eval_path: str | None = _doc(None, "held-out rows: the same")
    template: str | None = _doc(None, "prompt template, default: the task's (docs/tasks.md)")
    prefix: str | None = _doc(None, "what every response is made to begin with, default: the row's own (code)")
    rewards: dict[str, float] = _doc({}, "reward name -> weight, default: the task's")
    max_prompt_tokens: int = _doc(256, "longer prompts are bad rows")
    on_bad_row: Literal["fail", "skip"] = _doc("fail", "what to do with unusable rows")
    train_limit: int | None = _doc(None, "use only the first rows for training")
    options: dict[str, int] = _doc({}, "parameters of procedural tasks (see the task)")

    def __post_init__(self):
        _require_positive(self, "task", "max_prompt_tokens", "train_limit")


@dataclass(frozen=True)
class RewardSection:
    workers: int | None = _doc(None, "processes that grade answers, default: the CPUs there are, at most 16")
    answer_patterns: tuple[str, ...] = _doc(
        (), "regular expressions, one group each, of a final answer without \\boxed{}; default: see docs/rewards.md"
    )
    bare_answers: bool = _doc(False, "take one line without a final answer for the answer itself")
    math_cpu_seconds: float = _doc(1.0, "CPU time that the algebra of one answer may take")
    sandbox: Literal["strict", "best_effort", "container-hook"] = _doc(
        "strict", "how programs run: only fully isolated, with what this machine can do, or by `container_command`"
    )
    container_command: str = _doc("", "what runs a Python program in a container, its standard input and output kept")
    code_memory_mb: int = _doc(1024, "address space of a program under test")
    code_wall_seconds: float = _doc(2.0, "waiting time a test may add to the CPU time of its task")
    code_packages: tuple[str, ...] = _doc(("numpy",), "installed packages that programs and their tests can import")
    own_equality: bool = _doc(False, "believe objects of the program under test that say they equal a test's value")
    judge: JudgeSection = _doc(JudgeSection(), "a language model behind a URL that judges: rewards judge, judge_steps")
    model: RewardModelSection = _doc(RewardModelSection(), "a scalar reward model on the mesh: reward reward_model")
    process: ProcessSection = _doc(ProcessSection(), "rewards of the steps of a response, such as judge_steps")

    def __post_init__(self):
        _require_positive(self, "reward", "workers")
        _require(self.code_memory_mb >= 64, f"reward.code_memory_mb is {self.code_memory_mb}, must be at least 64")
        for name in ("math_cpu_seconds", "code_wall_seconds"):
            _require(getattr(self, name) > 0, f"reward.{name} is {getattr(self, name)}, must be above 0")
        _require(
            all(name.isidentifier() for name in self.code_packages),
            f"reward.code_packages is {self.code_packages}, must be names as after `import`",
        )
        _require(
            bool(self.container_command) == (self.sandbox == "container-hook"),
            "reward.sandbox=container-hook and reward.container_command belong together: set both or neither",
        )


@dataclass(frozen=True)
class GradingConfig:
    """The part of a run's config that commands take which only grade. What they grade may be answers alone."""

    reward: RewardSection = _doc(RewardSection(bare_answers=True), "how answers and programs are graded")


@dataclass(frozen=True)
class SFTSection:
    steps: int = _doc(0, "updates of supervised warm-up before RL; 0: none")
    method: Literal["semi_ar", "trace", "random_masking", "ar"] = _doc(
        "semi_ar", "masks inside blocks, replay of a decoding order, masks all over the response, or next token"
    )
    path: str | None = _doc(None, "rows with prompt/response (and step_map for `trace`), default: the task's solutions")
    sequences_per_update: int = _doc(64, "responses per optimizer update")
    rows_per_device: int = _doc(8, "packed rows that a device (of the data and fsdp axes) takes per forward/backward")
    row_length: int = _doc(512, "tokens of a packed row")
    max_response_tokens: int = _doc(256, "longer responses are bad rows")
    mask_low: float = _doc(0.1, "lowest mask ratio, drawn per block (random_masking: per response)")
    mask_high: float = _doc(1.0, "highest mask ratio")
    inverse_ratio_weight: bool = _doc(False, "weight targets by 1 / mask ratio (the diffusion ELBO)")
    shrink: int = _doc(1, "steps merged into one replay group (method trace)")
    canvas_tokens: int | None = _doc(
        None, "response positions a full-attention model sees, MASK behind the response; default: max_response_tokens"
    )
    blocks_per_response: int = _doc(1, "blocks trained each time a response comes up (full attention, semi_ar); 0: all")
    log_every: int = _doc(10, "updates between metric rows")
    optimizer: OptimizerConfig = _doc(OptimizerConfig(learning_rate=1e-5), "AdamW of the warm-up")

    def __post_init__(self):
        _require_not_negative(self, "sft", "steps", "blocks_per_response")
        _require_positive(
            self, "sft", "sequences_per_update", "rows_per_device", "row_length", "max_response_tokens", "shrink",
            "log_every", "canvas_tokens",
        )  # fmt: skip
        _require(
            0 < self.mask_low <= self.mask_high <= 1,
            f"need 0 < sft.mask_low <= sft.mask_high <= 1, got {self.mask_low} and {self.mask_high}",
        )


@dataclass(frozen=True)
class RolloutSection:
    prompts_per_step: int = _doc(64, "problems per RL step")
    samples_per_prompt: int = _doc(16, "responses per problem (the group)")
    slots_per_device: int = _doc(64, "sequences that one copy of the weights (see `tensor`) decodes together")
    tensor: int | None = _doc(None, "devices that share one copy of the weights in decoding, default: mesh.tensor")
    commit: Literal["auto", "separate", "fused"] = _doc("auto", "commit a block by a forward of its own or by the next")
    drafts: int = _doc(1, "denoise steps that a forward with fused commit guesses and verifies; changes no result")
    cache: Literal["none", "prefix", "dual"] = _doc("none", "cache of a full-attention model (none is exact)")
    horizon: int | None = _doc(None, "tokens that a step with such a cache computes, from its block on; default: all")
    refresh: int | None = _doc(None, "denoise steps until a block's cache is made anew, default: at its start only")
    kv_dtype: Literal["compute", "int8"] = _doc("compute", "dtype of the key/value cache")
    block_size: int | None = _doc(None, "block size, default: the model's")
    denoising_steps: int | None = _doc(None, "schedule length S, default: the block size")
    strategy: str = _doc("dynamic", "reveal strategy: static, dynamic, sequential, entropy_bounded, linspace")
    score: str = _doc("confidence", "what proposals are ranked by: confidence, margin, entropy, uncertainty")
    confidence: Literal["policy", "truncated", "untempered"] = _doc("policy", "whose probabilities scores come from")
    first_token: bool = _doc(False, "reveal the first token of a block first, alone, as Dream's sampler does")
    threshold: float = _doc(0.9, "score above which `dynamic` reveals")
    entropy_bound: float = _doc(0.35, "bound of `entropy_bounded`")
    max_tokens: int = _doc(256, "completion limit")
    block_size_schedule: dict[str, int] = _doc({}, "RL step -> block size from that step on: {1: 4, 100: 8}")
    max_tokens_schedule: dict[str, int] = _doc({}, "RL step -> completion limit from that step on: {1: 256, 100: 512}")
    temperature: float = _doc(1.0, "sampling temperature, 0: greedy")
    top_k: int = _doc(0, "0: off")
    top_p: float = _doc(1.0, "1: off")
    truncated_is_wrong: bool = _doc(True, "a completion cut at max_tokens gets reward 0 (the reference's rule)")

    def __post_init__(self):
        _require_positive(
            self, "rollout", "prompts_per_step", "samples_per_prompt", "slots_per_device", "tensor", "drafts",
            "max_tokens", "horizon", "refresh",
        )  # fmt: skip
        for name in ("horizon", "refresh"):
            _require(
                self.cache != "none" or getattr(self, name) is None,
                f"rollout.{name} is {getattr(self, name)}, but rollout.cache is 'none': set it to prefix or dual",
            )
        _require(
            self.horizon is None or self.block_size is None or self.horizon >= self.block_size,
            f"rollout.horizon is {self.horizon}, smaller than rollout.block_size {self.block_size}: raise it",
        )
        for name in ("block_size_schedule", "max_tokens_schedule"):
            for step, value in getattr(self, name).items():
                _require(
                    step.isdecimal() and value >= 1,
                    f"rollout.{name} holds {{{step}: {value}}}; it must map RL steps (whole numbers) to values of at "
                    "least 1, such as {1: 4, 100: 8}",
                )

    def at(self, step: int) -> "RolloutSection":
        """What holds at an RL step, of which 1 is the first, without schedules."""
        return replace(
            self, block_size=_scheduled(self.block_size_schedule, step, self.block_size), block_size_schedule={},
            max_tokens=_scheduled(self.max_tokens_schedule, step, self.max_tokens), max_tokens_schedule={},
        )  # fmt: skip

    def stages(self) -> "list[RolloutSection]":
        """What holds in turn in the course of RL."""
        starts = {max(1, int(step)) for step in (1, *self.block_size_schedule, *self.max_tokens_schedule)}
        return [self.at(step) for step in sorted(starts)]

    @property
    def longest(self) -> int:
        """The largest completion limit of RL."""
        return max(stage.max_tokens for stage in self.stages())


def _scheduled(schedule: dict[str, int], step: int, before: int | None) -> int | None:
    """The value of the last entry that `step` has reached; `before` until the first one."""
    reached = [int(start) for start in schedule if int(start) <= step]
    return {int(start): value for start, value in schedule.items()}[max(reached)] if reached else before


@dataclass(frozen=True)
class RLSection:
    steps: int = _doc(100, "RL steps; 0: supervised training only")
    method: Literal["tracerl", "random_masking", "coupled"] = _doc("tracerl", "which states of a response are replayed")
    block_size: int | None = _doc(None, "block size of the objective, default: the rollout's")
    shrink: int = _doc(1, "consecutive denoise steps merged into one replay group")
    mask_low: float = _doc(0.1, "lowest mask ratio (random_masking, coupled)")
    mask_high: float = _doc(0.9, "highest mask ratio (random_masking, coupled)")
    advantage: Literal["group_zscore", "leave_one_out"] = _doc("group_zscore", "baseline inside a group")
    accuracy_low: float = _doc(0.2, "groups below this accuracy are dropped")
    accuracy_high: float = _doc(0.8, "groups above this accuracy are dropped")
    sampling_rounds: int = _doc(1, "rounds of rollouts until rollout.prompts_per_step groups are kept; 1: no more")
    curriculum: Literal["none", "success_rate"] = _doc(
        "none", "problems in a random order, each once an epoch, or drawn by their running success rate"
    )
    curriculum_momentum: float = _doc(0.5, "share of a problem's old success rate that stays when it comes up again")
    curriculum_floor: float = _doc(0.1, "weight of a problem always or never solved; one solved half the time has 1")
    clip_low: float = _doc(0.2, "ratio clipped below at 1 - clip_low")
    clip_high: float = _doc(0.2, "ratio clipped above at 1 + clip_high")
    kl_coef: float = _doc(0.01, "weight of the KL penalty")
    kl_estimator: Literal["k1", "k2", "k3"] = _doc("k3", "KL estimator")
    kl_to: Literal["old", "reference"] = _doc("old", "policy at the start of the step, or the frozen initial policy")
    normaliser: Literal["tokens", "sequences", "constant", "reference"] = _doc("tokens", "denominator of the loss")
    normaliser_constant: int | None = _doc(None, "length for `constant`, default: the largest rollout.max_tokens")
    old_logprobs: Literal["rollout", "recompute"] = _doc("rollout", "the sampler's, or a forward before the update")
    overlap: Literal["none", "one_step_off"] = _doc("none", "decode the next step's samples beside this one's updates")
    importance_sampling: Literal["none", "token", "sequence"] = _doc(
        "none", "weight tokens, or whole responses, by old over behaviour probability"
    )
    importance_cap: float = _doc(2.0, "importance weights are truncated here")
    minibatches: int = _doc(1, "optimizer updates per pass over the step's responses")
    epochs: int = _doc(1, "passes over the step's responses")
    row_length: int = _doc(2048, "tokens of a packed row")
    rows_per_device: int = _doc(4, "packed rows that a device (of the data and fsdp axes) takes per forward/backward")
    max_skipped_updates: int = _doc(5, "stop after this many non-finite updates in a row")
    optimizer: OptimizerConfig = _doc(OptimizerConfig(), "AdamW of the policy")

    def __post_init__(self):
        _require_not_negative(self, "rl", "steps", "clip_low", "clip_high", "kl_coef")
        _require_positive(
            self, "rl", "block_size", "shrink", "normaliser_constant", "minibatches", "epochs", "row_length",
            "rows_per_device", "max_skipped_updates", "sampling_rounds",
        )  # fmt: skip
        _require(
            0 <= self.curriculum_momentum < 1,
            f"rl.curriculum_momentum is {self.curriculum_momentum}, must be at least 0 and below 1",
        )
        _require(
            0 < self.curriculum_floor <= 1,
            f"rl.curriculum_floor is {self.curriculum_floor}, must be above 0 and at most 1",
        )
        _require(
            0 <= self.accuracy_low <= self.accuracy_high <= 1,
            f"need 0 <= rl.accuracy_low <= rl.accuracy_high <= 1, got {self.accuracy_low} and {self.accuracy_high}",
        )
        _require(
            0 < self.mask_low <= self.mask_high <= 1,
            f"need 0 < rl.mask_low <= rl.mask_high <= 1, got {self.mask_low} and {self.mask_high}",
        )
        _require(
            self.method == "tracerl" or self.old_logprobs == "recompute",
            f"rl.method={self.method} scores other states than the sampler visited: set rl.old_logprobs=recompute",
        )
        if self.importance_sampling == "none":
            return
        _require(self.importance_cap > 0, f"rl.importance_cap is {self.importance_cap}, must be above 0")
        _require(
            self.method == "tracerl",
            f"rl.importance_sampling compares with the sampler's log-probs, and rl.method={self.method} scores other "
            "states than it visited: set rl.method=tracerl, or rl.importance_sampling=none",
        )
        _require(
            self.overlap == "none" or self.old_logprobs == "recompute",
            "rl.overlap=one_step_off trains a newer policy than the one that sampled, and rl.importance_sampling "
            "weights by the old log-probs: set rl.old_logprobs=recompute (or rl.importance_sampling=none: then PPO's "
            "own ratio is to the policy that sampled)",
        )


@dataclass(frozen=True)
class ValueSection:
    enabled: bool = _doc(False, "train a diffusion value model and use per-token GAE advantages")
    path: str | None = _doc(None, "Hugging Face folder of the value backbone, default: the policy's initial weights")
    shared_trunk: bool = _doc(False, "a head on the policy's (frozen) features instead of a second model")
    train_every: int = _doc(1, "RL steps between value updates")
    clip: float = _doc(0.2, "clipping range of the value loss")
    gamma: float = _doc(1.0, "discount per denoise step")
    lam: float = _doc(1.0, "GAE lambda")
    whiten: bool = _doc(False, "normalise the advantages of a step to zero mean and unit deviation")
    optimizer: OptimizerConfig = _doc(OptimizerConfig(learning_rate=5e-6), "AdamW of the value model")

    def __post_init__(self):
        _require_positive(self, "value", "train_every")
        _require_not_negative(self, "value", "clip")
        for name in ("gamma", "lam"):
            _require(0 <= getattr(self, name) <= 1, f"value.{name} is {getattr(self, name)}, must lie in [0, 1]")


@dataclass(frozen=True)
class EvalSection:
    every: int = _doc(10, "RL steps between evaluations; 0: only before and after")
    limit: int | None = _doc(None, "held-out problems used, default: all")
    samples_per_prompt: int = _doc(1, "answers per problem")
    strategies: tuple[str, ...] = _doc(("dynamic", "static"), "decoding protocols: dynamic, static")
    max_tokens: int | None = _doc(None, "completion limit, default: rollout.max_tokens")
    threshold: float | None = _doc(None, "threshold of `dynamic`, default: rollout.threshold")
    temperature: float = _doc(1.0, "temperature of `dynamic`")
    static_temperature: float = _doc(0.0, "temperature of `static`, 0: greedy")
    top_k: int = _doc(0, "0: off")
    top_p: float = _doc(1.0, "1: off")

    def __post_init__(self):
        _require_not_negative(self, "eval", "every")
        _require_positive(self, "eval", "limit", "samples_per_prompt", "max_tokens")


@dataclass(frozen=True)
class CheckpointSection:
    every: int = _doc(10, "RL steps between checkpoints")
    sft_every: int = _doc(200, "updates between checkpoints of the warm-up")
    keep_last: int = _doc(2, "newest checkpoints kept")
    keep_every: int | None = _doc(None, "also keep every checkpoint whose RL step is a multiple of this")

    def __post_init__(self):
        _require_positive(self, "checkpoint", "every", "sft_every", "keep_last", "keep_every")


@dataclass(frozen=True)
class ReportSection:
    samples_per_step: int = _doc(16, "rollouts written to samples.jsonl per RL step")
    tensorboard: bool = _doc(False, "also write TensorBoard events")
    wandb: bool = _doc(False, "also log to Weights & Biases")
    profile: str | None = _doc(
        None, "FIRST:COUNT, steps whose profile is written to <run>/profile: of RL, else of the supervised training"
    )

    def __post_init__(self):
        _require_not_negative(self, "report", "samples_per_step")
        _require(
            self.profile is None or re.fullmatch(r"[1-9]\d*:[1-9]\d*", self.profile) is not None,
            f"report.profile is {self.profile!r}, must be FIRST:COUNT, as in 10:3 for the steps 10, 11 and 12",
        )

    @property
    def profiled(self) -> range:
        """Steps of `profile`."""
        first, count = map(int, (self.profile or "0:0").split(":"))
        return range(first, first + count)


@dataclass(frozen=True)
class FaultsSection:
    heartbeat: float = _doc(60.0, "seconds without a sign of life after which a process of a job is taken for dead")
    phase_seconds: float = _doc(7200.0, "seconds that a phase of a step may take in a job of several processes")
    phase_timeout: dict[str, float] = _doc({}, "the same of single phases (docs/metrics.md): {rollout: 900}")

    def __post_init__(self):
        for name in ("heartbeat", "phase_seconds"):
            _require(getattr(self, name) > 0, f"faults.{name} is {getattr(self, name)}, must be above 0")
        for name, seconds in self.phase_timeout.items():
            _require(seconds > 0, f"faults.phase_timeout holds {{{name}: {seconds}}}, must be above 0")


@dataclass(frozen=True)
class RunConfig:
    name: str = _doc("run", "folder below runs_dir; an existing run with this name is continued")
    runs_dir: str = _doc("runs", "where run folders live")
    seed: int = _doc(0, "seed of every random number of the run")
    model: ModelSection = _doc(ModelSection(), "where the weights come from")
    mesh: MeshSection = _doc(MeshSection(), "device mesh")
    task: TaskSection = _doc(TaskSection(), "problems and rewards")
    reward: RewardSection = _doc(RewardSection(), "how answers and programs are graded")
    sft: SFTSection = _doc(SFTSection(), "supervised warm-up")
    rollout: RolloutSection = _doc(RolloutSection(), "decoding during RL")
    rl: RLSection = _doc(RLSection(), "objective and update")
    value: ValueSection = _doc(ValueSection(), "diffusion value model")
    eval: EvalSection = _doc(EvalSection(), "held-out evaluation")
    checkpoint: CheckpointSection = _doc(CheckpointSection(), "Orbax checkpoints")
    report: ReportSection = _doc(ReportSection(), "what is written for people")
    faults: FaultsSection = _doc(FaultsSection(), "when a job of several processes gives up")

    def __post_init__(self):
        _require(
            (self.model.path is None) != (self.model.preset is None),
            "set exactly one of model.path (a Hugging Face folder) and model.preset (random weights)",
        )
        _require(self.name not in ("", ".", ".."), f"name is {self.name!r}, must be the name of a folder")
        _require(0 <= self.seed < 2**32, f"seed is {self.seed}, must lie in [0, 2**32)")
        self.check_states()
        _require(
            not self.value.enabled or self.rl.method == "tracerl",
            f"value.enabled needs the states of a trace: set rl.method=tracerl (it is {self.rl.method})",
        )
        _require(
            self.rl.importance_sampling == "none" or self.rollout.temperature > 0,
            "rl.importance_sampling divides by the probability of what was drawn, and rollout.temperature=0 draws "
            "nothing: set a temperature above 0, or rl.importance_sampling=none",
        )

    def check_states(self, model_block_size: int | None = None) -> None:
        """Raises ConfigError when the sampler's log-probs are wanted for states it did not visit.

        Without the model's block size an `rl.block_size` beside `rollout.block_size=None` is taken to be the same.
        """
        sizes = [stage.block_size or model_block_size for stage in self.rollout.stages()]
        same_size = self.rl.block_size is None or all(size in (None, self.rl.block_size) for size in sizes)
        _require(
            (self.rl.shrink == 1 and same_size) or self.rl.old_logprobs == "recompute",
            "rl.shrink > 1 or another rl.block_size than the rollout's scores other states than the sampler visited: "
            "set rl.old_logprobs=recompute",
        )

    def heaviest(self, model_block_size: int) -> "RunConfig":
        """The config with the largest values of its schedules in their place: what a plan must make room for."""
        stages = self.rollout.stages()
        block_size = max(stage.block_size or model_block_size for stage in stages)
        rollout = replace(
            self.rollout, block_size=block_size, max_tokens=self.rollout.longest,
            block_size_schedule={}, max_tokens_schedule={},
        )  # fmt: skip
        return replace(self, rollout=rollout) if len(stages) > 1 or stages[0] != self.rollout else self
