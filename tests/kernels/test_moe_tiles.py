from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from focus_ray.kernels import moe_tiles as module
from focus_ray.kernels.moe_products import ProductTile
from focus_ray.kernels.moe_tiles import (
    FLOAT32_TILES,
    HOPPER_TILES,
    SMALL_TILES,
    MoeTiles,
    moe_tiles,
)

CUDA = torch.device("cuda", 0)
Choose = Callable[[int, int], MoeTiles]


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> Choose:
    monkeypatch.setattr(module, "capability", lambda device: (9, 0))
    return lambda num_pairs, num_experts: moe_tiles(CUDA, torch.bfloat16, num_pairs, num_experts)


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "block_t"),
    [
        pytest.param(1, 256, 16, id="LLaDA2.0, one token"),
        pytest.param(64, 256, 16, id="LLaDA2.0, two tokens an expert"),
        pytest.param(512, 256, 32, id="LLaDA2.0, sixteen"),
        pytest.param(2048, 256, 128, id="LLaDA2.0, sixty-four"),
        pytest.param(8192, 256, 128, id="LLaDA2.0, more than a tile each"),
        pytest.param(64, 128, 16, id="SDAR-30B-A3B, four tokens an expert"),
        pytest.param(512, 128, 64, id="SDAR-30B-A3B, thirty-two"),
    ],
)
def test_a_tile_holds_the_tokens_of_most_experts(
    num_tokens: int, num_experts: int, block_t: int, on_hopper: Choose
) -> None:
    assert on_hopper(8 * num_tokens, num_experts).block_t == block_t


def test_float32_has_one_cut_so_that_company_changes_nothing() -> None:
    for num_pairs in (1, 1 << 20):
        assert moe_tiles(CUDA, torch.float32, num_pairs, 8) is FLOAT32_TILES


def test_gpus_of_no_known_kind_take_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "capability", lambda device: (8, 6))
    for num_pairs in (1, 1 << 20):
        chosen = moe_tiles(CUDA, torch.bfloat16, num_pairs, 8)
        assert any(chosen is tiles for _, tiles in SMALL_TILES)


def shared_bytes(block_t: int, tile: ProductTile) -> int:
    """What the loads in flight take, of 16-bit numbers."""
    return (block_t + tile.block_o) * tile.block_d * tile.num_stages * 2


@pytest.mark.parametrize(
    ("tiles", "most_bytes"),
    [
        pytest.param(HOPPER_TILES, 227 << 10, id="hopper"),
        pytest.param(SMALL_TILES, 99 << 10, id="small"),
    ],
)
def test_every_cut_fits_into_shared_memory(
    tiles: tuple[tuple[float, MoeTiles], ...], most_bytes: int
) -> None:
    means = [mean for mean, _ in tiles]
    assert means == sorted(means)
    for _, cut in tiles:
        assert cut.block_t >= 16
        assert shared_bytes(cut.block_t, cut.gate_up) <= most_bytes
        assert shared_bytes(cut.block_t, cut.down) <= most_bytes
