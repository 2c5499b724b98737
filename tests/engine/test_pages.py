import numpy as np
import pytest

from focus_ray.engine.pages import ROOT, PagePool


def ids(*values):
    return np.array(values, np.int32)


def fill(pool, token_ids):
    """Allocate and register the pages of a sequence of whole pages."""
    pages, node = [], ROOT
    for start in range(0, len(token_ids), pool.page_size):
        (page,) = pool.allocate(1)
        node = pool.register(page, node, token_ids[start : start + pool.page_size])
        pages.append(page)
    return pages, node


def test_equal_prefix_is_found_and_shared():
    pool = PagePool(8, page_size=2)
    pages, node = fill(pool, ids(1, 2, 3, 4))
    match = pool.match(ids(1, 2, 3, 4, 5))
    assert (match.pages, match.node) == (pages, node)
    pool.free(pages)
    assert pool.num_free == 6  # still held by the match
    pool.free(match.pages)
    assert pool.num_free == 8


@pytest.mark.parametrize(
    ("token_ids", "found"),
    [
        pytest.param(ids(1, 2, 3, 4), 2, id="whole"),
        pytest.param(ids(1, 2, 3), 1, id="half a page is not matched"),
        pytest.param(ids(1, 2, 9, 4), 1, id="second page differs"),
        pytest.param(ids(3, 4), 0, id="same tokens behind another prefix"),
        pytest.param(ids(), 0, id="empty"),
    ],
)
def test_match_is_by_content_from_the_start(token_ids, found):
    pool = PagePool(8, page_size=2)
    fill(pool, ids(1, 2, 3, 4))
    assert len(pool.match(token_ids).pages) == found


def test_freed_pages_stay_findable_until_reused():
    pool = PagePool(2, page_size=2)
    pages, _ = fill(pool, ids(1, 2, 3, 4))
    pool.free(pages)
    assert pool.num_free == 2
    match = pool.match(ids(1, 2, 3, 4))
    assert match.pages == pages
    pool.free(match.pages)
    pool.allocate(1)  # takes the leaf first
    assert pool.match(ids(1, 2, 3, 4)).pages == pages[:1]


def test_pages_without_a_prefix_are_reused_before_any_known_one():
    pool = PagePool(3, page_size=1)
    known, _ = fill(pool, ids(1, 2))
    pool.free(known)
    scratch = pool.allocate(1)
    pool.free(scratch)
    assert pool.allocate(1) == scratch
    match = pool.match(ids(1, 2))
    assert match.pages == known


def test_a_match_goes_on_from_a_node():
    pool = PagePool(4, page_size=1)
    pages, _ = fill(pool, ids(1, 2, 3))
    start = pool.match(ids(1))
    rest = pool.match(ids(2, 3, 4), start.node)
    assert rest.pages == pages[1:]
    assert pool.match(ids(2, 3)).pages == []


def test_a_reused_parent_is_not_mistaken_for_the_old_one():
    pool = PagePool(3, page_size=1)
    old_parent, old_child = fill(pool, ids(1, 7))[0]
    pool.free([old_parent])
    other = pool.allocate(2)  # the third page and the old parent, which now holds 2
    assert old_parent in other
    pool.register(old_parent, ROOT, ids(2))
    assert pool.match(ids(2, 7)).pages == [old_parent]
    assert old_child not in pool.match(ids(2, 7)).pages


def test_second_page_of_equal_content_joins_the_first_ones_chain():
    pool = PagePool(4, page_size=1)
    first, node = fill(pool, ids(1))
    second, same_node = fill(pool, ids(1))
    assert same_node == node
    assert pool.match(ids(1)).pages == first
    (child,) = pool.allocate(1)
    pool.register(child, same_node, ids(2))
    assert pool.match(ids(1, 2)).pages == [*first, child]
    pool.free([*second, child])


def test_without_caching_nothing_is_found():
    pool = PagePool(4, page_size=1, cache_prefixes=False)
    fill(pool, ids(1, 2))
    assert pool.match(ids(1, 2)).pages == []


def test_random_use_returns_every_page():
    rng = np.random.default_rng(0)
    pool = PagePool(16, page_size=2)
    held = []
    for _ in range(2000):
        if held and (rng.random() < 0.5 or not pool.num_free):
            pool.free(held.pop(rng.integers(len(held))))
            continue
        tokens = rng.integers(0, 2, size=2 * rng.integers(1, 4)).astype(np.int32)
        match = pool.match(tokens)
        pages, node = list(match.pages), match.node
        while len(pages) * 2 < len(tokens) and pool.num_free:
            start = len(pages) * 2
            pages += pool.allocate(1)
            node = pool.register(pages[-1], node, tokens[start : start + 2])
        held.append(pages)
    assert any(len(pages) > 1 for pages in held)
    for pages in held:
        pool.free(pages)
    assert pool.num_free == 16


def test_no_pages_is_refused():
    with pytest.raises(ValueError, match="num_pages must be at least 1"):
        PagePool(0, page_size=4)
