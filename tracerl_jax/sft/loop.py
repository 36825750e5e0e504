"""Supervised training: masked blocks (semi-AR) or responses, replayed decoding orders (trace), next token (AR)."""

from collections.abc import Sequence
from functools import partial

import jax
import numpy as np

from tracerl_jax.data.iterator import PromptIterator
from tracerl_jax.data.prompts import Example
from tracerl_jax.diffusion.packing import pack
from tracerl_jax.models import Model
from tracerl_jax.parallel.peers import own_share
from tracerl_jax.parallel.sharding import row_shards
from tracerl_jax.report.flops import TRAINED, replay_work
from tracerl_jax.report.metrics import DelayedMetrics, PhaseTimer
from tracerl_jax.report.profile import Profiler
from tracerl_jax.report.speed import Speed
from tracerl_jax.rl.logprobs import packed_logprobs
from tracerl_jax.rl.objectives import cross_entropy
from tracerl_jax.sft.examples import Layout, check_method, drop_long, fill_last_block, load_examples, make_items
from tracerl_jax.training.guard import NonFiniteGuard
from tracerl_jax.training.interrupt import Interrupted
from tracerl_jax.training.optimizer import make_optimizer, make_schedule
from tracerl_jax.training.run import Progress, Run
from tracerl_jax.training.step import TrainState, Updater

PHASES = ("pack", "update", "save")


def sft_objective(model: Model, params, batch):
    """Weighted cross entropy at the masked positions; `batch` is {"rows": PackedRows}."""
    rows = batch["rows"]
    logp, _ = packed_logprobs(model, params, rows)
    return cross_entropy(logp, rows.target_weight)


def prepare_examples(run: Run) -> list[Example]:
    """What the warm-up trains on. Raises ConfigError for a method that does not go with the model and DataError for bad
    rows, before anything is trained."""
    model, sft = run.model.config, run.config.sft
    check_method(sft.method, model)
    layout = Layout.of(model, run.config)
    examples = load_examples(run.task, run.tokenizer, run.config)
    if sft.method != "ar":
        examples = [fill_last_block(e, layout, model.eos_token_id, model.stop_token_ids) for e in examples]
    return drop_long(examples, sft, layout, on_bad_row=run.config.task.on_bad_row)


def train_sft(
    run: Run, progress: Progress, state: TrainState, examples: Sequence[Example]
) -> tuple[Progress, TrainState]:
    """The updates from `progress.sft_step` to `sft.steps` on `prepare_examples`; `state` is donated."""
    config, model, layout = run.config.sft, run.model, Layout.of(run.model.config, run.config)
    iterator = PromptIterator(len(examples), run.config.seed)
    if progress.data is not None:
        iterator.restore(progress.data)
    schedule = make_schedule(config.optimizer, config.steps)
    rows_per_micro_batch = config.rows_per_device * row_shards(model.mesh)
    updater = Updater(partial(sft_objective, model), make_optimizer(config.optimizer, config.steps), model.mesh)
    guard = NonFiniteGuard(run.path, run.config.rl.max_skipped_updates, progress.skipped_in_a_row)
    log = run.open_log("sft", config.steps, progress.sft_step)
    metrics = DelayedMetrics(log)
    timer, previous = PhaseTimer(), None
    speed = Speed(run.folder, "sft", phases=PHASES, chips=run.mesh.size)
    profiler = Profiler(range(0) if run.config.rl.steps else run.config.report.profiled, run.path / "profile")

    def settle():
        """Look at what the device has done: `progress` and metrics.jsonl are up to date afterwards."""
        nonlocal previous
        if previous is not None:
            guard.check(*previous)
        previous = None
        progress.skipped_in_a_row = dict(guard.skipped_in_a_row)
        metrics.flush()

    def save():
        settle()  # a run that is killed from now on must find in metrics.jsonl what the checkpoint has behind it
        with timer("save"):
            run.save(progress, {"params": state.params, "train": state._replace(params=())})

    try:
        while progress.sft_step < config.steps:
            run.stop.check_together()
            update = progress.sft_step + 1
            profiler.at(update, state)
            with timer("pack"):
                chosen = [examples[i] for i in iterator.next(config.sequences_per_update)]
                items = make_items(chosen, config, layout, seed=run.config.seed, update=update)
                rows = pack(items, row_length=config.row_length)
                denominator = max(1.0, float(np.sum(rows.target_weight)))
                batches = [{"rows": part} for part in rows.split(rows_per_micro_batch)]
            with timer("update"), jax.profiler.StepTraceAnnotation("step", step_num=update):
                state, result = updater.update(state, batches, denominator)
                if previous is not None:  # looked at one update late: the device is never waited for
                    guard.check(*previous)
            # Of the whole time: while the host packs the next update, the device still works on this one.
            timer.count("total", replay_work(model.config, own_share(items), trunk=TRAINED, heads=TRAINED))
            previous = (result, batches[-1], f"sft update {update}")
            progress = Progress("sft", update, 0, iterator.state())
            if update % config.log_every == 0 or update == config.steps:
                rates = speed.row(update, timer.seconds(), timer.work)
                row = {
                    "sft/loss": result.loss,
                    "sft/grad_norm": result.grad_norm,
                    "sft/lr": float(schedule(update - 1)),
                    "sft/skipped": update - state.updates,
                    "sft/tokens_per_second": rates["chips/total/tokens_per_second"] * run.mesh.size,
                }
                metrics.write(update, row | rates)
                timer.restart()
            if update % run.config.checkpoint.sft_every == 0 or update == config.steps:
                save()
        settle()
    except Interrupted:
        save()
        raise
    finally:
        profiler.close()
        log.close()
    return progress, state
