"""Which products of few tokens run on the kernel of ``linear``, and how they are cut there.

T tokens, O output size, D inner size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from focus_ray.kernels.linear_kernels import LinearTile
from focus_ray.kernels.tuning import capability, num_multiprocessors

# With more tokens cuBLAS is as fast or faster.
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
    block_o, block_d = (64, 128) if num_tokens <= 32 else (128, 64)
    if inner % block_d or (gated and (out_size // 2) % (block_o // 2)):
        return None
    splits = num_splits(-(-out_size // block_o), inner // block_d, num_multiprocessors(x_TD.device))
    return LinearTile(block_o, block_d, splits, 4, 3 if block_d == 128 else 4, 512)


def num_splits(num_tiles: int, num_passes: int, num_multiprocessors: int) -> int:
    """Fewest equal shares of the inner dimension that give two programs a multiprocessor."""
    wanted = -(-2 * num_multiprocessors // num_tiles)
    equal = [n for n in range(1, MOST_SPLITS + 1) if num_passes % n == 0]
    return next((n for n in equal if n >= wanted), equal[-1])
