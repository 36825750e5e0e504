"""A whole run: supervised warm-up, evaluation, RL, evaluation, export. Started again it goes on where it stopped."""

import contextlib
import logging
import shutil
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from tracerl_jax.config import RunConfig
from tracerl_jax.config_io import to_dict
from tracerl_jax.errors import CheckpointError, ConfigError
from tracerl_jax.evals.runner import evaluate
from tracerl_jax.parallel import watchdog
from tracerl_jax.parallel.distributed import is_job
from tracerl_jax.parallel.facts import check_alike, check_data, digest
from tracerl_jax.parallel.peers import from_lead
from tracerl_jax.report.metrics import MetricLog
from tracerl_jax.report.page import write_page
from tracerl_jax.report.run_dir import METRICS, SUMMARY, intact_rows, read_json
from tracerl_jax.rl.loop import PHASES as RL_PHASES
from tracerl_jax.rl.loop import make_learner, train_rl
from tracerl_jax.rl.update import Learner
from tracerl_jax.rollout.engine import Engine
from tracerl_jax.sft.loop import PHASES as SFT_PHASES
from tracerl_jax.sft.loop import prepare_examples, train_sft
from tracerl_jax.training.checkpoint import abstract_like, disk_errors
from tracerl_jax.training.optimizer import make_optimizer
from tracerl_jax.training.run import Progress, Run
from tracerl_jax.training.step import TrainState, abstract_state, init_state, sharded_abstract_params

log = logging.getLogger(__name__)

PHASES = (watchdog.BETWEEN, "start", "export", *RL_PHASES, *SFT_PHASES)  # whose time `faults.phase_timeout` limits


def limit_phases(config: RunConfig, stacks: Path | None, between: float | None = None) -> None:
    """Configures the watchdog; `stacks`: folder; `between`: seconds between phases, if the config says nothing of them.
    Raises ConfigError for a limit of a phase that there is not."""
    if unknown := [name for name in config.faults.phase_timeout if name not in PHASES]:
        known = ", ".join(dict.fromkeys(PHASES))
        raise ConfigError(f"faults.phase_timeout names {unknown[0]}, which is no phase; there are {known}")
    faults = config.faults
    limits = ({} if between is None else {watchdog.BETWEEN: between}) | faults.phase_timeout
    watchdog.configure(faults.heartbeat, faults.phase_seconds, limits, stacks)


def train(config: RunConfig) -> dict[str, Any]:
    """Run to the end and return the summary (also in <run>/summary.json).

    Raises UserError for anything the user can mend and KeyboardInterrupt after SIGINT or SIGTERM, everything saved.
    """
    if not config.sft.steps and not config.rl.steps:
        raise ConfigError("nothing to do: sft.steps and rl.steps are both 0")
    steps, profiled = config.rl.steps or config.sft.steps, config.report.profiled
    if profiled and profiled[-1] > steps:
        raise ConfigError(f"report.profile asks for steps {profiled[0]} to {profiled[-1]}, but there are {steps}")
    limit_phases(config, Path(config.runs_dir) / config.name)
    check_alike(to_dict(config))
    with watchdog.phase("start"):
        run = Run(config)
    with run:
        learner = make_learner(run.model, config)
        sft_optimizer = make_optimizer(config.sft.optimizer, config.sft.steps)
        with watchdog.phase("start"):
            progress, trees, ahead = _restore(run, learner, sft_optimizer)
        if progress.phase == "sft":
            progress, params = _supervised(run, progress, trees, sft_optimizer)
            trees = None  # the warm-up's optimizer state, which RL has no room for
            progress = Progress("rl", progress.sft_step)
            learner.start(params, _value_start(run, learner, params))
            _keep_reference(run, learner)
        else:
            learner.load(trees)
            _load_reference(run, learner)

        def evaluate_policy(engine: Engine, step: int, metric_log: MetricLog) -> None:
            role = "after" if step >= config.rl.steps else "before" if step == 0 else None
            _evaluate(run, engine, step, metric_log, role)

        if config.rl.steps:
            train_rl(run, progress, learner, evaluate_policy, ahead)
        else:
            _evaluate_supervised(run, learner.policy.params, progress.sft_step, "after")
        with watchdog.phase("export"):
            exported = run.export(learner.policy.params)
        run.folder.update_summary({"hf_folder": str(exported)})
    # After the folder is closed: the page shows its final status.
    return from_lead(lambda: {"page": str(write_page(run.path)), **read_json(run.path / SUMMARY)})


def describe_summary(summary: dict[str, Any]) -> str:
    """Accuracy and tokens per step before and after as a table, and where the results are."""
    results = summary.get("eval", {})
    lines = [f"{'':10} {'accuracy':>20} {'tokens per step':>20} {'problems':>9}"]
    for strategy in results.get("after", {}):
        after, before = results["after"][strategy], results.get("before", {}).get(strategy)
        cells = [
            " -> ".join("unknown" if r[key] is None else f"{r[key]:{form}}" for r in (before, after) if r)
            for key, form in (("accuracy", ".1%"), ("tokens_per_step", ".2f"))
        ]
        lines.append(f"{strategy:10} {cells[0]:>20} {cells[1]:>20} {after['n']:>9}")
    return "\n".join(
        [
            *(lines if len(lines) > 1 else []),
            f"model:    {summary['hf_folder']} (Hugging Face folder)",
            f"page:     {summary['page']}",
        ]
    )


