"""The console script `tracerl`: one sub-command per module of this folder, imported when it is called.

A sub-command's module defines

    HELP: str                          what it does, in a paragraph or two
    EPILOG: str                        examples (optional)
    add_arguments(parser) -> None      flags; `common.add_config_arguments` for those that take a config
    run(args) -> int                   the work; the exit status
"""

import difflib
import errno
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import tracerl_jax
from tracerl_jax.errors import UserError
from tracerl_jax.launch.common import CommandParser

COMMANDS = {
    "demo": "train a tiny model from nothing, on this CPU, in minutes",
    "rl": "supervised warm-up and TraceRL: a model folder in, a better one out",
    "sft": "supervised fine-tuning with block-diffusion masks",
    "generate": "complete prompts and record their decoding traces",
    "serve": "a model behind OpenAI's HTTP API, streaming block by block",
    "score": "log-probs of recorded traces under a model",
    "eval": "accuracy, with error bars, and speed of a model on tasks",
    "verify": "grade a file of answers with the reward of a task",
    "convert": "Hugging Face folder to Orbax checkpoint and back",
    "plan": "will a config fit a TPU slice or GPUs, and how fast: no accelerator needed",
    "report": "one HTML page with the curves and samples of a run",
    "launch": "a job of several processes, restarted when it fails",
    "doctor": "versions, devices, known-bad combinations and their fixes",
}

USAGE = f"""usage: tracerl COMMAND [FLAGS]

TraceRL for diffusion language models in JAX.

commands:
{"".join(f"  {name:<10}{summary}" + chr(10) for name, summary in COMMANDS.items())}
tracerl COMMAND --help explains a command.
tracerl --version prints the version.
TRACERL_DEBUG=1 shows the traceback of an error."""

JOINING = ("rl", "sft", "eval")  # commands that run as one job of several processes

STATUS_USER_ERROR = 2
STATUS_INTERRUPTED = 128 + 2  # what a shell reports for SIGINT
STATUS_BROKEN_PIPE = 128 + 13  # SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status. What a user can cause is one line on stderr, not a traceback."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in JOINING:
        return _main(argv)[0]
    from tracerl_jax.parallel.job import in_job

    return in_job(lambda: _main(argv))


def _main(argv: list[str]) -> tuple[int, BaseException | None]:
    """The exit status, and the error it is for."""
    try:
        status = _dispatch(argv)
        sys.stdout.flush()
        return status, None
    except UserError as error:
        return _fail(str(error), error.status), error
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # the reader, such as `head`, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit raises again
            return STATUS_BROKEN_PIPE, error
        if error.errno != errno.ENOSPC:
            raise
        message = f"disk full while writing {error.filename or 'a file'}: free some space and run the command again"
        return _fail(message), error
    except KeyboardInterrupt as error:
        print("\ntracerl: interrupted", file=sys.stderr)
        return STATUS_INTERRUPTED, error


def _dispatch(argv: list[str]) -> int:
    command, *rest = argv or ["--help"]
    if command in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if command == "--version":
        print(f"tracerl {tracerl_jax.__version__}")
        return 0
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        suggestion = f"; did you mean {close[0]}?" if close else f". Commands: {', '.join(COMMANDS)}"
        raise UserError(f"unknown command {command}{suggestion}")
    module = importlib.import_module(f"tracerl_jax.launch.{command}")
    epilog = getattr(module, "EPILOG", None)
    stay_on_cpu()
    parser = CommandParser(prog=f"tracerl {command}", description=module.HELP, epilog=epilog)
    module.add_arguments(parser)
    args = parser.parse(rest)
    set_up_logging()
    if command in JOINING and not getattr(args, "print_config", False):  # which needs nobody else
        from tracerl_jax.parallel.job import join

        join()
    return module.run(args)


ACCELERATOR_NODES = ("nvidia*", "accel*", "vfio/*", "kfd", "dxg", "nvhost*", "nvmap")


def stay_on_cpu(devices: Path = Path("/dev")) -> None:
    """Sets JAX_PLATFORMS=cpu where the TPU or CUDA compiler is installed (extra `plan`) but there is no such device.
    JAX would try to start them first, with a page of complaints."""
    has_compiler = any(find_spec(name) for name in ("libtpu", "jax_plugins"))
    if has_compiler and not any(path for name in ACCELERATOR_NODES for path in devices.glob(name)):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def set_up_logging() -> None:
    """Our messages from INFO on, everybody else's from WARNING on, one short line each on stderr."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logging.getLogger("tracerl_jax").setLevel(logging.INFO)
    if not os.environ.get("TRACERL_DEBUG"):
        for name in ("absl", "asyncio"):  # Orbax logs with a traceback what it also raises, a full disk say
            logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found": we never use it


def _fail(message: str, status: int = STATUS_USER_ERROR) -> int:
    """Report the error being handled without its traceback, unless TRACERL_DEBUG asks for it."""
    if os.environ.get("TRACERL_DEBUG"):
        logging.exception("traceback of the error below")
    print(f"tracerl: error: {message}", file=sys.stderr)
    return status
