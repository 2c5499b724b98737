"""KV pages: who holds which, and which hold a known prefix.

Token ids and page numbers only; no tensors. A page is *held* while its count of holders is above
zero and *free* otherwise. A free page may still hold the KV of a known prefix; it is then found by
``match`` until ``allocate`` needs it: pages that hold no known prefix go first, then the oldest.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TokenArray = NDArray[np.int32]

ROOT = 0
"""Prefix node of the empty prefix."""


@dataclass(frozen=True)
class PrefixMatch:
    """Pages that hold the KV of the first ``len(pages) * page_size`` tokens, and their node."""

    pages: list[int]
    node: int


class PagePool:
    """Allocates pages and finds equal prefixes.

    Prefixes are matched by token content, not by hash: a page's key is the node of the page before
    it and its own tokens. Nodes are numbered once and never reused, so a page that was reused can
    not be mistaken for the parent it once was.

    Args:
        num_pages: pages in the pool.
        page_size: tokens per page.
        cache_prefixes: False turns ``match`` and ``register`` off.
    """

    def __init__(self, num_pages: int, page_size: int, cache_prefixes: bool = True) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages must be at least 1, got {num_pages}")
        self.num_pages = num_pages
        self.page_size = page_size
        self._cache_prefixes = cache_prefixes
        self._holders = [0] * num_pages
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_pages))
        self._page_of_key: dict[tuple[int, bytes], int] = {}
        self._key_of_page: dict[int, tuple[int, bytes]] = {}
        self._node_of_page: dict[int, int] = {}
        self._next_node = ROOT + 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    def match(self, token_ids: TokenArray, node: int = ROOT) -> PrefixMatch:
        """Hold the longest run of known pages after ``node`` that ``token_ids`` begin with."""
        pages: list[int] = []
        if self._cache_prefixes:
            for start in range(0, len(token_ids) - self.page_size + 1, self.page_size):
                page = self._page_of_key.get(self._key(node, token_ids, start))
                if page is None:
                    break
                self._hold(page)
                pages.append(page)
                node = self._node_of_page[page]
        return PrefixMatch(pages, node)

    def allocate(self, count: int) -> list[int]:
        """Hold ``count`` free pages; their old content is forgotten. The caller checks num_free."""
        assert count <= len(self._free), "allocate without room"
        pages = []
        for _ in range(count):
            page, _ = self._free.popitem(last=False)
            self._forget(page)
            self._holders[page] = 1
            pages.append(page)
        return pages

    def register(self, page: int, parent: int, token_ids: TokenArray) -> int:
        """Make a held page findable, now that its KV is final.

        Args:
            page: the page that holds the KV of ``token_ids``.
            parent: node of the pages before it.
            token_ids: exactly ``page_size`` tokens.

        Returns:
            The node of this prefix; when another page already holds it, that page's node.
        """
        if not self._cache_prefixes:
            return ROOT
        key = self._key(parent, token_ids, 0)
        known = self._page_of_key.get(key)
        if known is not None:
            return self._node_of_page[known]
        node, self._next_node = self._next_node, self._next_node + 1
        self._page_of_key[key] = page
        self._key_of_page[page] = key
        self._node_of_page[page] = node
        return node

    def free(self, pages: Sequence[int]) -> None:
        """Give up one hold of each page; leaves first, so that a prefix outlives its ends."""
        for page in reversed(pages):
            self._holders[page] -= 1
            assert self._holders[page] >= 0, f"page {page} freed twice"
            if self._holders[page] == 0:
                self._free[page] = None
                if page not in self._key_of_page:
                    self._free.move_to_end(page, last=False)

    def _hold(self, page: int) -> None:
        if self._holders[page] == 0:
            del self._free[page]
        self._holders[page] += 1

    def _forget(self, page: int) -> None:
        key = self._key_of_page.pop(page, None)
        if key is not None:
            del self._page_of_key[key]
            del self._node_of_page[page]

    def _key(self, node: int, token_ids: TokenArray, start: int) -> tuple[int, bytes]:
        return node, token_ids[start : start + self.page_size].tobytes()
