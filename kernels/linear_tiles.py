"""Which products of few tokens run on the kernel of ``linear``, and how they are cut there.

Measured on an H100, alone (``benchmarks/linear_tuning.py``) and in whole steps
(``benchmarks/few_token_step.py``): tiles of one shape serve every product of SDAR-8B; what differs
is among how many programs a tile is shared, and how many loads these keep in flight.

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
# Two passes of weights are on their way before the kernel waits for its predecessor, in registers,
# of which more tokens leave too few.
NUM_HELD = 2
# With more tokens cuBLAS is as fast or faster: where tiles are fewer than multiprocessors, else.
MOST_TOKENS_FEW_TILES = 32
MOST_TOKENS = 64
# With more tokens one program a multiprocessor is better than two, which read the tokens twice.
MOST_TOKENS_IN_TWO = 16
# Smaller weights come from the cache, and launching is what counts.
LEAST_WEIGHT_BYTES = 8 << 20
# Shorter shares lose to adding up.
LEAST_PASSES = 4


def linear_tile(x_TD: Tensor, weight_OD: Tensor, *, gated: bool) -> LinearTile | None:
    """The cut of this product, None where it is cuBLAS's."""
    num_tokens, inner = x_TD.shape
    out_size = weight_OD.shape[0]
    if capability(x_TD.device) != (9, 0) or x_TD.dtype == torch.float32:
        return None
    weight_bytes = weight_OD.numel() * weight_OD.element_size()
    if num_tokens > MOST_TOKENS or weight_bytes < LEAST_WEIGHT_BYTES:
        return None
    num_passes = inner // BLOCK_D
    if inner % BLOCK_D or num_passes < LEAST_PASSES or (gated and out_size % BLOCK_O):
        return None
    num_tiles, multiprocessors = -(-out_size // BLOCK_O), num_multiprocessors(x_TD.device)
    if num_tiles < multiprocessors and num_tokens > MOST_TOKENS_FEW_TILES:
        return None
    most_at_once = multiprocessors * (2 if num_tokens <= MOST_TOKENS_IN_TWO else 1)
    splits = num_splits(num_tiles, num_passes, most_at_once)
    stages = num_stages(num_tiles * splits, most_at_once, multiprocessors)
    held = NUM_HELD if num_tokens <= MOST_TOKENS_FEW_TILES else 0
    return LinearTile(BLOCK_O, BLOCK_D, splits, NUM_WARPS, stages, held)


def num_splits(num_tiles: int, num_passes: int, most_programs: int) -> int:
    """Most equal shares of the inner dimension with which all programs run at once, at least 1."""
    most = min(most_programs // num_tiles, num_passes // LEAST_PASSES)
    return next((n for n in range(most, 1, -1) if num_passes % n == 0), 1)


def num_stages(num_programs: int, most_at_once: int, num_multiprocessors: int) -> int:
    """Passes in flight: as many as keep memory busy, and surplus programs from crowding in."""
    if num_programs > most_at_once:
        return 3
    if most_at_once == num_multiprocessors:
        return 5
    # Where two a multiprocessor fill nearly all, a fourth stage keeps a third from crowding in
    # (4096 x 4096: 14.5 instead of 16.0 us). Elsewhere it costs 5 %.
    return 4 if num_programs > 1.75 * num_multiprocessors else 3
