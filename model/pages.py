"""Which pages of the pool a request owns, and which hold prompts that other requests can reuse.

A page of prompt tokens is registered under its key: a hash of all tokens of the prompt up to its
end.  A later prompt that starts alike shares the full pages; where it agrees with a part of a page
only, that page is copied, as the rest of it is written by the new request.  A page that no request
owns any more keeps its tokens until the pool needs it, the least recently released first.

Tokens that a model generated are not reused: their cached bits are those of a generated token, and
a prompt has its own (`batch.py`).  What the prediction layer caches at the end of reused tokens may
belong to another next token; that can cost a draft, and no bit of the result.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

ROOT = b""  # the key of the page before the first


class Reused(NamedTuple):
    """The start of a prompt that is cached.

    pages: full pages, shared; they belong to the caller now.
    partial: a page whose first tokens agree, to be copied, or None.
    length: tokens in `pages`, and the first ones of `partial`.
    keys: of `pages`.
    """

    pages: list[int]
    partial: int | None
    length: int
    keys: list[bytes]


@dataclass
class Registered:
    """A page of prompt tokens."""

    page: int
    parent: bytes
    tokens: tuple[int, ...]


@dataclass
class PageAllocator:
    """The pages 0 to `num_pages` - 1 of a pool."""

    num_pages: int
    page_size: int
    free: list[int] = field(init=False)
    owners: list[int] = field(init=False)  # per page
    idle: OrderedDict[int, None] = field(init=False)  # registered pages without owner, by age
    registered: dict[int, Registered] = field(init=False)
    children: dict[bytes, dict[int, Registered]] = field(init=False)  # of a key, by page
    releases: int = 0  # how often a page has lost its last owner

    def __post_init__(self) -> None:
        self.free = list(range(self.num_pages))[::-1]
        self.owners = [0] * self.num_pages
        self.idle, self.registered, self.children = OrderedDict(), {}, {}

    @property
    def num_available(self) -> int:
        return len(self.free) + len(self.idle)

    def allocate(self) -> int | None:
        """A page for one owner, or None if all have owners."""
        if self.free:
            page = self.free.pop()
        elif self.idle:
            page, _ = self.idle.popitem(last=False)
            self.forget(page)
        else:
            return None
        self.owners[page] = 1
        return page

    def release(self, pages: list[int]) -> None:
        """Gives up one ownership of each page; the last pages are reused first."""
        for page in reversed(pages):
            self.owners[page] -= 1
            if self.owners[page]:
                continue
            self.releases += 1
            if page in self.registered:
                self.idle[page] = None
            else:
                self.free.append(page)

    def own(self, page: int) -> None:
        """One more owner of a registered page."""
        self.owners[page] += 1
        self.idle.pop(page, None)

    def register(self, page: int, parent: bytes, tokens: tuple[int, ...]) -> bytes:
        """Offers a page that holds `tokens` of a prompt after the page of key `parent`.

        Returns its key.  A page that is offered again with more tokens replaces what it was.
        """
        self.forget(page)
        entry = Registered(page, parent, tokens)
        self.registered[page] = entry
        self.children.setdefault(parent, {})[page] = entry
        return page_key(parent, tokens)

    def holds(self, page: int, count: int) -> bool:
        """Whether the page is offered with `count` tokens."""
        return page in self.registered and len(self.registered[page].tokens) == count

    def forget(self, page: int) -> None:
        """The page is not offered any more."""
        entry = self.registered.pop(page, None)
        if entry is not None:
            siblings = self.children[entry.parent]
            del siblings[page]
            if not siblings:
                del self.children[entry.parent]

    def reuse(self, prompt: list[int]) -> Reused:
        """The longest cached start of `prompt`, which leaves one token at least to compute."""
        pages: list[int] = []
        keys: list[bytes] = []
        parent, length = ROOT, 0
        while True:
            rest = prompt[length : length + self.page_size]
            page, common = self.best_child(parent, rest)
            if page is None:
                return Reused(pages, None, length, keys)
            if common < self.page_size or length + common == len(prompt):
                common = min(common, len(prompt) - 1 - length)
                partial = page if common > 0 else None
                return Reused(pages, partial, length + common, keys)
            self.own(page)
            pages.append(page)
            parent = page_key(parent, tuple(rest))
            keys.append(parent)
            length += common

    def best_child(self, parent: bytes, tokens: list[int]) -> tuple[int | None, int]:
        """The page after `parent` that agrees with most of `tokens`, and how many."""
        best, most = None, 0
        for page, entry in self.children.get(parent, {}).items():
            common = common_length(entry.tokens, tokens)
            if common > most:
                best, most = page, common
        return best, most


def common_length(a: tuple[int, ...], b: list[int]) -> int:
    """The number of leading values that agree."""
    for number, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return number
    return min(len(a), len(b))


def page_key(parent: bytes, tokens: tuple[int, ...]) -> bytes:
    """The key of a page: SHA-256 of its predecessor's key and its tokens."""
    data = b"".join(token.to_bytes(8, "little") for token in tokens)
    return hashlib.sha256(parent + data).digest()
