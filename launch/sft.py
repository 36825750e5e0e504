"""tracerl sft: supervised training only."""

import argparse
import dataclasses

from tracerl_jax.launch.common import add_training_arguments, resolve_training, train_and_describe

HELP = """Supervised fine-tuning (sft.method semi_ar, random_masking, trace or ar), evaluation before and after, and the
result as a Hugging Face folder. The same command continues a run that was interrupted."""

EPILOG = """examples:
  tracerl sft --config configs/sft_sdar_4b.py --config.model.path=SDAR-4B-Chat --config.sft.path=rows.jsonl
  tracerl sft --config demo --config.name=warmup --config.sft.steps=300"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_training_arguments(parser)


def run(args: argparse.Namespace) -> int:
    config = resolve_training(args)
    config = dataclasses.replace(config, rl=dataclasses.replace(config.rl, steps=0))
    train_and_describe("sft", args, config)
    return 0
