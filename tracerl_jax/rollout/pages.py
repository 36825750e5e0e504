"""Which page of the cache belongs to whom. Host only: numbers, no arrays of keys.

    prompt of 10 tokens, C = 4, B = 2     | 0 1 2 3 | 4 5 6 7 | 8 9 . . |
                                            shared    shared    own: the response goes on in it

Whole pages of a prompt are found by the digest of all tokens up to their end, so requests with a common prefix share
them. The page in which a prompt ends is found likewise; it is copied, since every sample writes its response behind it,
or taken over where nobody holds it any more. Pages that nobody holds keep their content until room is needed, the
longest unused first.

A request gets all the pages it can ever need when it is admitted, or it waits: nothing that runs can run out of room.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class PromptPages(NamedTuple):
    """By what the pages of a prompt are known."""

    whole: list[bytes]
    tail: bytes | None  # of the page in which its complete blocks end; None: at a page's end
    encoded: int  # tokens of the complete blocks


def prompt_pages(prompt: np.ndarray, encoded: int, page_size: int) -> PromptPages:
    digests, digest = [], b""
    for at in range(0, encoded, page_size):
        tokens = np.ascontiguousarray(prompt[at : min(at + page_size, encoded)], np.int32)
        digest = hashlib.blake2b(digest + tokens.tobytes(), digest_size=16).digest()
        digests.append(digest)
    whole, tail = (digests[:-1], digests[-1]) if encoded % page_size else (digests, None)
    return PromptPages(whole, tail, encoded)


@dataclass
class Allocation:
    """Pages of one request."""

    pages: list[int]  # in order; the first ones may be shared
    start: int  # tokens of the prompt that the cache already holds, or will when earlier requests are prefilled
    shared: list[int]  # the whole pages of these tokens
    source: int | None  # page to copy to where the prompt ends; it is held until `PagePool.unpin`


class PagePool:
    """The pages 1 .. pages - 1 of one shard; page 0 belongs to nobody.

    keep: whether pages keep their content after the last request that used them.
    """

    def __init__(self, pages: int, page_size: int, keep: bool = True):
        self.page_size, self.keep, self.capacity = page_size, keep, pages - 1
        self._free = list(range(pages - 1, 0, -1))
        self._holders: Counter[int] = Counter()
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._idle: dict[int, None] = {}  # pages with content that nobody holds, the longest unused first

    @property
    def available(self) -> int:
        """Pages that a new request may get."""
        return len(self._free) + len(self._idle)

    @property
    def held(self) -> int:
        return self.capacity - self.available

    def known_tokens(self, prompt: PromptPages) -> int:
        """Tokens of the prompt that need not be encoded."""
        known = self._known_prefix(prompt.whole)
        if len(known) == len(prompt.whole) and prompt.tail in self._page_of:
            return prompt.encoded
        return len(known) * self.page_size

    def allocate(self, prompt: PromptPages, end: int) -> Allocation | None:
        """Pages for tokens [0, end), the prompt's first; None: no room.

        The new pages of the prompt count as known from now on: they must be filled before anything else reads them.
        """
        shared = self._known_prefix(prompt.whole)
        tail = self._page_of.get(prompt.tail) if len(shared) == len(prompt.whole) else None
        known = [*shared, tail] if tail in self._idle else shared
        source = tail if known is shared else None
        pinned = known if source is None else [*shared, source]
        wanted = -(-end // self.page_size) - len(known)
        if wanted > self.available - sum(page in self._idle for page in pinned):
            return None
        for page in pinned:
            self._hold(page)
        own = [self._take() for _ in range(wanted)]
        for digest, page in zip(prompt.whole[len(shared) :], own, strict=False):
            self._remember(digest, page)
        if prompt.tail is not None and tail is None:
            self._remember(prompt.tail, own[len(prompt.whole) - len(shared)])
        start = prompt.encoded if tail is not None else len(shared) * self.page_size
        return Allocation([*known, *own], start, shared, source)

    def unpin(self, allocation: Allocation) -> None:
        """The copy from `allocation.source` is on its way."""
        if allocation.source is not None:
            self._drop(allocation.source)

    def release(self, allocation: Allocation) -> None:
        """The request is done or given up."""
        for page in reversed(allocation.pages):  # a prefix is needed longer than what follows it
            self._drop(page)

    def forget(self) -> None:
        """Nothing in the cache is of use any more, say because the weights changed. Nobody may hold a page."""
        for page in list(self._idle):
            self._release_idle(page)

    def _known_prefix(self, digests: list[bytes]) -> list[int]:
        known = []
        for digest in digests:
            if digest not in self._page_of:
                break
            known.append(self._page_of[digest])
        return known

    def _hold(self, page: int) -> None:
        self._idle.pop(page, None)
        self._holders[page] += 1

    def _drop(self, page: int) -> None:
        self._holders[page] -= 1
        if self._holders[page]:
            return
        del self._holders[page]
        self._idle[page] = None
        if not self.keep or page not in self._digest_of:
            self._release_idle(page)

    def _release_idle(self, page: int) -> None:
        del self._idle[page]
        if page in self._digest_of:
            del self._page_of[self._digest_of.pop(page)]
        self._free.append(page)

    def _take(self) -> int:
        if not self._free:
            self._release_idle(next(iter(self._idle)))
        page = self._free.pop()
        self._holders[page] += 1
        return page

    def _remember(self, digest: bytes, page: int) -> None:
        self._page_of[digest], self._digest_of[page] = page, digest
