"""tracerl rl: a whole run."""

import argparse

from tracerl_jax.launch.common import add_training_arguments, resolve_training, train_and_describe

HELP = """Train a diffusion language model by reinforcement learning: optional supervised warm-up (sft.steps), TraceRL
or one of its baselines, evaluation before and after, and the result as a Hugging Face folder. The same command
continues a run that was interrupted."""

EPILOG = """examples:
  tracerl rl --config demo
  tracerl rl --config configs/rl_sdar_4b_math.py --config.model.path=SDAR-4B-Chat --config.name=first
  tracerl rl --config configs/rl_sdar_4b_math.py --config.name=first            (continues it)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_training_arguments(parser)


def run(args: argparse.Namespace) -> int:
    config = resolve_training(args)
    train_and_describe("rl", args, config)
    return 0
