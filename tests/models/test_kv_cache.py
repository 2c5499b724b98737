from __future__ import annotations

import pytest
import torch

from focus_ray.models.kv_cache import KVCache, bytes_per_page


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_per_page_are_what_the_tensors_take(dtype: torch.dtype) -> None:
    sizes = {"num_layers": 3, "page_size": 8, "num_kv_heads": 2, "head_dim": 16, "dtype": dtype}
    cache = KVCache(num_pages=5, device="cpu", **sizes)
    assert cache.keys.nbytes + cache.values.nbytes == 6 * bytes_per_page(**sizes)  # one for nobody
    assert (cache.num_pages, cache.page_size) == (5, 8)


def test_the_trash_slot_is_behind_all_pages_that_are_dealt_out() -> None:
    cache = KVCache(
        num_layers=1,
        num_pages=3,
        page_size=4,
        num_kv_heads=1,
        head_dim=2,
        dtype=torch.float32,
        device="cpu",
    )
    pages = cache.layer(0).key_pages
    pages.flatten(0, 1)[cache.trash_slot] = 1.0
    assert not pages[: cache.num_pages].any()


def test_a_layer_is_a_view_that_starts_at_zero() -> None:
    cache = KVCache(
        num_layers=2,
        num_pages=1,
        page_size=4,
        num_kv_heads=1,
        head_dim=2,
        dtype=torch.float32,
        device="cpu",
    )
    cache.layer(1).key_pages.fill_(1.0)
    assert cache.keys[1].eq(1).all()
    assert not cache.keys[0].any()
    assert not cache.values.any()
