"""tracerl serve: an OpenAI-compatible server for a model folder."""

import argparse
import dataclasses
import logging
import os
from pathlib import Path

logger = logging.getLogger("tracerl_jax.launch.serve")

HELP = """Serve a model folder over HTTP with OpenAI's API: /v1/chat/completions, /v1/completions, /v1/models, and
/health, /metrics (Prometheus) and a page at / to try prompts. Completions stream block by block.

Requests may set what is below under "decoding", and OpenAI's n, stop, stream, logprobs. SIGTERM or Ctrl-C finishes the
requests that run and exits with status 0."""

EPILOG = """examples:
  tracerl serve --model SDAR-4B-Chat --dtype bfloat16
  TRACERL_API_KEY=secret tracerl serve --model SDAR-4B-Chat --host 0.0.0.0
  curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{"messages": [{"role": "user", "content": "What is 12*34?"}], "stream": true}'"""

KEY_VARIABLE = "TRACERL_API_KEY"
BLOCK_SIZES = (4, 8, 16, 32)
DEFAULT_LENGTH = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from tracerl_jax.launch.common import add_decoding_flags, add_engine_flags
    from tracerl_jax.rollout.options import KV_DTYPES, SamplingOptions
    from tracerl_jax.serve.options import ServeConfig

    flag = parser.add_argument
    flag("--model", required=True, metavar="DIR", help="Hugging Face folder with a tokenizer")
    flag("--model_name", metavar="NAME", help="what clients call it (default: the folder's name)")
    flag("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine only)")
    flag("--port", type=int, default=8000, help="0 is any that is free (default: %(default)s)")
    flag("--api_key", metavar="KEY", help=f"clients must send it (default: ${KEY_VARIABLE}, which ps does not show)")

    flag = parser.add_argument_group("engine").add_argument
    add_engine_flags(flag)
    flag("--max_length", type=int, help=f"tokens of prompt and completion (default: {DEFAULT_LENGTH}, or the model's)")
    flag("--pages", type=int, help="of the cache, of --page_size tokens (default: enough for all slots)")
    flag("--page_size", type=int, default=64, help="tokens of a cache page (default: %(default)s)")
    flag("--forwards_per_chunk", type=int, default=8,
         help="until new blocks are sent and slots refilled: fewer is prompter (default: %(default)s)")  # fmt: skip
    flag("--kv_dtype", choices=KV_DTYPES, default="compute", help="of the cache (default: %(default)s)")
    flag("--block_sizes", type=int, nargs="+", metavar="B",
         help=f"that requests may ask for (default: the model's and {BLOCK_SIZES})")  # fmt: skip
    flag("--no_warm_up", action="store_true", help="compile when the first requests come")

    flag = parser.add_argument_group("limits").add_argument
    flag("--max_queue", type=int, help="samples waiting for a slot; beyond, 429 (default: %(default)s)")
    flag("--max_prompt_tokens", type=int, help="default: what --max_length leaves")
    flag("--max_completion_tokens", type=int, help="limit on max_tokens (default: what --max_length leaves)")
    flag("--max_samples", type=int, help="prompts times n of a request (default: %(default)s)")
    flag("--max_body_bytes", type=int, help="default: %(default)s")
    flag("--body_seconds", type=float, help="to send the body of a request (default: %(default)s)")
    flag("--request_seconds", type=float, help="of the whole request (default: %(default)s)")
    flag("--drain_seconds", type=float, help="to finish requests after SIGTERM (default: %(default)s)")

    add_decoding_flags(parser.add_argument_group("decoding, where a request does not say").add_argument)
    options = dataclasses.asdict(SamplingOptions())
    limits = {field.name: field.default for field in dataclasses.fields(ServeConfig)}
    parser.set_defaults(**{
        name: value for name, value in (limits | options).items()
        if name not in ("model_name", "block_sizes", "max_length", "defaults", "whole_blocks", "api_key")
    })  # fmt: skip


