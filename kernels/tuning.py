"""Which tiles a kernel takes on which GPU, and how its work is cut, from sizes the host knows.

A kernel with one sensible shape keeps it to itself; here stand the choices that differ between
GPUs or between batches. Everything is a function of shapes, so that equal steps launch equal
programs and a step can be recorded into a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from math import inf

import torch

# What Triton's CPU interpreter pretends to be: a GPU of no known kind and one multiprocessor.
NO_CAPABILITY = (0, 0)


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """CUDA compute capability, ``NO_CAPABILITY`` elsewhere."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else NO_CAPABILITY


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU, 1 elsewhere."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


# --- paged_attention ---------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionTile:
    """Shape of one program of ``paged_attention``.

    Args:
        block_m: (token, query head) pairs of one KV head.
        block_n: KV positions per pass of the loop; a power of two like ``block_m``, at least 16.
        num_warps: warps that share the tile.
        num_stages: Triton's pipelining depth; pages in flight grow with it, and shared memory.
        programs_per_sm: how many fit on a multiprocessor at once, by shared memory and registers.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs_per_sm: int


@dataclass(frozen=True)
class AttentionPlan:
    """A tile, among how many programs its KV positions are shared, and how many run at once."""

    tile: AttentionTile
    num_splits: int
    places: int


@dataclass(frozen=True)
class AttentionTiles:
    """The tiles of one kind of GPU, for heads of up to 128.

    Args:
        by_row: tiles, lowest first, and up to how many pairs the mean row of a batch may have.
        few: where a tile's positions are shared, the first of these lower tiles whose positions
            are shared by at least so many programs: its parts are added up by one program, and low
            tiles bring more programs anyway.
    """

    by_row: tuple[tuple[float, AttentionTile], ...]
    few: tuple[tuple[int, AttentionTile], ...]


# Low tiles hold rows twice as long as the mean: a tile too tall idles tensor cores that wait for
# memory anyway, a tile too low reads the row's pages twice. But short rows over short contexts
# also want many programs at once, so only full rows take the tallest tile: 256 rows of 11 of the
# 32 tokens of a block (group 4, context 330) took 154 us in tiles of 64 pairs and 166 of 128, rows
# of 21 tokens 177 and 182, rows of 32 tokens 203 and 198 (one H100).
# 64 rows are the least that Hopper's wgmma takes; fewer run on mma.sync. One sequence of 22 tokens
# over 1024 positions took 14.6 us in tiles of 16 pairs and 16.2 of 32, over 4096 23.7 and 26.0; 8
# sequences of 11 took 15.9 us in tiles of 32 and 19.8 of 16.
_HOPPER_LOWEST = AttentionTile(16, 64, 4, 3, 3)
_HOPPER_LOW = AttentionTile(32, 64, 4, 3, 2)
HOPPER_TILES = AttentionTiles(
    (
        (8, _HOPPER_LOWEST),
        (16, _HOPPER_LOW),
        (96, AttentionTile(64, 32, 4, 3, 3)),
        (inf, AttentionTile(128, 32, 8, 4, 2)),
    ),
    few=((4, _HOPPER_LOWEST), (2, _HOPPER_LOW)),
)
# Fits the 99 KiB of shared memory that the smallest GPUs since Ampere give a program.
_SMALL_FEW = AttentionTile(32, 64, 4, 3, 1)
SMALL_TILES = AttentionTiles(
    (
        (8, AttentionTile(16, 64, 4, 3, 1)),
        (16, _SMALL_FEW),
        (inf, AttentionTile(64, 32, 4, 3, 1)),
    ),
    few=((2, _SMALL_FEW),),
)
ATTENTION_TILES = {(9, 0): HOPPER_TILES}

# float32 serves comparisons, not speed: no tensor cores (their float32 is not), so registers bound
# the tile. One tile and no splits for every batch: a row's result does not depend on its company.
FLOAT32_TILE = AttentionTile(16, 32, 4, 1, 1)

# A split shorter than this costs more in partial results than it gains in company.
MIN_POSITIONS_PER_SPLIT = 128
MAX_SPLITS = 32


def attention_plan(
    device: torch.device,
    dtype: torch.dtype,
    *,
    num_tokens: int,
    busy_rows: int,
    num_kv_heads: int,
    group: int,
    head_dim: int,
    max_row_len: int,
    max_kv_len: int,
) -> AttentionPlan:
    """Choose tile and splits for ``num_tokens`` tokens in about ``busy_rows`` rows.

    Args:
        device: where the kernel will run.
        dtype: of queries and pages.
        num_tokens: at least 1.
        busy_rows: at least 1.
        num_kv_heads: K.
        group: query heads per KV head.
        head_dim: d.
        max_row_len: most tokens in a row.
        max_kv_len: most KV positions a token sees.
    """
    if dtype == torch.float32:
        tile, places = FLOAT32_TILE, num_multiprocessors(device)
        return AttentionPlan(_for_head_dim(tile, head_dim), 1, places)
    tiles = ATTENTION_TILES.get(capability(device), SMALL_TILES)
    mean_pairs = num_tokens / busy_rows * group
    tile = next(
        tile
        for most_pairs, tile in tiles.by_row
        if mean_pairs <= most_pairs or max_row_len * group <= tile.block_m
    )

    def with_splits(tile: AttentionTile) -> AttentionPlan:
        tile = _for_head_dim(tile, head_dim)
        num_programs = max(busy_rows, -(-num_tokens * group // tile.block_m)) * num_kv_heads
        places = num_multiprocessors(device) * tile.programs_per_sm
        return AttentionPlan(tile, num_splits(num_programs, places, max_kv_len), places)

    plan = with_splits(tile)
    if plan.num_splits > 1:
        for least_splits, lower in tiles.few:
            shared = with_splits(lower)
            if lower.block_m < tile.block_m and shared.num_splits >= least_splits:
                return shared
    return plan


def num_splits(num_programs: int, places: int, max_kv_len: int) -> int:
    """The power of two of splits with which all programs still run at once, 1 if none do.

    Args:
        num_programs: programs without splits.
        places: programs the GPU runs at once.
        max_kv_len: most KV positions of a program.
    """
    most = min(places // num_programs, max_kv_len // MIN_POSITIONS_PER_SPLIT, MAX_SPLITS)
    return 1 << (max(most, 1).bit_length() - 1)


def _for_head_dim(tile: AttentionTile, head_dim: int) -> AttentionTile:
    """The tile itself up to heads of 128; beyond, about as many bytes and registers."""
    excess = -(-head_dim // 128)
    if excess == 1:
        return tile
    excess = 1 << (excess - 1).bit_length()
    return replace(
        tile,
        block_m=min(tile.block_m, max(16, 128 // excess)),
        block_n=max(16, tile.block_n // excess),
    )
