"""The model `tracerl` of the lm-evaluation-harness (pip install 'tracerl_jax[eval]').

    python -m tracerl_jax.evals.lm_eval run --model tracerl --model_args pretrained=DIR --tasks gsm8k

Importing this module registers the model; the line above does, and then is the harness's own command.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from tracerl_jax.diffusion.grid import round_up
from tracerl_jax.errors import ConfigError
from tracerl_jax.evals.likelihood import ESTIMATES, log_likelihoods
from tracerl_jax.interop.tokenizer import decode, render_chat
from tracerl_jax.rollout.folder import load_weights, open_engine
from tracerl_jax.rollout.options import EngineConfig, Request, SamplingOptions
from tracerl_jax.rollout.stream import completed, step, submitted

FORWARDS_PER_CHUNK = 32  # until stop strings are looked for
PAIRS_PER_CALL = 64  # likelihoods computed together


@register_model("tracerl")
class TracerlLM(TemplateLM):
    """A Hugging Face folder decoded by the engine.

    Args:
        pretrained: the folder, with a tokenizer.
        strategy, threshold, denoising_steps, block_size: how to decode, see `SamplingOptions`.
        max_gen_toks: completion limit where a task does not say.
        seed: of sampling and of Monte Carlo likelihoods.
        likelihood, mc_samples: the estimate and its draws per block, see `likelihood.py`.
        slots, commit, drafts, dtype: of the engine.
        batch_size, max_batch_size, device: what the harness passes to every model; not used.
    """

    def __init__(
        self,
        pretrained: str,
        strategy: str = "static",
        threshold: float = 0.9,
        denoising_steps: int | None = None,
        block_size: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
        likelihood: str = "monte_carlo",
        mc_samples: int = 128,
        slots: int = 64,
        commit: str = "auto",
        drafts: int = 1,
        dtype: str = "float32",
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        if likelihood not in ESTIMATES:
            raise ConfigError(f"likelihood is {likelihood!r}; use one of {', '.join(ESTIMATES)}")
        config = EngineConfig(slots, commit=commit, drafts=drafts, forwards_per_chunk=FORWARDS_PER_CHUNK)
        self._engine, self.tokenizer = open_engine(pretrained, config, dtype)
        if self.tokenizer is None:
            raise ConfigError(f"{pretrained}: has no tokenizer, which the harness needs; put its files into the folder")
        self._decoding = {
            "strategy": strategy, "threshold": threshold, "denoising_steps": denoising_steps, "block_size": block_size,
            "seed": seed,
        }  # fmt: skip
        SamplingOptions(**self._decoding)  # for its ConfigError
        self._block_size = block_size or self._engine.model.config.block_size
        self._likelihood = {"estimate": likelihood, "draws": mc_samples, "seed": seed, "block_size": block_size}
        self._pretrained, self._max_gen_toks = pretrained, max_gen_toks
        load_weights(self._engine, pretrained)

    @property
    def tokenizer_name(self) -> str:
        return str(self._pretrained)

    @property
    def eot_token_id(self) -> int:
        return self._engine.model.config.eos_token_id

    @property
    def max_length(self) -> int:
        return self._engine.model.config.max_positions

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Ids of the text as it is, as everywhere in this package: nothing is put before it."""
        return self.tokenizer(string, add_special_tokens=False)["input_ids"]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return render_chat(self.tokenizer, chat_history, add_generation_prompt=add_generation_prompt)

    # Completions

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Texts up to the first stop string. Prompts that are too long lose their beginning, as with other models."""
        arguments = [request.args for request in requests]
        wanted, stops, seen = [], [], Counter()
        for context, gen_kwargs in arguments:
            options, until = self._options(gen_kwargs)
            ids = self._cut(self.tok_encode(context) or [self.prefix_token_id], options.max_tokens)
            wanted.append(Request(ids, options, sample_index=seen[tuple(ids), options]))
            seen[tuple(ids), options] += 1  # repeats of one request are different samples
            stops.append(until)
        texts = self._decode_until(wanted, stops, disable_tqdm)
        for (context, gen_kwargs), text in zip(arguments, texts, strict=True):
            self.cache_hook.add_partial("generate_until", (context, gen_kwargs), text)
        return texts

    def _options(self, gen_kwargs: dict) -> tuple[SamplingOptions, list[str]]:
        """(decoding options, stop strings) of a task's `generation_kwargs`. Raises ConfigError for one not known."""
        given = dict(normalize_gen_kwargs(gen_kwargs, self._max_gen_toks))
        until, max_tokens, sampled = given.pop("until"), given.pop("max_gen_toks"), given.pop("do_sample")
        own = {name: given.pop(name) for name in ("top_k", "top_p") if name in given}
        temperature = float(given.pop("temperature", 1.0)) if sampled else 0.0
        given.pop("temperature", None)
        if given:
            raise ConfigError(f"generation_kwargs of the task that this model does not know: {', '.join(given)}")
        options = SamplingOptions(**self._decoding, max_tokens=max_tokens, temperature=temperature, **own)
        return options, [stop for stop in until if stop]

    def _decode_until(self, requests: Sequence[Request], stops: Sequence[list[str]], disable_tqdm: bool) -> list[str]:
        texts = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="completions") as bar:
            with submitted(self._engine, requests) as running:
                while running:
                    for index, trace in step(self._engine, running).items():
                        texts[index], _ = _cut_at(decode(self.tokenizer, trace.ids), stops[index])
                        bar.update()
                    for number, blocks in self._engine.blocks().items():
                        index = running[number]
                        texts[index], stopped = _cut_at(decode(self.tokenizer, blocks.ids), stops[index])
                        if stopped:
                            self._engine.cancel(number)
                            del running[number]
                            bar.update()
        return texts

    def _cut(self, ids: list[int], max_tokens: int) -> list[int]:
        """The end of a prompt that leaves room for the completion."""
        room = self.max_length - round_up(max_tokens, self._block_size) - self._block_size
        if room < 1:
            raise ConfigError(
                f"a completion of {max_tokens} tokens leaves no room for a prompt: the model ends at {self.max_length}"
            )
        return ids[-room:]

    # Likelihoods

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        pairs = [(self._cut(context, len(ids)), ids) for _, context, ids in requests]
        results = list(zip(self._log_likelihoods(pairs, disable_tqdm), self._are_greedy(pairs), strict=True))
        for (texts, _, _), result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, behind the end-of-text token; long ones in windows that do not overlap in what
        they predict."""
        pairs, owners = [], []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length - 1, 1)
            found = [make_disjoint_window(window) for window in windows]
            pairs += found
            owners += [i] * len(found)
        totals = np.bincount(owners, weights=self._log_likelihoods(pairs, disable_tqdm), minlength=len(requests))
        for request, total in zip(requests, totals.tolist(), strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals.tolist()

    def _log_likelihoods(self, pairs: Sequence[tuple[list[int], list[int]]], disable_tqdm: bool) -> list[float]:
        # Of similar lengths together: a call's rows are as long as its longest pair needs.
        order = sorted(range(len(pairs)), key=lambda i: sum(map(len, pairs[i])))
        values = np.zeros(len(pairs))
        for at in tqdm(range(0, len(pairs), PAIRS_PER_CALL), disable=disable_tqdm, desc="likelihoods"):
            part = order[at : at + PAIRS_PER_CALL]
            values[part] = log_likelihoods(
                self._engine.model, self._engine.params, [pairs[i] for i in part], **self._likelihood
            )
        return values.tolist()

    def _are_greedy(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[bool]:
        """Whether greedy decoding of each context begins with its completion; once per context."""
        longest: dict[tuple[int, ...], int] = {}
        for context, ids in pairs:
            longest[tuple(context)] = max(longest.get(tuple(context), 1), len(ids))
        contexts = list(longest)
        requests = [
            Request(context, SamplingOptions(**self._decoding, max_tokens=longest[context], temperature=0.0))
            for context in contexts
        ]
        found = {}
        for finished in completed(self._engine, requests):
            found |= {contexts[index]: trace.ids.tolist() for index, trace in finished.items()}
        return [found[tuple(context)][: len(ids)] == list(ids) for context, ids in pairs]


def _cut_at(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """(text before the first stop string, whether there is one)"""
    found = [at for at in map(text.find, stops) if at >= 0]
    return (text[: min(found)], True) if found else (text, False)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