def run(args: argparse.Namespace) -> int:
    from tracerl_jax.errors import ConfigError
    from tracerl_jax.interop.hf_config import read_model_config
    from tracerl_jax.interop.tokenizer import load_tokenizer, valid_vocab
    from tracerl_jax.launch.common import describe_memory, engine_of_flags
    from tracerl_jax.models import Model
    from tracerl_jax.parallel.mesh import make_mesh
    from tracerl_jax.rollout.engine import Engine
    from tracerl_jax.rollout.folder import load_weights

    try:
        from tracerl_jax.serve.app import Server
        from tracerl_jax.serve.run import bind, serve
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed; pip install 'tracerl_jax[serve]'") from error

    tokenizer = load_tokenizer(args.model)
    if tokenizer is None:
        raise ConfigError(f"{args.model}: has no tokenizer, which serving needs; put its files into the folder")
    model = Model(read_model_config(args.model, dtype=args.dtype, param_dtype=args.dtype), mesh=make_mesh())
    config = _config(args, model.config)  # names a bad flag, as what follows does, before the weights are read
    engine = Engine(model, None, engine_of_flags(
        args, max_length=config.max_length, forwards_per_chunk=args.forwards_per_chunk, page_size=args.page_size,
        pages=args.pages, kv_dtype=args.kv_dtype, valid_vocab=valid_vocab(tokenizer, model.config.vocab_size),
    ))  # fmt: skip
    bound = bind(args.host, args.port)
    logger.info(
        "%s: %s, for %d slots of %d tokens", config.model_name, describe_memory(model, engine.memory_bytes()),
        config.slots, config.max_length,
    )  # fmt: skip
    load_weights(engine, args.model)
    if not args.no_warm_up:
        _warm_up(engine, config)

    def ready() -> None:
        host, port = bound.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        if config.api_key is None and not (host.startswith("127.") or host == "::1"):
            logger.warning(
                "WARNING: %s is open to other machines and no API key is set: anybody can use this server. "
                "Set --api_key or %s, or leave --host at 127.0.0.1", shown, KEY_VARIABLE,
            )  # fmt: skip
        print(f"serving {config.model_name} at http://{shown}:{port} (API at /v1)", flush=True)

    return serve(lambda: Server(engine, tokenizer, config), bound, ready)


def _config(args: argparse.Namespace, model):
    """The ServeConfig that the flags ask for, for a model of this config."""
    from tracerl_jax.errors import ConfigError
    from tracerl_jax.rollout.options import SamplingOptions
    from tracerl_jax.serve.options import ServeConfig

    def given(schema: type) -> dict:
        names = {field.name for field in dataclasses.fields(schema)} & set(vars(args))
        return {name: getattr(args, name) for name in names}

    defaults = SamplingOptions(**given(SamplingOptions))
    block_size = defaults.block_size or model.block_size
    sizes = tuple(sorted({model.block_size, block_size, *(args.block_sizes or BLOCK_SIZES)}))
    if sizes[0] < 1:
        raise ConfigError(f"--block_sizes holds {sizes[0]}; they must be at least 1")
    max_length = args.max_length or min(DEFAULT_LENGTH, model.max_positions)
    if max_length > model.max_positions:
        raise ConfigError(f"--max_length is {max_length} but the model ends at {model.max_positions}; lower it")
    settings = given(ServeConfig) | {
        "model_name": args.model_name or Path(args.model).resolve().name, "block_sizes": sizes,
        "max_length": max_length, "defaults": defaults,
        "whole_blocks": model.block_size if model.attention_mode == "full" else None,
        "api_key": args.api_key or os.environ.get(KEY_VARIABLE) or None,
    }  # fmt: skip
    return ServeConfig(**settings)


def _warm_up(engine, config) -> None:
    """Compile what the first requests need: greedy, sampled, and with top-p."""
    import time

    from tracerl_jax.rollout.warm_up import warm_up

    started = time.monotonic()
    kinds = ({"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9})
    warm_up(engine, [dataclasses.replace(config.defaults, **changes) for changes in kinds])
    logger.info("compiled in %.1f s", time.monotonic() - started)
