"""Attention of one tile of (token, query head) pairs over one range of its row's KV positions.

The query heads that share a KV head are rows of one tile: pair ``i`` of a row is head ``i % G`` of
its token ``i // G``. Keys and values are then read once for the whole group, and a handful of
tokens already fills the tile of a tensor core. The softmax is taken while the positions pass by,
with a running maximum (FlashAttention, arXiv 2205.14135).

H query heads, K KV heads, G = H / K, d head size, D = d padded to a power of two; of one tile
M pairs and N KV positions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from focus_ray.kernels.attention_splits import add_to_others


@triton.jit
def attend_tile(
    tile, row, first_token, first_pair, num_pairs, kv_head, split,
    q_ptr, key_ptr, value_ptr, page_table_ptr, row_table_ptr, kv_limit_ptr,
    out_ptr, part_ptr, log_sum_ptr, finished_ptr,
    q_stride_t, q_stride_h, page_table_stride_m, page_table_stride_p, num_tokens, scale_log2,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr, NUM_SPLITS: tl.constexpr, LEAST_SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One KV head and one split of a tile; without pairs it reads and writes nothing."""
    pair_M = first_pair + tl.arange(0, BLOCK_M)
    is_pair_M = pair_M < num_pairs
    token_M = first_token + pair_M // GROUP
    head_M = kv_head * GROUP + pair_M % GROUP
    limit_M = tl.load(kv_limit_ptr + token_M, mask=is_pair_M, other=0).to(tl.int32)
    first = 0
    last = tl.max(limit_M, 0)
    seen_by_all = tl.min(tl.where(is_pair_M, limit_M, last), 0)
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
    if NUM_SPLITS > 1:  # noqa: SIM102 - known to the compiler, unlike the other
        if (num_parts > 1) & (split < num_parts):
            # Split by split and KV head by KV head, the pairs of all tokens.
            first_part = (
                kv_head.to(tl.int64) * num_tokens * GROUP + first_token * GROUP + first_pair
            )
            add_to_others(
                out_MD, highest_M + tl.log2(divisor_M), split, num_parts,
                num_tokens * (NUM_KV_HEADS * GROUP), place_M, is_pair_M,
                out_ptr, part_ptr + first_part * HEAD_DIM, log_sum_ptr + first_part,
                finished_ptr + tile * NUM_KV_HEADS + kv_head, HEAD_DIM, BLOCK_M, BLOCK_D,
            )  # fmt: skip


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
