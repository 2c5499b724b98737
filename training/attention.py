"""Attention over packed rows: every query sees at most two ranges of keys.

The dense form is the definition; the flex form is what trains. ``train.py`` compares the two at its
start and refuses to go on when they differ.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from model import Attend, layer_forward
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

TILE = 128


class KeyRanges(NamedTuple):
    """Query q sees keys ``[low, high)`` and ``[near_low, near_high)``; each ``[R, T]`` int32."""

    low: Tensor
    high: Tensor
    near_low: Tensor
    near_high: Tensor


def dense_attention(ranges: KeyRanges) -> Attend:
    """The definition, with the whole mask in memory."""
    low, high, near_low, near_high = (bound[:, :, None] for bound in ranges)
    keys = torch.arange(low.shape[1], device=low.device)
    seen = ((keys >= low) & (keys < high)) | ((keys >= near_low) & (keys < near_high))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], enable_gqa=True)

    return attend


def key_tiles(ranges: KeyRanges) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each tile of queries, how many and which tiles of keys it sees in part and in full.

    Returns:
        part counts ``[R, 1, n]``, part tiles ``[R, 1, n, n]``, the same two for full; int32.
    """
    rows, length = ranges.low.shape
    tiles = length // TILE
    first = torch.arange(tiles, device=ranges.low.device) * TILE
    low, high, near_low, near_high = (bound[:, :, None] for bound in ranges)
    touched = ((low < first + TILE) & (high > first) & (high > low)) | (
        (near_low < first + TILE) & (near_high > first) & (near_high > near_low)
    )
    covered = ((low <= first) & (high >= first + TILE)) | (
        (near_low <= first) & (near_high >= first + TILE)
    )
    seen = touched.view(rows, tiles, TILE, tiles).any(2)
    full = covered.view(rows, tiles, TILE, tiles).all(2)

    def listed(which: Tensor) -> tuple[Tensor, Tensor]:
        order = which.int().argsort(dim=-1, descending=True, stable=True).int()
        return which.sum(-1, dtype=torch.int32)[:, None].contiguous(), order[:, None].contiguous()

    return (*listed(seen & ~full), *listed(full))


def _flex_layer(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    bounds: tuple[Tensor, ...],
    head_dim: int,
    eps: float,
    *weights: Tensor,
) -> Tensor:
    low, high, near_low, near_high, part_count, part_tiles, full_count, full_tiles = bounds
    length = x.shape[1]

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        far = (key >= low[row, query]) & (key < high[row, query])
        return far | ((key >= near_low[row, query]) & (key < near_high[row, query]))

    mask = BlockMask.from_kv_blocks(
        part_count,
        part_tiles,
        full_count,
        full_tiles,
        BLOCK_SIZE=TILE,
        mask_mod=sees,
        seq_lengths=(length, length),
    )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # contiguous: compiled flex_attention read strided inputs wrongly on CPU (torch 2.13)
        out = flex_attention(
            q.contiguous(), k.contiguous(), v.contiguous(), block_mask=mask, enable_gqa=True
        )
        assert isinstance(out, Tensor)
        return out.contiguous()

    return layer_forward(x, cos, sin, attend, head_dim, eps, *weights)


@cache
def compiled_flex_layer() -> Callable[..., Tensor]:
    """One layer with flex attention; compiled once per batch shape and shared by all layers."""
    return torch.compile(_flex_layer, dynamic=False)