def _restore(run: Run, learner: Learner, sft_optimizer) -> tuple[Progress, dict[str, Any] | None, dict | None]:
    """Where the run stopped, its arrays, and samples that are there for its next step; a fresh Progress and None when
    it has no checkpoint."""

    def abstract(documents: dict) -> dict[str, Any]:
        if documents["data"]["phase"] == "rl":
            if not run.config.rl.steps:
                raise ConfigError(
                    f"{run.path}: this run is past its supervised training, at RL step {documents['data']['rl_step']}: "
                    "go on with `tracerl rl`, or start a new run with another --config.name"
                )
            return learner.abstract_trees()
        state = abstract_state(sharded_abstract_params(run.model), sft_optimizer)
        return {"params": state.params, "train": state._replace(params=())}

    restored = run.checkpointer.restore(abstract)
    if restored is None:
        run.folder.truncate_after(0, "sft")
        return Progress(), None, None
    _, trees, documents = restored
    progress = Progress(**documents["data"])
    step = progress.rl_step if progress.phase == "rl" else progress.sft_step
    run.folder.truncate_after(step, progress.phase)
    log.info("continuing run %s from %s step %d", run.path, progress.phase, step)
    return progress, trees, documents.get("ahead")


def _supervised(run: Run, progress: Progress, trees: dict[str, Any] | None, optimizer) -> tuple[Progress, Any]:
    """Progress and parameters after the warm-up."""
    # Before anything else: a bad row is found now, not after the evaluation.
    examples = prepare_examples(run) if progress.sft_step < run.config.sft.steps else []
    if is_job():
        check_data({"rows": {"sft": digest(examples)}})
    if trees is not None:
        state = trees["train"]._replace(params=trees["params"])
    else:
        params = run.initial_params()
        if not run.config.sft.steps:
            return progress, params
        if not run.config.rl.steps:
            _evaluate_supervised(run, params, 0, "before")
        state: TrainState = init_state(params, optimizer)
    if examples:
        progress, state = train_sft(run, progress, state, examples)
    return progress, state.params


def _value_start(run: Run, learner: Learner, policy_params: Any) -> Any:
    if not run.config.value.enabled:
        return None
    if run.config.value.path is not None and not run.config.value.shared_trunk:
        return run.initial_value_params()
    return learner.initial_value_params(policy_params)


# The reference policy never changes, so it is written once instead of with every checkpoint.


def _keep_reference(run: Run, learner: Learner) -> None:
    if learner.reference is None:
        return
    folder = (run.path / "reference").absolute()
    from_lead(lambda: shutil.rmtree(folder, ignore_errors=True))
    with disk_errors(folder), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, learner.reference)


def _load_reference(run: Run, learner: Learner) -> None:
    if learner.config.kl_to == "reference":
        folder = (run.path / "reference").absolute()
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                learner.reference = checkpointer.restore(folder, abstract_like(learner.policy.params))
        except (ValueError, KeyError, OSError) as error:
            raise CheckpointError(
                f"{folder}: the reference policy cannot be read ({error}): restore the folder from a copy, or start a "
                "new run with another --config.name"
            ) from error


# Evaluation


def _evaluate_supervised(run: Run, params: Any, step: int, role: str) -> None:
    """Supervised training alone has its own clock and metric names; a run with RL evaluates what RL starts from."""
    with contextlib.closing(run.open_log("sft", run.config.sft.steps, step)) as metric_log, watchdog.phase("eval"):
        _evaluate(run, run.engine(params), step, metric_log, role, prefix="sft/eval/")


def _evaluate(
    run: Run, engine: Engine, step: int, metric_log: MetricLog, role: str | None, prefix: str = "eval/"
) -> None:
    """Accuracy of the engine's weights on the held-out problems with every strategy, into the metrics and, with a role
    ("before", "after"), the summary. The metric row comes last: a run that finds both need not evaluate again."""
    if not run.test_problems or not run.protocols:
        return
    moment = f"{prefix}{step}"  # a summary of other moments is from when the run was to be shorter or longer

    def is_there() -> tuple[bool, bool]:
        is_logged = any(
            row["phase"] == "eval" and row["step"] == step and any(name.startswith(prefix) for name in row)
            for row in intact_rows(run.path / METRICS)
        )
        moments = read_json(run.path / SUMMARY).get("eval_moments", {})
        return is_logged, role is None or moments.get(role) == moment

    is_logged, is_summarised = from_lead(is_there)
    if is_logged and is_summarised:
        return
    results, metrics = {}, {}
    for strategy, options in run.protocols.items():
        result = evaluate(
            engine, run.test_problems, run.task.rewards, run.task.accuracy_reward, options=options,
            samples_per_prompt=run.config.eval.samples_per_prompt, decode=run.decode, check=run.stop.check,
        )  # fmt: skip
        results[strategy] = result.summary()
        metrics |= {f"{prefix}{strategy}/{name}": value for name, value in result.metrics().items()}
    if role is not None:
        run.folder.update_summary({"eval": {role: results}, "eval_moments": {role: moment}})
    if not is_logged:
        metric_log.write(step, metrics, phase="eval")
