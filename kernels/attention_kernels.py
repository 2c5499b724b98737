"""The launch behind ``paged_attention``: which program takes which tile of which row.

What is launched depends on sizes that the host knows, so that it can be recorded; how much of it
has work is found on the device. What a program does with its tile is in ``attention_tile.py``; a
tile's positions can be shared among programs, whose parts ``attention_splits.py`` adds up.

T query tokens in S rows, H query heads, K KV heads, G = H / K, d head size, M (token, head) pairs
of a tile, X splits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from focus_ray.kernels.attention_tile import attend_tile
from focus_ray.kernels.overlap import let_next_begin, overlap_options, wait_for_previous
from focus_ray.kernels.split_counters import MAX_COUNTED_TILES, finished_counters
from focus_ray.kernels.tuning import MIN_POSITIONS_PER_SPLIT, AttentionPlan

ROWS_PER_SEARCH = (512, 2048)
"""Row offsets looked at together: one wait for all of them, if there are no more."""

WAVES_THAT_LOOP = 2
"""So many programs a place may take further tiles, which costs registers of all of them."""


def launch_attention(
    q_THd: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table_MP: Tensor,
    row_table_S: Tensor,
    row_offsets_S1: Tensor,
    kv_limit_T: Tensor,
    *,
    busy_rows: int,
    scale: float,
    plan: AttentionPlan,
) -> Tensor:
    """What ``paged_attention`` returns, for arguments that it has checked, at least one token.

    Row s takes ``ceil(n_s * G / M)`` tiles. The host starts a program for each of as many as
    ``busy_rows`` rows could take. Where these are few, they take all others as well, one after
    the other; many leave them to a second, small launch, so as not to carry the loop.
    """
    num_tokens, num_heads, head_dim = q_THd.shape
    _, page_size, num_kv_heads, _ = key_pages.shape
    num_rows = min(len(row_table_S), num_tokens)  # rows behind these are empty
    group = num_heads // num_kv_heads
    tile = plan.tile
    num_tiles = num_tokens * group // tile.block_m + num_rows
    num_splits = plan.num_splits if num_tiles * num_kv_heads <= MAX_COUNTED_TILES else 1

    out_THd = q_THd.new_empty(q_THd.shape)
    part_XTHd = log_sum_XTH = finished = None
    if num_splits > 1:
        part_XTHd = q_THd.new_empty((num_splits, *q_THd.shape), dtype=torch.float32)
        log_sum_XTH = part_XTHd.new_empty((num_splits, num_tokens, num_heads))
        finished = finished_counters(q_THd.device)

    tiles_at_once = max(plan.places // (num_kv_heads * num_splits), 1)
    for first_tile, num_started, looped in _launches(
        num_tiles, max(num_rows - busy_rows, 0), tiles_at_once
    ):
        _attend_kernel[(num_started * num_kv_heads * num_splits,)](
            q_THd,
            key_pages,
            value_pages,
            page_table_MP,
            row_table_S.contiguous(),
            row_offsets_S1.contiguous(),
            kv_limit_T.contiguous(),
            out_THd,
            part_XTHd,
            log_sum_XTH,
            finished,
            q_THd.stride(0),
            q_THd.stride(1),
            page_table_MP.stride(0),
            page_table_MP.stride(1),
            num_tokens,
            num_rows,
            first_tile,
            scale * math.log2(math.e),  # so that the softmax is one of powers of two
            NUM_KV_HEADS=num_kv_heads,
            GROUP=group,
            HEAD_DIM=head_dim,
            PAGE_SIZE=page_size,
            NUM_SPLITS=num_splits,
            LEAST_SPLIT=MIN_POSITIONS_PER_SPLIT,
            LOOPED=looped,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
            BLOCK_S=next((b for b in ROWS_PER_SEARCH if b >= num_rows), ROWS_PER_SEARCH[-1]),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **overlap_options(q_THd.device),
        )
    return out_THd


def _launches(
    num_tiles: int, num_unlikely: int, tiles_at_once: int
) -> Iterator[tuple[int, int, bool]]:
    """First tile, number of tiles that get programs of their own, and whether these take more.

    ``num_unlikely`` tiles, the last ones, are there only if rows are shorter than was thought.
    """
    num_likely = num_tiles - num_unlikely
    if num_unlikely == 0:
        yield 0, num_tiles, False
    elif num_likely <= WAVES_THAT_LOOP * tiles_at_once:
        yield 0, num_likely, True
    elif num_unlikely <= tiles_at_once:  # they leave at once, faster than another launch
        yield 0, num_tiles, False
    else:
        yield 0, num_likely, False
        yield num_likely, tiles_at_once, True


# Sizes that change from step to step; specialised, they would be compiled for again and again.
@triton.jit(do_not_specialize=["num_tokens", "num_rows", "first_tile", "page_table_stride_m"])
def _attend_kernel(
    q_ptr,
    key_ptr,
    value_ptr,
    page_table_ptr,
    row_table_ptr,
    row_offsets_ptr,
    kv_limit_ptr,
    out_ptr,
    part_ptr,
    log_sum_ptr,
    finished_ptr,
    q_stride_t,
    q_stride_h,
    page_table_stride_m,
    page_table_stride_p,
    num_tokens,
    num_rows,
    first_tile,
    scale_log2,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    LEAST_SPLIT: tl.constexpr,
    LOOPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    # A program owns one tile of a row, one KV head, and one split of the tile's positions. The KV
    # heads of a tile, then the tiles of a row, are neighbours: they read the same pages at once.
    # With LOOPED it owns every so many of the tiles from ``first_tile`` on: one of them, or none.
    split = tl.program_id(0) % NUM_SPLITS
    kv_head = tl.program_id(0) // NUM_SPLITS % NUM_KV_HEADS
    place = tl.program_id(0) // (NUM_SPLITS * NUM_KV_HEADS)
    num_started = tl.num_programs(0) // (NUM_SPLITS * NUM_KV_HEADS)
    let_next_begin(OVERLAP)
    wait_for_previous(OVERLAP)
    if LOOPED:
        num_tiles = _num_tiles(row_offsets_ptr, num_rows, GROUP, BLOCK_M, BLOCK_S)
        for tile in range(first_tile + place, num_tiles, num_started):
            row, first_token, first_pair, num_pairs = _pairs_of_tile(
                tile, row_offsets_ptr, num_rows, GROUP, BLOCK_M, BLOCK_S
            )
            attend_tile(
                tile, row, first_token, first_pair, num_pairs, kv_head, split,
                q_ptr, key_ptr, value_ptr, page_table_ptr, row_table_ptr, kv_limit_ptr,
                out_ptr, part_ptr, log_sum_ptr, finished_ptr,
                q_stride_t, q_stride_h, page_table_stride_m, page_table_stride_p,
                num_tokens, scale_log2, NUM_KV_HEADS, GROUP, HEAD_DIM, PAGE_SIZE,
                NUM_SPLITS, LEAST_SPLIT, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
    else:
        # The last tiles first: rows of a prompt stand last and in order, and the longest should
        # not be the last to start.
        tile = num_started - 1 - place
        row, first_token, first_pair, num_pairs = _pairs_of_tile(
            tile, row_offsets_ptr, num_rows, GROUP, BLOCK_M, BLOCK_S
        )
        if first_pair >= num_pairs:
            return
        attend_tile(
            tile, row, first_token, first_pair, num_pairs, kv_head, split,
            q_ptr, key_ptr, value_ptr, page_table_ptr, row_table_ptr, kv_limit_ptr,
            out_ptr, part_ptr, log_sum_ptr, finished_ptr,
            q_stride_t, q_stride_h, page_table_stride_m, page_table_stride_p,
            num_tokens, scale_log2, NUM_KV_HEADS, GROUP, HEAD_DIM, PAGE_SIZE,
            NUM_SPLITS, LEAST_SPLIT, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip


@triton.jit
def _pairs_of_tile(
    tile, row_offsets_ptr, num_rows,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The last row whose first tile is not past ``tile``, by counting; its first token, the first
    of its pairs that is the tile's, and how many it has: perhaps no more than stand before that.
    """
    num_started = 0
    for first_row in range(0, num_rows, BLOCK_S):
        row_S = first_row + tl.arange(0, BLOCK_S)
        is_row_S = row_S < num_rows
        token_S = tl.load(row_offsets_ptr + row_S, mask=is_row_S, other=0).to(tl.int32)
        is_started_S = is_row_S & (_first_tile(token_S, row_S, GROUP, BLOCK_M) <= tile)
        num_started += tl.sum(is_started_S.to(tl.int32), 0)
    row = num_started - 1
    first_token = tl.load(row_offsets_ptr + row).to(tl.int32)
    num_pairs = (tl.load(row_offsets_ptr + row + 1).to(tl.int32) - first_token) * GROUP
    first_pair = (tile - _first_tile(first_token, row, GROUP, BLOCK_M)) * BLOCK_M
    return row, first_token, first_pair, num_pairs


@triton.jit
def _num_tiles(
    row_offsets_ptr, num_rows,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """No tile from this number on has pairs."""
    end = tl.load(row_offsets_ptr + num_rows).to(tl.int32)
    num_busy = 0
    for first_row in range(0, num_rows, BLOCK_S):
        row_S = first_row + tl.arange(0, BLOCK_S)
        is_row_S = row_S < num_rows
        token_S = tl.load(row_offsets_ptr + row_S, mask=is_row_S, other=0).to(tl.int32)
        num_busy += tl.sum((is_row_S & (token_S < end)).to(tl.int32), 0)
    return _first_tile(end, num_busy, GROUP, BLOCK_M)


@triton.jit
def _first_tile(first_token, row, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Number of a row's first tile, such that each row has room for its own.

    No prefix sum is needed: ``floor(a / M)`` tiles hold all earlier pairs but less than a tile of
    them, and one more tile per row makes up for every row's last, broken one. (vLLM's unified
    attention kernel, Apache-2.0, numbers its query blocks so and searches by bisection.)
    """
    return first_token * GROUP // BLOCK_M + row
