"""`tracerl convert`: Hugging Face folder to Orbax checkpoint and back."""

import argparse

from tracerl_jax.launch.common import CommandParser

HELP = """
Convert a Hugging Face model folder (SDAR, TraDo, Dream, DiffuCoder, LLaDA, MMaDA) to a native checkpoint, or a native
checkpoint or a run to a Hugging Face folder. Which way is read off the source. Tokenizer, chat template, generation
config and remote code come along. The target appears complete or not at all.
"""
EPILOG = """examples:
  tracerl convert --from SDAR-4B-Chat --to checkpoints/sdar-4b
  tracerl convert --from checkpoints/sdar-4b --to SDAR-4B-copy --check
  tracerl convert --from runs/first --to my-model --dtype bfloat16      # the newest checkpoint of a run"""

DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument("--from", dest="source", metavar="DIR", required=True, help="folder to read")
    parser.add_argument("--to", dest="target", metavar="DIR", required=True, help="folder to write")
    parser.add_argument("--dtype", choices=DTYPES, help="of the tensors written (default: as in the source)")
    parser.add_argument("--head", choices=("lm", "value"), default="lm", help="head to read from a Hugging Face folder")
    parser.add_argument("--step", type=int, help="checkpoint of a run (default: the newest)")
    parser.add_argument("--max_shard_gb", type=float, default=5.0, help="size of a safetensors file (default: 5)")
    parser.add_argument("--overwrite", action="store_true", help="replace the target if it is there")
    parser.add_argument(
        "--check", action="store_true", help="read the target again and compare every tensor and a forward pass"
    )


def run(args: argparse.Namespace) -> int:
    from tracerl_jax.errors import ConfigError
    from tracerl_jax.interop.convert import check, convert

    if args.max_shard_gb <= 0:
        raise ConfigError(f"--max_shard_gb is {args.max_shard_gb}; it must be above 0")
    conversion = convert(
        args.source,
        args.target,
        dtype=args.dtype,
        head=args.head,
        step=args.step,
        max_shard_bytes=int(args.max_shard_gb * 1e9),
        overwrite=args.overwrite,
    )
    kind = {"hf": "Hugging Face folder", "native": "native checkpoint"}[conversion.kind]
    print(f"{args.target}: {kind}, {conversion.model.config.num_params():,} parameters, {conversion.dtype}")
    if not args.check:
        return 0
    result = check(conversion, args.target)
    output = "logits" if result.max_kl is not None else "values"
    print(f"weights: {result.parameters} stacked parameters compared, max difference {result.max_difference:.3g}")
    print(f"{output} on random ids: max difference {result.output_difference:.3g}")
    if result.max_kl is not None:
        print(f"KL divergence: max {result.max_kl:.3g}")
    if result.wrong:
        print(f"check FAILED: these differ by more than rounding to {conversion.dtype}: {', '.join(result.wrong)}")
        return 1
    print("check passed")
    return 0
