"""Which products of few tokens run on the kernel of ``linear``, and how they are cut there.

Measured on an H100 (``benchmarks/linear_tuning.py``): one shape of tile is the fastest or within
2 % of it for every product of SDAR-8B; what differs is among how many programs a tile is shared.

T tokens, O output size, D inner size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from focus_ray.kernels.linear_kernels import LinearTile
from focus_ray.kernels.tuning import capability, num_multiprocessors

BLOCK_O = 64
BLOCK_D = 128
NUM_WARPS = 4
# With more tokens cuBLAS is as fast or faster: where the inner dimension must be shared, else.
MOST_TOKENS_SPLIT = 32
MOST_TOKENS = 64
# Smaller weights come from the cache, and launching is what counts.
LEAST_WEIGHT_BYTES = 8 << 20
MOST_SPLITS = 16


def linear_tile(x_TD: Tensor, weight_OD: Tensor, *, gated: bool) -> LinearTile | None:
    """The cut of this product, None where it is cuBLAS's."""
    num_tokens, inner = x_TD.shape
    out_size = weight_OD.shape[0]
    if capability(x_TD.device) != (9, 0) or x_TD.dtype == torch.float32:
        return None
    weight_bytes = weight_OD.numel() * weight_OD.element_size()
    if num_tokens > MOST_TOKENS or weight_bytes < LEAST_WEIGHT_BYTES:
        return None
    if inner % BLOCK_D or (gated and out_size % BLOCK_O):
        return None
    num_tiles, multiprocessors = -(-out_size // BLOCK_O), num_multiprocessors(x_TD.device)
    splits = num_splits(num_tiles, inner // BLOCK_D, multiprocessors)
    if splits > 1 and num_tokens > MOST_TOKENS_SPLIT:
        return None
    # Where programs come to two a multiprocessor, a fourth stage keeps a third from crowding in
    # (4096 x 4096: 14.5 instead of 16.0 us). Elsewhere it costs 5 %.
    crowded = 1.75 < num_tiles * splits / multiprocessors <= 2
    return LinearTile(BLOCK_O, BLOCK_D, splits, NUM_WARPS, 4 if crowded else 3)


def num_splits(num_tiles: int, num_passes: int, num_multiprocessors: int) -> int:
    """Fewest equal shares of the inner dimension: four programs for three multiprocessors."""
    wanted = -(-4 * num_multiprocessors // (3 * num_tiles))
    equal = [n for n in range(1, MOST_SPLITS + 1) if num_passes % n == 0]
    return next((n for n in equal if n >= wanted), equal[-1])
