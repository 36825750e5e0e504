"""The page pool against a plain model of it: nobody's pages are given away, and what is said to be known is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracerl_jax.rollout.pages import PagePool, prompt_pages

C, B = 4, 2


def contents(allocation, prompt, encoded, page_content):
    """What the cache holds of a new request once its copies are made and the rest is prefilled."""
    if allocation.source is not None:
        page_content[allocation.pages[encoded // C]] = page_content[allocation.source][: encoded % C]
    for at in range(allocation.start, encoded, C):
        page_content[allocation.pages[at // C]] = list(prompt[at : min(at + C, encoded)])


@settings(max_examples=150)
@given(data=st.data(), keep=st.booleans(), pages=st.integers(5, 14))
def test_pages_against_a_model(data, keep, pages):
    pool, running, page_content = PagePool(pages, C, keep), [], {}
    stems = [np.arange(20), np.arange(20) % 3]
    for _ in range(data.draw(st.integers(1, 25))):
        if running and data.draw(st.booleans()):
            pool.release(running.pop(data.draw(st.integers(0, len(running) - 1)))[0])
        else:
            prompt = data.draw(st.sampled_from(stems))[: data.draw(st.integers(1, 14))].copy()
            prompt[-1] += data.draw(st.integers(0, 1))
            encoded, end = len(prompt) // B * B, len(prompt) // B * B + B * data.draw(st.integers(1, 3))
            digests, available = prompt_pages(prompt, encoded, C), pool.available
            known = pool.known_tokens(digests)
            got = pool.allocate(digests, end)
            if got is None:
                needed = -(-end // C)  # beside it at most a page to copy is kept from others
                assert needed > pages - 1 or (running and needed + 1 > available)
                assert pool.available == available
                continue
            assert got.start == known and len(got.pages) == -(-end // C)
            contents(got, prompt, encoded, page_content)
            pool.unpin(got)
            running.append((got, prompt, encoded))
        held = {}
        for number, (allocation, prompt, encoded) in enumerate(running):
            for i, page in enumerate(allocation.pages):
                assert 0 < page < pages
                if page in held:  # shared: whole pages of the prompts of both
                    assert (i + 1) * C <= min(encoded, running[held[page]][2])
                held[page] = number
                part = list(prompt[i * C : min((i + 1) * C, encoded)])
                assert page_content.get(page, [])[: len(part)] == part
        assert pool.held == len(held)
    for allocation, *_ in running:
        pool.release(allocation)
    assert pool.held == 0 and pool.available == pages - 1


def test_pages_are_kept_for_later_requests_the_longest_unused_first():
    pool, prompts = PagePool(7, C), [prompt_pages(np.full(9, i), 8, C) for i in range(3)]
    for prompt in prompts[:2]:
        pool.release(pool.allocate(prompt, 12))
    assert [pool.known_tokens(prompt) for prompt in prompts] == [8, 8, 0]
    pool.release(pool.allocate(prompts[2], 12))  # two free pages, and the last of the first prompt
    assert [pool.known_tokens(prompt) for prompt in prompts] == [4, 8, 8]
    pool.forget()
    assert [pool.known_tokens(prompt) for prompt in prompts] == [0, 0, 0] and pool.available == 6


def test_without_keeping_only_running_requests_share():
    pool, prompt = PagePool(9, C, keep=False), prompt_pages(np.arange(10), 10, C)
    one = pool.allocate(prompt, 12)
    two = pool.allocate(prompt, 12)
    assert two.pages[:2] == one.pages[:2] and two.source == one.pages[2] and pool.held == 4
    pool.unpin(two)
    pool.release(one)
    assert pool.known_tokens(prompt) == 8
    pool.release(two)
    assert pool.known_tokens(prompt) == 0 and pool.available == 8


@pytest.mark.parametrize("encoded", [8, 10])
def test_a_request_for_which_there_is_no_room_takes_nothing(encoded):
    pool, prompt = PagePool(5, C), prompt_pages(np.arange(encoded), encoded, C)
    held = pool.allocate(prompt, encoded + 2)
    before = pool.available
    assert pool.allocate(prompt, encoded + 12) is None and pool.available == before
    pool.release(held)


def test_an_empty_pool_places_whatever_is_not_larger_than_itself():
    """Also a prompt whose last page it knows: the page is taken over, not copied."""
    pool, prompt = PagePool(4, C), prompt_pages(np.arange(10), 10, C)
    pool.release(pool.allocate(prompt, 12))
    again = pool.allocate(prompt, 12)
    assert again.start == 10 and again.source is None and len(again.pages) == 3
    pool.release(again)
    assert pool.allocate(prompt_pages(np.ones(3), 2, C), 12) is not None
