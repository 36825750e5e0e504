"""What the sub-commands of `tracerl` share: the parser, the handling of `--config`, and training."""

import argparse
import difflib
import json
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from tracerl_jax.errors import UserError

Schema = TypeVar("Schema")


class CommandParser(argparse.ArgumentParser):
    """Argument parser whose mistakes are `UserError`s with a suggestion.

    The description is filled to the terminal's width, paragraph by paragraph; the epilog is shown as it is.
    """

    def __init__(self, *, prog: str, description: str = "", epilog: str | None = None):
        width = min(shutil.get_terminal_size().columns, 100)
        description = "\n\n".join(textwrap.fill(" ".join(part.split()), width) for part in description.split("\n\n"))
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.config_flags: list[str] = []  # --config.KEY of every key, filled by add_config_arguments
        self.takes_command = False  # whether a command line of tracerl follows behind "--"

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse; `args.overrides` holds the `--config.KEY=VALUE` flags in order, and `args.command` what stands behind
        "--", if the parser takes a command."""
        command: list[str] = []
        if self.takes_command:
            argv, dashes, command = _split_at_dashes(argv)
            if not dashes and not {"-h", "--help"} & set(argv):
                self.error(f"what shall run? It follows two dashes: {self.prog} .. -- rl --config demo")
        argv, overrides = split_overrides(argv)
        for word in argv:  # before argparse says that the flag which was meant is missing
            flag = word.partition("=")[0]
            if flag.startswith("--") and flag != "--" and flag not in self._option_string_actions:
                self.error(f"unknown flag {flag}{self._suggest(flag)}")
        args, unknown = self.parse_known_args(argv)
        flags = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        if overrides and not self.config_flags:
            flags.append(overrides[0].partition("=")[0])
        if flags:
            self.error(f"unknown flag {flags[0]}{self._suggest(flags[0])}")
        if unknown:
            self.error(f"unexpected argument {unknown[0]}")
        args.overrides, args.command = overrides, command
        return args

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}\n{self.prog} --help lists what it takes")

    def _suggest(self, flag: str) -> str:
        own = [option for action in self._actions for option in action.option_strings]
        name = flag.lstrip("-")
        same_key = [known for known in self.config_flags if known.endswith(f".{name}")]
        close = same_key or difflib.get_close_matches(flag, own + self.config_flags, n=1)
        return "; did you mean " + " or ".join(close[:3]) + "?" if close else ""


def _split_at_dashes(argv: Sequence[str]) -> tuple[list[str], bool, list[str]]:
    """What stands before the first "--", whether there is one, and what stands behind it."""
    at = list(argv).index("--") if "--" in argv else len(argv)
    return list(argv[:at]), at < len(argv), list(argv[at + 1 :])


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take `--config.KEY=VALUE` and `--config.KEY VALUE` out of a command line: (the rest, ["--config.KEY=VALUE"])."""
    rest, overrides = [], []
    words = iter(argv)
    for word in words:
        if not word.startswith("--config."):
            rest.append(word)
            continue
        if "=" not in word:
            value = next(words, None)
            if value is None or value.startswith("--"):
                raise UserError(f"{word}: needs a value, as in {word}=VALUE")
            word = f"{word}={value}"
        overrides.append(word)
    return rest, overrides


def add_config_arguments(parser: CommandParser, schema: type, default: str | None = None) -> None:
    """Add `--config`, `--config.KEY=VALUE` and `--print_config`, and list the keys of `schema` below the help."""
    from tracerl_jax.config_io import FLAG, describe, installed_configs, keys_of

    shown = f"default: {default}" if default else "required"
    parser.add_argument(
        "--config",
        metavar="FILE[:ARG]",
        default=default,
        required=default is None,
        help=f"a config file, or one of: {', '.join(installed_configs())} ({shown}); "
        f"{FLAG}KEY=VALUE sets single keys, which are listed below",
    )
    parser.add_argument("--print_config", action="store_true", help="print the resolved config as JSON and exit")
    parser.config_flags += [FLAG + key for key in keys_of(schema)]
    keys = f"config keys, their defaults and types (in the file, or {FLAG}KEY=VALUE):\n\n{describe(schema)}"
    parser.epilog = f"{parser.epilog}\n\n{keys}" if parser.epilog else keys


def add_training_arguments(parser: CommandParser) -> None:
    """Those of a command that trains: of its config, and `--profile`, which is short for one of its keys."""
    from tracerl_jax.config import RunConfig
    from tracerl_jax.config_io import FLAG

    add_config_arguments(parser, RunConfig)
    parser.add_argument(
        "--profile", metavar="FIRST:COUNT", help=f"write a profile of these steps, short for {FLAG}report.profile"
    )


def resolve_training(args: argparse.Namespace) -> Any:
    """`resolve` for `add_training_arguments`."""
    from tracerl_jax.config import RunConfig
    from tracerl_jax.config_io import FLAG

    if args.profile is not None:
        args.overrides.append(f"{FLAG}report.profile={args.profile}")
    return resolve(args, RunConfig)


def resolve(args: argparse.Namespace, schema: type[Schema]) -> Schema:
    """The config that the flags ask for. With `--print_config`, prints it and exits with status 0.

    Raises:
        ConfigError: see `config_io.load_config`.
    """
    from tracerl_jax.config_io import load_config, to_dict

    config = load_config(schema, args.config, args.overrides)
    if args.print_config:
        print(json.dumps(to_dict(config), indent=2))
        raise SystemExit(0)
    return config


