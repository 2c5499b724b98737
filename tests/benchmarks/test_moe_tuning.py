from __future__ import annotations

import pytest

from focus_ray.benchmarks.moe_tuning import BLOCKS_T, TOKENS, blocks_t, candidates
from focus_ray.benchmarks.moe_work import SHAPES
from focus_ray.kernels.moe_tiles import HOPPER_TILES


def test_what_ships_is_among_the_candidates() -> None:
    for _, tiles in HOPPER_TILES:
        assert {tiles.gate_up, tiles.down} <= set(candidates(tiles.block_t))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("num_tokens", TOKENS)
def test_what_ships_is_tried_at_every_number_of_tokens(name: str, num_tokens: int) -> None:
    shape = SHAPES[name]
    mean = num_tokens * shape.num_chosen / shape.num_experts
    shipped = next(tiles.block_t for most, tiles in HOPPER_TILES if mean <= most)
    assert shipped in blocks_t(shape, num_tokens)


def test_no_cut_is_named_twice() -> None:
    for block_t in BLOCKS_T:
        tiles = list(candidates(block_t))
        assert len(set(tiles)) == len(tiles)
