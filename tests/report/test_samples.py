import numpy as np
import pytest
from synthetic import BLOCK, CharTokenizer, random_trace

from tracerl_jax.diffusion.trace import Trace
from tracerl_jax.report.samples import decode_pieces, sample_row


class ByteTokenizer:
    """One id per byte; incomplete characters decode to the replacement character, as real byte-level tokenizers do."""

    def decode(self, ids, **kwargs) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("text", ["", "plain", "a é € 𝄞 b", "𝄞𝄞"])
def test_pieces_join_to_the_text_and_a_character_goes_to_its_last_token(text):
    ids = list(text.encode())
    pieces = decode_pieces(ByteTokenizer(), ids)
    assert len(pieces) == len(ids) and "".join(pieces) == text
    if text == "𝄞𝄞":
        assert pieces == ["", "", "", "𝄞"] * 2


def test_invalid_bytes_are_shown_and_do_not_swallow_what_follows():
    pieces = decode_pieces(ByteTokenizer(), [0xFF, 0xFF, ord("a"), ord("b"), 0xF0])
    assert "".join(pieces) == "\N{REPLACEMENT CHARACTER}" * 2 + "ab" + "\N{REPLACEMENT CHARACTER}"


def test_decoding_calls_stay_short():
    lengths = []

    class Counting(ByteTokenizer):
        def decode(self, ids, **kwargs):
            lengths.append(len(ids))
            return super().decode(ids)

    decode_pieces(Counting(), [0xFF] * 200 + list(b"text" * 50))
    assert max(lengths) <= 8


def test_row_is_a_trace_row_with_pieces_on_the_block_grid():
    # 6 + 7 tokens in blocks of 4: the prompt has 2 tokens in the first generated block, 3 are left of the last.
    trace = random_trace(np.random.default_rng(0), "prompt", "answer!")
    row = sample_row(trace, step=3, phase="rl", prompt="prompt", text="answer!", reward=None, tokenizer=CharTokenizer())
    assert row["prompt_tail"] == ["p", "t"] and row["tokens"] == list("answer!") and row["tail_tokens"] == ["~"] * 3
    assert (row["step"], row["phase"], row["reward"], row["rewards"], row["block_size"]) == (3, "rl", None, {}, BLOCK)
    again = Trace.from_row(row)
    np.testing.assert_array_equal(again.step_map, trace.step_map)
    np.testing.assert_array_equal(again.logprobs, trace.logprobs)


def test_row_without_tokenizer_shows_ids():
    trace = random_trace(np.random.default_rng(0), "prompt", "hi")
    row = sample_row(trace, step=1, phase="rl", prompt="", text="", reward=1.0)
    assert row["tokens"] == ["104 ", "105 "]
