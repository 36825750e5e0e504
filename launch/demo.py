"""tracerl demo: the quick start."""

import argparse
import os
from importlib.metadata import version

from tracerl_jax.launch.common import add_config_arguments, command_again, resolve, train_and_describe

HELP = """Train a 1.2M-parameter block-diffusion model from nothing to arithmetic on this CPU: supervised warm-up, then
TraceRL with a diffusion value model. Writes runs/demo: metrics, samples, checkpoints, a Hugging Face folder and a
report page. Interrupt it and start it again: it goes on where it stopped."""

EPILOG = """examples:
  tracerl demo
  tracerl demo --config.seed=1 --config.name=demo-seed1
  tracerl demo --config demo:llada                (a full-attention model; demo:dream)
  tracerl demo --config.rl.steps=40              (continues the finished demo)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from tracerl_jax.config import RunConfig

    add_config_arguments(parser, RunConfig, default="demo")


def run(args: argparse.Namespace) -> int:
    from tracerl_jax.config import RunConfig

    config = resolve(args, RunConfig)
    use_all_cores()
    train_and_describe("demo", args, config)
    print(f"go on:    {command_again('demo', args, rl__steps=2 * config.rl.steps)}")
    return 0


def use_all_cores() -> None:
    """Before the first use of jax: with XNNPACK, XLA:CPU of jax 0.10 runs small matrix products on one core only."""
    if version("jaxlib").startswith("0.10.") and "xnnpack" not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_xnnpack=false".strip()
