"""A run: its folder, model, task and checkpoints, opened for a new start or to go on where it stopped.

    runs/<name>/
      config.json, metrics.jsonl, samples.jsonl, summary.json   report/run_dir.py
      model/          config and tokenizer of the model, without weights
      checkpoints/    Orbax, see training/checkpoint.py
      reference/      frozen policy of rl.kl_to=reference, written once
      hf/             the trained model as a Hugging Face folder, written at the end
"""

import contextlib
import dataclasses
import logging
import platform
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

import tracerl_jax
from tracerl_jax import config_io
from tracerl_jax.config import RolloutSection, RunConfig
from tracerl_jax.data.char_tokenizer import build_char_tokenizer
from tracerl_jax.data.prompts import Problem, encode_prompts
from tracerl_jax.data.tasks import Task, get_spec, load_task
from tracerl_jax.diffusion.grid import round_up
from tracerl_jax.errors import ConfigError
from tracerl_jax.evals.runner import eval_protocols
from tracerl_jax.interop.folders import copy_companions, read_json, whole_folder
from tracerl_jax.interop.hf_config import read_model_config
from tracerl_jax.interop.hf_load import load_hf, stored_dtype
from tracerl_jax.interop.hf_save import save_hf, save_model_files
from tracerl_jax.interop.tokenizer import decode, load_tokenizer, mask_token_id, valid_vocab
from tracerl_jax.models import PRESETS, Model
from tracerl_jax.parallel import watchdog
from tracerl_jax.parallel.distributed import is_job, is_lead, process_index
from tracerl_jax.parallel.facts import check_data, digest
from tracerl_jax.parallel.mesh import make_mesh
from tracerl_jax.parallel.peers import connect, from_lead
from tracerl_jax.parallel.place import local_mesh
from tracerl_jax.parallel.sharding import row_shards
from tracerl_jax.report.follower import open_run_dir
from tracerl_jax.report.metrics import MetricLog, open_log
from tracerl_jax.report.run_dir import METRICS, SAMPLES
from tracerl_jax.report.samples import decode_pieces
from tracerl_jax.rewards import rewards_of_steps, settings, start_rewards
from tracerl_jax.rollout.engine import Engine, EngineConfig, Request
from tracerl_jax.rollout.options import SamplingOptions
from tracerl_jax.rollout.weights import rollout_model
from tracerl_jax.training.checkpoint import Checkpointer
from tracerl_jax.training.interrupt import StopSignal
from tracerl_jax.training.optimizer import check_offload

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Progress:
    """Where a run is: all of it that is not an array. Saved with every checkpoint."""

    phase: str = "sft"  # "sft" or "rl"
    sft_step: int = 0
    rl_step: int = 0
    data: dict | None = None  # state of what draws the phase's rows (data/iterator.py, data/curriculum.py)
    skipped_in_a_row: dict[str, int] = dataclasses.field(default_factory=dict)  # see training/guard.py

    @property
    def checkpoint_step(self) -> int:
        return self.sft_step + self.rl_step


