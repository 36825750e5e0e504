"""Text that grows block by block: characters of several tokens, stop strings over block boundaries."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_utils import build_byte_tokenizer

from tracerl_jax.interop.tokenizer import decode
from tracerl_jax.serve.completion import Completion

TOKENIZER = build_byte_tokenizer()
TEXT = "naïve 中文 👍🏽 and <stop> more"


def complete(ids, cuts, stops=(), with_tokens=False):
    """The pieces of `ids` pushed in parts that end at `cuts`."""
    completion, pieces = Completion(TOKENIZER, [1, 2, 3], stops, with_tokens), []
    edges = [0, *sorted(cuts), len(ids)]
    for start, end in pairwise(edges):
        part = np.array(ids[start:end], np.int32)
        reason = "length" if end == len(ids) else None
        pieces.append(completion.push(part, part + 1, -part.astype(np.float32), reason))
        if pieces[-1].finish_reason:
            break
    return pieces


def joined(pieces):
    return "".join(piece.text for piece in pieces)


def ids_of(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


@given(ids=st.lists(st.integers(0, 259), min_size=1, max_size=40), data=st.data())
def test_pieces_join_to_the_decoded_text_whatever_the_ids_and_the_cuts(ids, data):
    cuts = data.draw(st.lists(st.integers(0, len(ids) - 1), max_size=6))
    pieces = complete(ids, cuts, with_tokens=True)
    assert joined(pieces) == decode(TOKENIZER, ids)
    assert [i for piece in pieces for i in piece.ids] == ids
    assert [s for piece in pieces for s in piece.step_map] == [i + 1 for i in ids]
    assert sum(len(piece.tokens) for piece in pieces) == len(ids)
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)


@pytest.mark.parametrize("size", [1, 3, 4, 8])
@pytest.mark.parametrize("stops", [("<stop>",), ("文 👍",), ("xyz", "<st", "d <stop>")])
def test_a_stop_string_ends_the_text_before_it_however_it_is_cut(size, stops):
    ids = ids_of(TEXT)
    pieces = complete(ids, range(size, len(ids), size), stops)
    ends = {TEXT.index(stop) + len(stop): stop for stop in stops if stop in TEXT}
    assert joined(pieces) == TEXT[: TEXT.index(ends[min(ends)])]  # the one that is complete first
    assert pieces[-1].finish_reason == "stop"
    used = [i for piece in pieces for i in piece.ids]
    assert used == ids[: len(used)]
    before, upto = decode(TOKENIZER, used[:-1]), decode(TOKENIZER, used)
    assert any(stop in upto for stop in stops) and not any(stop in before for stop in stops)


def test_text_that_may_begin_a_stop_string_waits_and_is_given_when_it_does_not():
    first, second, third = complete(ids_of("abc<sto! end <st"), [7, 9], ("<stop>",))
    assert (first.text, second.text, third.text) == ("abc", "<sto! ", "end <st")
    assert third.finish_reason == "length"


def test_tokens_of_a_character_belong_to_its_last_one():
    pieces = complete([*ids_of("a👍"), 258], [3], with_tokens=True)
    assert [piece.tokens for piece in pieces] == [["a", "", ""], ["", "👍", "<|im_end|>"]]
    assert [piece.position for piece in pieces] == [3, 6]