def add_reward_settings(parser: CommandParser) -> None:
    """Add `--config.reward.KEY=VALUE`, listed below the help, and `--config`, from which more of them may come."""
    from tracerl_jax.config import GradingConfig
    from tracerl_jax.config_io import FLAG, describe, keys_of

    parser.add_argument(
        "--config",
        metavar="FILE[:ARG]",
        help=f"config of a run: its reward functions and `reward` settings; {FLAG}reward.KEY=VALUE sets single ones",
    )
    parser.config_flags += [FLAG + key for key in keys_of(GradingConfig)]
    keys = f"settings, their defaults and types ({FLAG}KEY=VALUE):\n{describe(GradingConfig)}"
    parser.epilog = f"{parser.epilog}\n\n{keys}" if parser.epilog else keys


def apply_reward_settings(args: argparse.Namespace) -> None:
    """Makes what the flags of `add_reward_settings` say the settings of this process. Raises `ConfigError`."""
    from tracerl_jax.config import GradingConfig, RunConfig
    from tracerl_jax.config_io import load_config
    from tracerl_jax.rewards import settings

    settings.configure(load_config(RunConfig if args.config else GradingConfig, args.config, args.overrides).reward)


def train_and_describe(command: str, args: argparse.Namespace, config: Any) -> None:
    """Train and print where the results are; when interrupted, print the command line that goes on, and raise."""
    from tracerl_jax.parallel.distributed import is_lead
    from tracerl_jax.training.pipeline import describe_summary, train

    try:
        summary = train(config)
    except KeyboardInterrupt:
        if is_lead():
            print(f"\nto go on: {command_again(command, args)}", file=sys.stderr)
        raise
    if is_lead():
        print(describe_summary(summary))


def command_again(command: str, args: argparse.Namespace, **changes: Any) -> str:
    """The command line that was given, as a shell takes it; `changes` are other values of config keys, the dots
    spelled as two underscores: rl__steps=48."""
    flags = {f"--config.{key.replace('__', '.')}": value for key, value in changes.items()}
    kept = [override for override in args.overrides if override.partition("=")[0] not in flags]
    changed = [f"{flag}={value}" for flag, value in flags.items()]
    return shlex.join(["tracerl", command, "--config", args.config, *kept, *changed])


def add_engine_flags(flag: Callable[..., Any], of_config: bool = False) -> None:
    """What all commands that decode let choose of the engine; `flag` is `add_argument` of a parser or a group.
    `of_config`: a config says what a flag that is not given means, which is then None."""
    from tracerl_jax.rollout.options import CACHES, COMMITS

    def own(name: str, default: Any, help: str, **how: Any) -> None:
        shown = "the config's" if of_config else "%(default)s"
        flag(name, default=None if of_config else default, help=f"{help} (default: {shown})", **how)

    own("--slots", 64, "sequences decoded together", type=int)
    own("--commit", "auto", "of finished blocks", choices=COMMITS)
    own("--drafts", 1, "steps guessed and verified by a forward", type=int)
    own("--cache", "none", "of full-attention models; none is exact", choices=CACHES)
    flag("--horizon", type=int, help="tokens that a step with a cache computes, from its block on (default: all)")
    flag("--refresh", type=int, help="steps until a block's cache is made anew (default: at its start only)")
    own("--dtype", "float32", "of weights and compute", choices=("float32", "bfloat16"))


def engine_of_flags(args: argparse.Namespace, **more: Any) -> Any:
    """The EngineConfig that the flags of `add_engine_flags` ask for."""
    from tracerl_jax.rollout.options import EngineConfig

    names = ("slots", "commit", "drafts", "cache", "horizon", "refresh")
    return EngineConfig(**{name: getattr(args, name) for name in names} | more)


def add_decoding_flags(flag: Callable[..., Any]) -> None:
    """Fields of SamplingOptions, whose defaults the caller sets."""
    from tracerl_jax.diffusion.reveal import SCORES, STRATEGIES

    flag("--strategy", help=f"{', '.join(STRATEGIES)} (default: %(default)s)")
    flag("--score", help=f"to rank and compare by: {', '.join(SCORES)} (default: %(default)s)")
    flag("--threshold", type=float, help="dynamic: reveal what scores higher (default: %(default)s)")
    flag("--entropy_bound", type=float, help="entropy_bounded: nats per step (default: %(default)s)")
    flag("--denoising_steps", type=int, help="per block (default: the block size)")
    flag("--block_size", type=int, help="default: the model's")
    flag("--max_tokens", type=int, help="completion limit (default: %(default)s)")
    flag("--temperature", type=float, help="0 is greedy (default: %(default)s)")
    flag("--top_k", type=int, help="0 is off (default: %(default)s)")
    flag("--top_p", type=float, help="1 is off (default: %(default)s)")


def describe_memory(model: Any, engine_bytes: Mapping[str, int]) -> str:
    """What decoding takes: the weights and `Engine.memory_bytes`."""
    from tracerl_jax.rollout.weights import weight_bytes
    from tracerl_jax.units import format_bytes

    sizes = {"weights": weight_bytes(model), **engine_bytes}
    together = f" on {model.mesh.size} devices together" if model.mesh.size > 1 else ""
    return f"memory{together}: " + ", ".join(f"{name} {format_bytes(size)}" for name, size in sizes.items())
