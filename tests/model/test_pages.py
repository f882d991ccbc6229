"""The page allocator: a page has the owners that hold it, and reuse finds what was registered."""

from __future__ import annotations

import random

import pytest

from model.pages import ROOT, PageAllocator


def register(pages: PageAllocator, prompt: list[int]) -> list[int]:
    """Allocates and registers the pages of a prompt; the caller owns them."""
    owned, parent = [], ROOT
    for start in range(0, len(prompt), pages.page_size):
        page = pages.allocate()
        assert page is not None
        owned.append(page)
        parent = pages.register(page, parent, tuple(prompt[start : start + pages.page_size]))
    return owned


CASES = {
    # prompt, full pages, length that is reused of [0, 1, ..., 9] in pages of 4
    "same": (list(range(10)), 2, 9),
    "longer": (list(range(12)), 2, 10),
    "one_page": ([0, 1, 2, 3, 9, 9], 1, 4),
    "part_of_a_page": ([0, 1, 2, 3, 4, 5, 9], 1, 6),
    "full_pages": (list(range(8)), 1, 7),
    "other": ([5, 6, 7], 0, 0),
    "first_token": ([0, 9], 0, 1),
    "single": ([0], 0, 0),
}


@pytest.mark.parametrize(("prompt", "full", "length"), CASES.values(), ids=CASES)
def test_reuse(prompt, full, length):
    pages = PageAllocator(8, 4)
    owned = register(pages, list(range(10)))
    reused = pages.reuse(prompt)
    assert reused.pages == owned[:full] and reused.length == length
    expected = owned[full] if length > full * 4 else None
    assert reused.partial == expected
    assert [pages.owners[page] for page in reused.pages] == [2] * full


def test_longest_of_several_prompts():
    pages = PageAllocator(8, 4)
    register(pages, [0, 1, 2, 9])
    best = register(pages, [0, 1, 2, 3, 4])
    reused = pages.reuse([0, 1, 2, 3, 4, 5])
    assert reused.pages == best[:1] and reused.partial == best[1] and reused.length == 5


def test_idle_pages_are_reused_before_they_are_forgotten():
    pages = PageAllocator(3, 2)
    owned = register(pages, [1, 2, 3, 4])
    pages.release(owned)
    assert pages.num_available == 3
    assert pages.reuse([1, 2, 3, 4, 5]).pages == owned
    pages.release(owned)
    assert None not in [pages.allocate() for _ in range(3)]
    assert pages.allocate() is None and pages.reuse([1, 2, 3, 4, 5]).pages == []


def test_last_pages_are_forgotten_first():
    pages = PageAllocator(3, 1)
    pages.release(register(pages, [7, 8, 9]))
    pages.allocate()
    assert pages.reuse([7, 8, 9, 0]).length == 2


def test_random_operations_keep_count(rng):
    rng = random.Random(int(rng.integers(2**32)))
    pages, owned = PageAllocator(12, 2), []
    for _ in range(2000):
        action = rng.randrange(3)
        if action == 0 and (page := pages.allocate()) is not None:
            owned.append(page)
        elif action == 1 and owned:
            page = owned[rng.randrange(len(owned))]
            pages.register(page, rng.choice([ROOT, b"x"]), (rng.randrange(3), rng.randrange(3)))
        elif action == 2 and owned:
            pages.release([owned.pop(rng.randrange(len(owned)))])
        assert pages.owners == [owned.count(page) for page in range(12)]
        assert pages.num_available == 12 - len(set(owned))
        assert set(pages.free).isdisjoint(pages.registered)
