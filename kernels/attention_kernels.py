"""Triton kernels behind ``paged_attention``.

The query heads that share a KV head are rows of one tile: pair ``i`` of a row is head ``i % G`` of
its token ``i // G``. Keys and values are then read once for the whole group, and a handful of
tokens already fills the tile of a tensor core. The softmax is taken while the positions pass by,
with a running maximum (FlashAttention, arXiv 2205.14135); to share a tile's positions among
programs, each leaves its part and its sum, and a second kernel adds them (Flash-Decoding).

What is launched depends on sizes that the host knows, so that it can be recorded; how much of it
has work is found on the device. Programs beyond a tile's need of splits leave at once.

T query tokens in S rows, H query heads, K KV heads, G = H / K, d head size, D = d padded to a power
of two; of one tile M (token, head) pairs and N KV positions; X splits.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from focus_ray.kernels.tuning import MIN_POSITIONS_PER_SPLIT, AttentionPlan

ROWS_PER_SEARCH = (512, 2048)
"""Row offsets looked at together: one wait for all of them, if there are no more."""


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

    Row s takes ``ceil(n_s * G / M)`` tiles. The host starts programs for as many as ``busy_rows``
    rows could take; where there are more tiles, a program takes every so many of them.
    """
    num_tokens, num_heads, head_dim = q_THd.shape
    _, page_size, num_kv_heads, _ = key_pages.shape
    num_rows = min(len(row_table_S), num_tokens)  # rows behind these are empty
    group = num_heads // num_kv_heads
    block_d = max(16, triton.next_power_of_2(head_dim))
    tile, num_splits = plan.tile, plan.num_splits

    out_THd = q_THd.new_empty(q_THd.shape)
    part_XTHd, log_sum_XTH, num_parts_TH = out_THd, out_THd, row_table_S  # not touched unsplit
    if num_splits > 1:
        part_XTHd = q_THd.new_empty((num_splits, *q_THd.shape), dtype=torch.float32)
        log_sum_XTH = part_XTHd.new_empty((num_splits, num_tokens, num_heads))
        num_parts_TH = log_sum_XTH.new_empty((num_tokens, num_heads), dtype=torch.int32)
    num_tiles = num_tokens * group // tile.block_m + min(num_rows, busy_rows)
    _attend_kernel[(num_tiles * num_kv_heads, num_splits)](
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
        num_parts_TH,
        q_THd.stride(0),
        q_THd.stride(1),
        page_table_MP.stride(0),
        page_table_MP.stride(1),
        num_tokens,
        num_rows,
        scale * math.log2(math.e),  # so that the softmax is one of powers of two
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        PAGE_SIZE=page_size,
        NUM_SPLITS=num_splits,
        LEAST_SPLIT=MIN_POSITIONS_PER_SPLIT,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_D=block_d,
        BLOCK_S=next((b for b in ROWS_PER_SEARCH if b >= num_rows), ROWS_PER_SEARCH[-1]),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if num_splits > 1:
        _add_splits_kernel[(num_tokens * num_heads,)](
            part_XTHd,
            log_sum_XTH,
            num_parts_TH,
            out_THd,
            num_tokens * num_heads,
            NUM_SPLITS=num_splits,
            HEAD_DIM=head_dim,
            BLOCK_D=block_d,
            num_warps=2,
        )
    return out_THd


# Sizes that change from step to step; specialised, they would be compiled for again and again.
@triton.jit(do_not_specialize=["num_tokens", "num_rows", "page_table_stride_m"])
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
    num_parts_ptr,
    q_stride_t,
    q_stride_h,
    page_table_stride_m,
    page_table_stride_p,
    num_tokens,
    num_rows,
    scale_log2,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    LEAST_SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    # A program owns one tile of a row, one KV head, and one split of the tile's positions; and more
    # tiles, far apart, where more rows are busy than the host thought. The KV heads of a tile, then
    # the tiles of a row, are neighbours: they read the same pages at once.
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    tiles_at_once = tl.num_programs(0) // NUM_KV_HEADS
    # The last tiles first: rows of a prompt stand last and in order, and the longest should not
    # be the last to start.
    own_tile = tiles_at_once - 1 - tl.program_id(0) // NUM_KV_HEADS
    end = tl.load(row_offsets_ptr + num_rows).to(tl.int32)
    row, num_busy = _row_of_tile(own_tile, end, row_offsets_ptr, num_rows, GROUP, BLOCK_M, BLOCK_S)
    num_tiles = _first_tile(end, num_busy, GROUP, BLOCK_M)
    for tile in range(own_tile, num_tiles, tiles_at_once):
        if tile > own_tile:
            row, _ = _row_of_tile(tile, end, row_offsets_ptr, num_rows, GROUP, BLOCK_M, BLOCK_S)
        _attend_tile(
            tile, row, kv_head, q_ptr, key_ptr, value_ptr, page_table_ptr, row_table_ptr,
            row_offsets_ptr, kv_limit_ptr, out_ptr, part_ptr, log_sum_ptr, num_parts_ptr,
            q_stride_t, q_stride_h, page_table_stride_m, page_table_stride_p, num_tokens,
            scale_log2, NUM_KV_HEADS, GROUP, HEAD_DIM, PAGE_SIZE, NUM_SPLITS, LEAST_SPLIT,
            BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip


@triton.jit
def _attend_tile(
    tile, row, kv_head, q_ptr, key_ptr, value_ptr, page_table_ptr, row_table_ptr,
    row_offsets_ptr, kv_limit_ptr, out_ptr, part_ptr, log_sum_ptr, num_parts_ptr,
    q_stride_t, q_stride_h, page_table_stride_m, page_table_stride_p, num_tokens,
    scale_log2, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr, NUM_SPLITS: tl.constexpr, LEAST_SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One split of one tile; a tile of no pairs passes through without a load or a store."""
    first_token = tl.load(row_offsets_ptr + row).to(tl.int32)
    num_pairs = (tl.load(row_offsets_ptr + row + 1).to(tl.int32) - first_token) * GROUP
    first_pair = (tile - _first_tile(first_token, row, GROUP, BLOCK_M)) * BLOCK_M
    pair_M = first_pair + tl.arange(0, BLOCK_M)
    is_pair_M = pair_M < num_pairs
    token_M = first_token + pair_M // GROUP
    head_M = kv_head * GROUP + pair_M % GROUP
    limit_M = tl.load(kv_limit_ptr + token_M, mask=is_pair_M, other=0).to(tl.int32)
    first = 0
    last = tl.max(limit_M, 0)
    seen_by_all = tl.min(tl.where(is_pair_M, limit_M, last), 0)
    split = tl.program_id(1)
    num_parts = 1
    if NUM_SPLITS > 1:
        # Shares of what this tile sees, whatever the longest of the batch, none too short to pay.
        share = tl.cdiv(tl.cdiv(last, BLOCK_N), NUM_SPLITS) * BLOCK_N
        share = tl.maximum(share, LEAST_SPLIT)
        num_parts = tl.cdiv(last, share)
        first = tl.minimum(split * share, last)
        last = tl.minimum(last, first + share)

    column_D = tl.arange(0, BLOCK_D)
    is_element_MD = is_pair_M[:, None] & (column_D < HEAD_DIM)[None, :]
    q_place_M = token_M.to(tl.int64) * q_stride_t + head_M.to(tl.int64) * q_stride_h
    q_MD = tl.load(q_ptr + q_place_M[:, None] + column_D[None, :], mask=is_element_MD, other=0.0)
    page_table_ptr += tl.load(row_table_ptr + row).to(tl.int64) * page_table_stride_m
    key_ptr += kv_head * HEAD_DIM
    value_ptr += kv_head * HEAD_DIM

    sum_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    highest_M = tl.full([BLOCK_M], -float("inf"), tl.float32)
    weight_M = tl.zeros([BLOCK_M], tl.float32)
    # Positions that every token sees need no masks. For most tiles that is all but the last few.
    masked_from = tl.minimum(tl.maximum(seen_by_all // BLOCK_N * BLOCK_N, first), last)
    sum_MD, highest_M, weight_M = _attend_positions(
        sum_MD, highest_M, weight_M, q_MD, key_ptr, value_ptr, page_table_ptr, page_table_stride_p,
        first, masked_from, limit_M, scale_log2,
        NUM_KV_HEADS * HEAD_DIM, HEAD_DIM, PAGE_SIZE, BLOCK_N, BLOCK_D, MASKED=False,
    )  # fmt: skip
    sum_MD, highest_M, weight_M = _attend_positions(
        sum_MD, highest_M, weight_M, q_MD, key_ptr, value_ptr, page_table_ptr, page_table_stride_p,
        masked_from, last, limit_M, scale_log2,
        NUM_KV_HEADS * HEAD_DIM, HEAD_DIM, PAGE_SIZE, BLOCK_N, BLOCK_D, MASKED=True,
    )  # fmt: skip

    # A pair without weight is padding, or sees nothing of this split.
    divisor_M = tl.where(weight_M == 0, 1.0, weight_M)
    out_MD = sum_MD / divisor_M[:, None]
    place_M = token_M.to(tl.int64) * (NUM_KV_HEADS * GROUP) + head_M
    # The first split writes the result itself where it is the only one with work.
    out_ptrs = out_ptr + place_M[:, None] * HEAD_DIM + column_D[None, :]
    is_whole_MD = is_element_MD & (num_parts == 1) & (split == 0)
    tl.store(out_ptrs, out_MD.to(out_ptr.dtype.element_ty), mask=is_whole_MD)
    if NUM_SPLITS > 1:
        tl.store(num_parts_ptr + place_M, num_parts, mask=is_pair_M & (split == 0))
        is_part_M = is_pair_M & (num_parts > 1) & (split < num_parts)
        part_M = split.to(tl.int64) * num_tokens * (NUM_KV_HEADS * GROUP) + place_M
        part_ptrs = part_ptr + part_M[:, None] * HEAD_DIM + column_D[None, :]
        tl.store(part_ptrs, out_MD, mask=is_part_M[:, None] & (column_D < HEAD_DIM)[None, :])
        tl.store(log_sum_ptr + part_M, highest_M + tl.log2(divisor_M), mask=is_part_M)


@triton.jit
def _row_of_tile(
    tile, end, row_offsets_ptr, num_rows,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The last row whose first tile is not past ``tile``, and how many are not empty; counted."""
    num_started = 0
    num_busy = 0
    for first_row in range(0, num_rows, BLOCK_S):
        row_S = first_row + tl.arange(0, BLOCK_S)
        is_row_S = row_S < num_rows
        token_S = tl.load(row_offsets_ptr + row_S, mask=is_row_S, other=0).to(tl.int32)
        is_started_S = is_row_S & (_first_tile(token_S, row_S, GROUP, BLOCK_M) <= tile)
        num_started += tl.sum(is_started_S.to(tl.int32), 0)
        num_busy += tl.sum((is_row_S & (token_S < end)).to(tl.int32), 0)
    return num_started - 1, num_busy


@triton.jit
def _first_tile(first_token, row, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Number of a row's first tile, such that each row has room for its own.

    No prefix sum is needed: ``floor(a / M)`` tiles hold all earlier pairs but less than a tile of
    them, and one more tile per row makes up for every row's last, broken one. (vLLM's unified
    attention kernel, Apache-2.0, numbers its query blocks so and searches by bisection.)
    """
    return first_token * GROUP // BLOCK_M + row


@triton.jit
def _attend_positions(
    sum_MD,
    highest_M,
    weight_M,
    q_MD,
    key_ptr,
    value_ptr,
    page_table_ptr,
    page_table_stride_p,
    first,
    last,
    limit_M,
    scale_log2,
    SLOT_STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add positions ``[first, last)``, seen by all tokens unless ``MASKED``, to the running sums.

    ``sum_MD`` and ``weight_M`` are relative to ``2 ** highest_M``.
    """
    column_D = tl.arange(0, BLOCK_D)
    # Carried from pass to pass: page numbers that the same pass loaded would have Triton's
    # pipeliner copy them to shared memory and keep only one tile of keys and values in flight.
    slot_N = _slots(page_table_ptr, page_table_stride_p, first, last, PAGE_SIZE, BLOCK_N)
    for start in range(first, last, BLOCK_N):
        position_N = start + tl.arange(0, BLOCK_N)
        place_ND = slot_N.to(tl.int64)[:, None] * SLOT_STRIDE + column_D[None, :]
        if HEAD_DIM == BLOCK_D:
            key_ND = tl.load(key_ptr + place_ND)
        else:
            key_ND = tl.load(key_ptr + place_ND, mask=(column_D < HEAD_DIM)[None, :], other=0.0)
        score_MN = tl.dot(q_MD, key_ND.T, input_precision="ieee")
        if MASKED:
            is_seen_MN = position_N[None, :] < limit_M[:, None]
            score_MN = tl.where(is_seen_MN, score_MN, -float("inf"))
        new_highest_M = tl.maximum(highest_M, tl.max(score_MN, 1) * scale_log2)
        base_M = new_highest_M
        if MASKED:  # a pair that has seen nothing yet: powers of -inf, not of -inf - -inf
            base_M = tl.where(new_highest_M == -float("inf"), 0.0, new_highest_M)
        weight_MN = tl.exp2(score_MN * scale_log2 - base_M[:, None])
        shrink_M = tl.exp2(highest_M - base_M)
        highest_M = new_highest_M
        weight_M = weight_M * shrink_M + tl.sum(weight_MN, 1)
        if MASKED:  # weight 0 does not silence a NaN
            is_value_ND = (position_N < last)[:, None] & (column_D < HEAD_DIM)[None, :]
            value_ND = tl.load(value_ptr + place_ND, mask=is_value_ND, other=0.0)
        elif HEAD_DIM == BLOCK_D:
            value_ND = tl.load(value_ptr + place_ND)
        else:
            value_ND = tl.load(value_ptr + place_ND, mask=(column_D < HEAD_DIM)[None, :], other=0.0)
        sum_MD = tl.dot(
            weight_MN.to(value_ND.dtype),
            value_ND,
            sum_MD * shrink_M[:, None],
            input_precision="ieee",
        )
        slot_N = _slots(
            page_table_ptr, page_table_stride_p, start + BLOCK_N, last, PAGE_SIZE, BLOCK_N
        )
    return sum_MD, highest_M, weight_M


@triton.jit
def _slots(
    page_table_ptr, page_table_stride_p, start, last,
    PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Slots of positions ``start`` to ``start + BLOCK_N``; some valid slot from ``last`` on.

    A page number is one scalar load where a tile covers few whole pages, or part of one. Very
    small pages, and sizes that are no power of two, take a load per position.
    """
    offset_N = tl.arange(0, BLOCK_N)
    if PAGE_SIZE % BLOCK_N == 0:
        page_ptr = page_table_ptr + start // PAGE_SIZE * page_table_stride_p
        page = tl.load(page_ptr, mask=start < last, other=0).to(tl.int32)
        slot_N = page * PAGE_SIZE + start % PAGE_SIZE + offset_N
    elif BLOCK_N % PAGE_SIZE == 0 and BLOCK_N <= 8 * PAGE_SIZE:
        slot_N = offset_N % PAGE_SIZE
        for i in tl.static_range(BLOCK_N // PAGE_SIZE):
            page_start = start + i * PAGE_SIZE
            page_ptr = page_table_ptr + page_start // PAGE_SIZE * page_table_stride_p
            page = tl.load(page_ptr, mask=page_start < last, other=0).to(tl.int32)
            slot_N += tl.where(offset_N // PAGE_SIZE == i, page * PAGE_SIZE, 0)
    else:
        position_N = start + offset_N
        page_ptr_N = page_table_ptr + position_N // PAGE_SIZE * page_table_stride_p
        page_N = tl.load(page_ptr_N, mask=position_N < last, other=0).to(tl.int32)
        slot_N = page_N * PAGE_SIZE + position_N % PAGE_SIZE
    return slot_N


@triton.jit(do_not_specialize=["num_pairs"])
def _add_splits_kernel(
    part_ptr,
    log_sum_ptr,
    num_parts_ptr,
    out_ptr,
    num_pairs,
    NUM_SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # A program owns one query head of one token. It has nothing to add where there is one part;
    # what it finds at tokens of no row is as it was allocated.
    pair = tl.program_id(0).to(tl.int64)
    num_parts = tl.load(num_parts_ptr + pair)
    if num_parts > 1:
        column_D = tl.arange(0, BLOCK_D)
        split_X = tl.arange(0, NUM_SPLITS)
        place_X = split_X.to(tl.int64) * num_pairs + pair
        is_part_X = split_X < num_parts
        log_sum_X = tl.load(log_sum_ptr + place_X, mask=is_part_X, other=-float("inf"))
        weight_X = tl.exp2(log_sum_X - tl.max(log_sum_X, 0))
        part_XD = tl.load(
            part_ptr + place_X[:, None] * HEAD_DIM + column_D[None, :],
            mask=is_part_X[:, None] & (column_D < HEAD_DIM)[None, :],
            other=0.0,
        )
        out_D = tl.sum(part_XD * weight_X[:, None], 0) / tl.sum(weight_X, 0)
        tl.store(
            out_ptr + pair * HEAD_DIM + column_D,
            out_D.to(out_ptr.dtype.element_ty),
            mask=column_D < HEAD_DIM,
        )