class Run:
    """Everything the loops share. Use as a context manager; it holds the lock of the run folder.

    In a job all processes open the run. They share its folder, which process 0 alone writes but for checkpoints.
    """

    def __init__(self, config: RunConfig):
        self.config = config
        self.path = Path(config.runs_dir) / config.name
        self.mesh = make_mesh(*dataclasses.astuple(config.mesh))
        for name in ("sft", "rl", "value"):
            check_offload(f"{name}.optimizer", getattr(config, name).optimizer, self.mesh.local_devices)
        for stage in config.rollout.stages():
            rollout_options(stage, seed=0)  # for its ConfigError
        if config.rl.overlap != "none" and jax.process_count() > 1:
            raise ConfigError(
                f"rl.overlap={config.rl.overlap} starts programs from two threads, and {jax.process_count()} processes "
                "would start them in different orders and wait for each other: set rl.overlap=none"
            )
        self.protocols = eval_protocols(config)
        self._exit = contextlib.ExitStack()
        self.folder = self._exit.enter_context(open_run_dir(self.path))
        try:
            if self.folder.config and self._is_untouched():
                self.folder.forget_config()
            if self.folder.config:
                self._write_config()
            connect(self.mesh)
            self.task = self._load_task()
            self.model = self._open_model()
            config.check_states(self.model.config.block_size)
            self.tokenizer = self._open_tokenizer()
            # Bad rows are found now, not after hours of warm-up.
            self.train_problems = self._problems(self.task.train) if config.rl.steps else []
            self.test_problems = self._problems(self.task.test) if self.task.test else []
            self._check_data()
            self._check_lengths()
            self._check_decoding()
            # A new run folder is tied to its config only now: what failed above may be mended under the same name.
            self._write_config()
            self.checkpointer = Checkpointer(self.path, config.checkpoint)
            self._exit.push(self.checkpointer.leave)
            self.stop = self._exit.enter_context(StopSignal())
            watchdog.listen(self.stop)
        except BaseException:
            self._exit.__exit__(*sys.exc_info())
            raise

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error) -> bool | None:
        return self._exit.__exit__(*error)

    def _is_untouched(self) -> bool:
        """Whether the run failed before its first row and checkpoint, because of its weights say: nothing in the folder
        depends on its config yet."""
        rows = [self.path / name for name in (METRICS, SAMPLES)]
        saved = [*self.path.glob("checkpoints/*"), *self.path.glob("damaged-checkpoint-*")]
        return not saved and not any(path.exists() and path.stat().st_size for path in rows)

    def _write_config(self) -> None:
        self.folder.write_config(config_io.to_dict(self.config), complete=with_defaults)

    def _check_data(self) -> None:
        """Raises ConfigError when another process of the job has read other rows, or would read other weights."""
        if is_job():
            folders = {"model": self.config.model.path, "value": self.config.value.path}
            weights = {name: weight_files(folder) for name, folder in folders.items() if folder}
            rows = {"train": digest(self.train_problems), "test": digest(self.test_problems)}
            check_data({"rows": rows, "weights": weights})

    def _check_lengths(self) -> None:
        """Raises ConfigError when a prompt and what may be decoded behind it are longer than the model allows."""
        config, model, rollout = self.config, self.model.config, self.config.rollout
        for key, limit, block_size, problems in (
            *(("rollout.max_tokens", s.max_tokens, s.block_size, self.train_problems) for s in rollout.stages()),
            ("eval.max_tokens", config.eval.max_tokens or rollout.max_tokens, rollout.block_size, self.test_problems),
        ):
            longest = max((len(problem.prompt_ids) for problem in problems), default=0)
            end = round_up(longest + limit, block_size or model.block_size)
            if problems and end > model.max_positions:
                raise ConfigError(
                    f"{key} is {limit}: behind the longest prompt ({longest} tokens) a response may reach position "
                    f"{end}, but the model ends at {model.max_positions}; lower it, or task.max_prompt_tokens"
                )

    def _check_decoding(self) -> None:
        """Raises the UserError that the first request would raise, or the first replay of a full-attention model."""
        config, longest = self.config, max((len(problem.prompt_ids) for problem in self.train_problems), default=0)
        if self.model.config.attention_mode == "full" and config.rl.steps:
            check_canvas(config, longest)
        engine = self.engine(None)
        prompt = [next(i for i in range(self.model.config.vocab_size) if i != self.model.config.mask_token_id)]
        stages = config.rollout.stages() if config.rl.steps else []
        ways = [("rollout", rollout_options(stage, seed=0)) for stage in stages]
        for key, options in [*ways, *((f"eval ({name})", way) for name, way in self.protocols.items())]:
            engine.check(Request(prompt, options), key)

    def _load_task(self) -> Task:
        section = self.config.task
        settings.configure(self.config.reward, local_mesh(self.mesh))
        spec = get_spec(section.name)
        if self.config.rl.steps and not section.path and spec.options is None:
            raise ConfigError(
                f"task {section.name} needs training rows: set task.path to a file, hub:.. or package:.."
                + (f", or to default, which is {spec.train}" if spec.train else "")
            )
        task = load_task(
            section.name,
            path=section.path,
            eval_path=section.eval_path,
            template=section.template,
            rewards=section.rewards,
            train_limit=section.train_limit,
            eval_limit=self.config.eval.limit,
            options=section.options,
            on_bad_row=section.on_bad_row,
        )
        of_steps = rewards_of_steps({task.accuracy_reward, *task.rewards})
        if of_steps and self.config.rl.steps and not self.config.value.enabled:
            raise ConfigError(
                f"the reward {of_steps[0]} judges the steps of a response, and only advantages of tokens tell them "
                "apart: set value.enabled=true, or take it out of task.rewards"
            )
        start_rewards({task.accuracy_reward, *task.rewards})
        return task

    def _problems(self, rows: list[dict]) -> list[Problem]:
        """Rows of the task as prompts, by the task's template and limits."""
        section = self.config.task
        return encode_prompts(
            rows, self.tokenizer, self.task.template, section.max_prompt_tokens, on_bad_row=section.on_bad_row,
            prefix=section.prefix,
        )  # fmt: skip

    # Model

    def _open_model(self) -> Model:
        """The model description; its config and tokenizer are kept in <run>/model from the first start on."""
        section, folder = self.config.model, self.path / "model"
        from_lead(lambda: self._write_model(folder))
        if not folder.exists():
            raise ConfigError(
                f"{folder}: written by process 0, and process {process_index()} does not see it: set runs_dir to a "
                "folder that all hosts of a job share"
            )
        config = read_model_config(
            folder,
            dtype=section.dtype,
            remat=section.remat,
            scan_layers=section.scan_layers,
            attention=section.attention,
        )
        model = Model(config, mesh=self.mesh)
        rollout_model(model, self.config.rollout.tensor)  # for its ConfigError
        return model

    def _write_model(self, folder: Path) -> None:
        if self.folder.config and folder.exists():
            return
        section = self.config.model
        with whole_folder(folder, overwrite=True) as partial:
            if section.path is not None:
                model, dtype = Model(read_model_config(section.path)), stored_dtype(section.path)
                save_model_files(partial, model, source=section.path, dtype=dtype)
            else:
                self._write_preset(partial)
            if section.tokenizer is not None:
                copy_companions(section.tokenizer, partial)

    def _open_tokenizer(self):
        """Raises ConfigError when the model has none, or one that does not go with the model."""
        tokenizer, section = load_tokenizer(self.path / "model"), self.config.model
        if tokenizer is None:
            raise ConfigError(
                "training needs a tokenizer (rewards read text): set model.tokenizer to a folder that has one"
            )
        folder, mask, config = section.tokenizer or section.path, mask_token_id(tokenizer), self.model.config
        if len(tokenizer) > config.vocab_size:
            raise ConfigError(
                f"{folder}: the tokenizer has {len(tokenizer)} ids, the model only {config.vocab_size}: "
                "set model.tokenizer to the one the model was trained with"
            )
        if mask != config.mask_token_id and (mask is not None or config.mask_token_id < len(tokenizer)):
            has = "no mask token" if mask is None else f"mask id {mask}"
            raise ConfigError(
                f"{folder}: the tokenizer has {has}, the model's mask id is {config.mask_token_id}: "
                "set model.tokenizer to the one the model was trained with, or add its mask token"
            )
        return tokenizer

    def _write_preset(self, folder: Path) -> None:
        section = self.config.model
        if section.preset not in PRESETS:
            raise ConfigError(f"unknown model.preset {section.preset!r}; there are {', '.join(PRESETS)}")
        config = PRESETS[section.preset]
        if section.tokenizer is not None:
            tokenizer = load_tokenizer(section.tokenizer)
        else:
            tokenizer = build_char_tokenizer(folder) if self.config.task.name == "arithmetic" else None
        if tokenizer is None:
            raise ConfigError("a preset has no tokenizer of its own: set model.tokenizer to a folder that has one")
        mask = mask_token_id(tokenizer)
        if mask is None or tokenizer.eos_token_id is None:
            raise ConfigError(
                f"{section.tokenizer}: a tokenizer with a mask token and an EOS token is needed, this one has mask "
                f"{tokenizer.mask_token} and EOS {tokenizer.eos_token}: add what is missing to tokenizer_config.json"
            )
        if mask != config.mask_token_id:  # else it is the tokenizer the architecture was published with
            config = config.replace(
                vocab_size=round_up(len(tokenizer), 32),
                mask_token_id=mask,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                stop_token_ids=(tokenizer.eos_token_id,),
            )
        save_model_files(folder, Model(config), source=None)

    def initial_params(self) -> Any:
        """The policy's weights: those of `model.path`, or random ones."""
        if self.config.model.path is not None:
            return load_hf(self.config.model.path, mesh=self.mesh)[1]
        return self.model.init(jax.random.key(self.config.seed))

    def initial_value_params(self) -> Any:
        """The value model's weights, from `value.path`."""
        return load_hf(self.config.value.path, mesh=self.mesh, head="value")[1]

    def engine(self, params: Any) -> Engine:
        section, valid = self.config.rollout, valid_vocab(self.tokenizer, self.model.config.vocab_size)
        model = rollout_model(self.model, section.tensor)
        slots = section.slots_per_device * row_shards(model.mesh)
        return Engine(model, params, engine_config(section, slots, valid))

    def decode(self, ids: np.ndarray) -> str:
        """Response ids to text, see `interop.tokenizer.decode`."""
        return decode(self.tokenizer, ids)

    def pieces(self, ids: np.ndarray) -> list[str]:
        """The text that each of the ids adds to what `decode` gives."""
        return decode_pieces(self.tokenizer, ids.tolist(), decode)

    # State

    def save(self, progress: Progress, trees: dict[str, Any], ahead: dict | None = None) -> None:
        """`ahead`: samples that are already there for the next RL step (rl/rollouts.py)."""
        meta = {"config": config_io.to_dict(self.config), **versions()}
        documents = {"data": dataclasses.asdict(progress), "meta": meta}
        if ahead is not None:
            documents["ahead"] = ahead
        self.checkpointer.save(progress.checkpoint_step, trees, documents)

    def export(self, params: Any) -> Path:
        """The policy as a Hugging Face folder <run>/hf, in the dtype of the folder the run started from."""
        target, source = self.path / "hf", self.path / "model"
        stored = read_json(source / "config.json")
        dtype = stored.get("dtype", stored.get("torch_dtype"))
        save_hf(target, self.model, params, source=source, dtype=dtype, overwrite=True)
        return target

    def open_log(self, phase: str, total_steps: int, first_step: int) -> MetricLog:
        if not is_lead():
            return MetricLog([], phase)
        writers = [name for name in ("tensorboard", "wandb") if getattr(self.config.report, name)]
        return open_log(self.folder, phase, total_steps=total_steps, first_step=first_step, writers=writers)


