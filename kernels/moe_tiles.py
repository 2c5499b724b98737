"""How the products of a mixture are cut, from the tokens that an expert has on average.

Few tokens: reading the weights of the experts they touch is what counts, so tiles are as low as
tensor cores allow, and several programs share a multiprocessor. A tile should hold the tokens of
nearly every expert, though, for with a second one an expert's weights are read again, if from the
cache. Many tokens: what multiprocessors read from the cache counts, so tiles are large.
Measured on an H200; docs/decisions/0010-mixture-of-experts.md has the arithmetic and the times.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch

from focus_ray.kernels.moe_products import ProductTile
from focus_ray.kernels.tuning import capability


@dataclass(frozen=True)
class MoeTiles:
    """Cuts of both products, whose tiles of tokens are the same.

    Args:
        block_t: most tokens of a tile; a power of two, at least 16.
        gate_up: cut of the gated product.
        down: cut of the other.
    """

    block_t: int
    gate_up: ProductTile
    down: ProductTile


# By mean tokens of an expert. Counts of experts vary by about the root of their mean, and more as
# routing is skewed: up to 2/3 of a tile on average, most experts fit into one.
_FEW = MoeTiles(16, ProductTile(64, 128, 4, 3), ProductTile(64, 128, 4, 3))
HOPPER_TILES = (
    (10, _FEW),
    (21, MoeTiles(32, ProductTile(128, 64, 4, 3), ProductTile(128, 64, 4, 3))),
    (42, MoeTiles(64, ProductTile(128, 64, 8, 3), ProductTile(128, 64, 8, 3))),
    (inf, MoeTiles(128, ProductTile(128, 64, 8, 3), ProductTile(128, 64, 4, 3))),
)
# Fit the 99 KiB of shared memory that the smallest GPUs since Ampere give a program.
SMALL_TILES = (
    (10, MoeTiles(16, ProductTile(64, 64, 4, 4), ProductTile(64, 64, 4, 4))),
    (42, MoeTiles(64, ProductTile(64, 64, 4, 3), ProductTile(64, 64, 4, 3))),
    (inf, MoeTiles(128, ProductTile(128, 32, 8, 3), ProductTile(128, 32, 8, 3))),
)
TILES = {(9, 0): HOPPER_TILES}

# float32 serves comparisons, not speed: no tensor cores (their float32 is not), so registers bound
# the tile. One for every batch: a token's result does not depend on its company.
FLOAT32_TILES = MoeTiles(16, ProductTile(32, 32, 4, 1), ProductTile(32, 32, 4, 1))


def moe_tiles(
    device: torch.device, dtype: torch.dtype, num_pairs: int, num_experts: int
) -> MoeTiles:
    """The cut for so many (token, expert) pairs over so many experts."""
    if dtype == torch.float32:
        return FLOAT32_TILES
    tiles = TILES.get(capability(device), SMALL_TILES)
    mean = num_pairs / num_experts
    return next(tile for most, tile in tiles if mean <= most)
