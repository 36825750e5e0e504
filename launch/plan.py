"""`tracerl plan`: prints what `tracerl_jax.plan` finds out about a config on a machine that is not there."""

import argparse
import json
import os
import sys

from tracerl_jax.launch.common import CommandParser, add_config_arguments, resolve

HELP = """
Will it fit, and how long will a step take? Compiles the programs of `tracerl rl` with a config for a TPU slice or a
number of GPUs, with the real compilers, on this CPU; nothing is allocated, and no accelerator is needed.

Bytes are the compiler's own. Times are what the chip's peak FLOPs, HBM and links allow: lower bounds, every program as
long as the slowest of the three, nothing lost to anything else. Lengths of prompts and responses are assumptions:
without the flags below, the longest that the config allows.

Exits with status 1 when a program does not fit, and names the keys to turn.
"""
EPILOG = """examples:
  tracerl plan --config rl_sdar_8b_math --topology v5p:4x4x4
  tracerl plan --config rl_sdar_4b_math --topology h100:8 --response_tokens 800 --json

topologies:
  v4:XxYxZ  v5p:XxYxZ  v5e:XxY  v6e:XxY  a100:N  a100-40g:N  h100:N  h200:N
  in chips: Google's v5p-64 counts two cores a chip and is v5p:2x4x4"""


def add_arguments(parser: CommandParser) -> None:
    from tracerl_jax.config import RunConfig

    add_config_arguments(parser, RunConfig)
    parser.add_argument("--topology", required=True, metavar="CHIP:SHAPE", help="such as v5p:4x4x4 or h100:8")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument(
        "--prompt_tokens", type=int, metavar="N", help="of a prompt, on average (default: task.max_prompt_tokens)"
    )
    parser.add_argument(
        "--response_tokens", type=int, metavar="N", help="of a response, on average (default: rollout.max_tokens)"
    )
    parser.add_argument(
        "--tokens_per_step", type=float, metavar="X",
        help="tokens revealed per denoise step and sequence (default: those of a static or sequential schedule, else "
        "2.6: the paper's SDAR models reach 2 to 2.7 with dynamic decoding)",
    )  # fmt: skip
    parser.add_argument(
        "--kept_fraction", type=float, default=1.0, metavar="X",
        help="of the responses, after the accuracy filter (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--utilisation", type=float, default=0.4, metavar="X",
        help="share of the chip's peak rates, for the estimated times in the table by rl.shrink (default: 0.4)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"  # even where there is an accelerator: somebody may be using it

    from tracerl_jax.config import RunConfig
    from tracerl_jax.parallel.mesh import make_mesh
    from tracerl_jax.plan.estimate import estimate_run
    from tracerl_jax.plan.programs import model_config, plan_run
    from tracerl_jax.plan.report import check_utilisation, format_plan, plan_dict
    from tracerl_jax.plan.topology import compile_devices, parse_topology
    from tracerl_jax.plan.workload import assume

    config = resolve(args, RunConfig)
    check_utilisation(args.utilisation)
    model_block_size = model_config(config).block_size
    config = config.heaviest(model_block_size)
    workload = assume(
        config,
        config.rollout.block_size or model_block_size,
        prompt_tokens=args.prompt_tokens,
        response_tokens=args.response_tokens,
        tokens_per_step=args.tokens_per_step,
        kept_fraction=args.kept_fraction,
    )
    topology = parse_topology(args.topology)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices=compile_devices(topology))
    plan = estimate_run(plan_run(config, mesh, workload), topology, mesh)
    if args.json:
        print(json.dumps({"config": args.config, **plan_dict(plan, config, workload, args.utilisation)}, indent=2))
    else:
        print(format_plan(plan, config, workload, args.utilisation))
    if not plan.fits:
        print("tracerl plan: does not fit", file=sys.stderr)
    return 0 if plan.fits else 1