def check_canvas(config: RunConfig, prompt_tokens: int) -> None:
    """Raises ConfigError where a full-attention model cannot be trained on what is decoded behind such a prompt."""
    if config.rl.block_size is not None:
        raise ConfigError("rl.block_size is for block-causal models: to full attention everything is one block")
    canvas = prompt_tokens + config.rollout.longest
    if canvas > config.rl.row_length:
        raise ConfigError(
            f"rl.row_length is {config.rl.row_length}, but a full-attention model is trained on whole canvases "
            f"of up to {canvas} tokens: raise it, or lower rollout.max_tokens or task.max_prompt_tokens"
        )


def engine_config(section: RolloutSection, slots: int, valid_vocab: int | None = None) -> EngineConfig:
    names = ("commit", "drafts", "cache", "horizon", "refresh", "kv_dtype")
    return EngineConfig(slots, valid_vocab=valid_vocab, **{name: getattr(section, name) for name in names})


def rollout_options(section: RolloutSection, seed: int) -> SamplingOptions:
    """How RL decodes at a stage of the run. Raises ConfigError naming the key."""
    names = ("strategy", "score", "confidence", "first_token", "threshold", "entropy_bound", "denoising_steps",
             "block_size", "max_tokens", "temperature", "top_k", "top_p")  # fmt: skip
    try:
        return SamplingOptions(**{name: getattr(section, name) for name in names}, seed=seed)
    except ConfigError as error:
        raise ConfigError(f"rollout: {error}") from None


def weight_files(folder: str) -> dict[str, int]:
    """{name: bytes} of a model folder's."""
    return {path.name: path.stat().st_size for path in sorted(Path(folder).glob("*.safetensors"))}


def with_defaults(stored: dict[str, Any]) -> dict[str, Any]:
    """A stored config with the defaults of keys that have come since; as it is if it has keys that are gone."""
    try:
        return config_io.to_dict(config_io.from_dict(RunConfig, stored))
    except ConfigError:
        return stored


def versions() -> dict[str, str]:
    return {"tracerl_jax": tracerl_jax.__version__, "jax": jax.__version__, "python": platform.python_version()}
