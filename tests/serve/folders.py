"""A small random model with a byte-level tokenizer, as a model folder."""

from pathlib import Path

import jax
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tracerl_jax.interop.hf_save import save_hf
from tracerl_jax.models.config import ModelConfig
from tracerl_jax.models.decoder import Model

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|MASK|>")  # ids 256..259, behind the bytes
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('system first') }}"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant"
)


def build_byte_tokenizer() -> PreTrainedTokenizerFast:
    """One id per byte, so that a character outside ASCII takes several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>", mask_token="<|MASK|>",
        chat_template=TEMPLATE, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def make_folder(folder: Path) -> Path:
    config = ModelConfig(
        vocab_size=260, width=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, mlp_width=64, block_size=4,
        max_positions=2048, mask_token_id=259, eos_token_id=256, pad_token_id=256, stop_token_ids=(256, 258),
        initializer_range=0.2,
    )  # fmt: skip
    model = Model(config)
    save_hf(folder, model, model.init(jax.random.key(0)))
    build_byte_tokenizer().save_pretrained(folder)
    return folder
