"""How much attention each masked token of a block receives in one layer (FOCUS, arXiv 2601.23278).

N decoding blocks of B positions, T tokens of the step in S >= N rows, of which row n holds the
processed tokens of block n; H query heads, K KV heads, G = H / K, d head size, n masked tokens of a
block. Only the masked tokens take part, as queries and as keys.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from focus_ray.kernels.launch import can_launch


def importance(
    q_THd: Tensor,
    k_TKd: Tensor,
    row_offsets_S1: Tensor,
    processed_NB: Tensor,
    masked_NB: Tensor,
    target_N: Tensor | None = None,
) -> Tensor:
    """Attention mass per masked token, summed over query heads and masked queries.

    Scores ``q . k / sqrt(d)`` in float32, each replaced by the largest of itself and its two
    neighbours in the list of masked tokens (not of block positions), then a softmax over the n
    masked keys, then the sum.

    Args:
        q_THd: ``[T, H, d]`` after q-norm and rotary, any float dtype, unit stride along d.
        k_TKd: ``[T, K, d]`` after k-norm and rotary, same dtype; H is a multiple of K.
        row_offsets_S1: int32, row ``s`` is tokens ``[offsets[s], offsets[s + 1])``; the first N
            rows are the blocks, further rows are not looked at.
        processed_NB: bool, the positions of each block that are among the T tokens, whose order
            they are in.
        masked_NB: bool, a subset of ``processed_NB``.
        target_N: int64; a block with no more masked tokens than its target cannot evict, and is not
            looked at: its importances are 0. None: all blocks are.

    Returns:
        ``[N, B]`` float32, 0 where not masked; a block's sum is ``H * n``. Not rounded to the
        model's dtype, which ``retain`` does.

    Raises:
        ValueError: shapes or dtypes do not fit together, or there are gaps inside a head.
    """
    num_tokens, num_heads, head_dim = q_THd.shape
    num_kv_heads = k_TKd.shape[1]
    if k_TKd.shape != (num_tokens, num_kv_heads, head_dim) or num_heads % num_kv_heads:
        raise ValueError(
            f"q {tuple(q_THd.shape)} and k {tuple(k_TKd.shape)} must have the same tokens and "
            "head size, and q a multiple of k's heads"
        )
    if q_THd.dtype != k_TKd.dtype or q_THd.stride(2) != 1 or k_TKd.stride(2) != 1:
        raise ValueError(
            "q and k must be of one dtype and without gaps inside a head, got "
            f"{q_THd.dtype} and {k_TKd.dtype}, strides {q_THd.stride()} and {k_TKd.stride()}"
        )
    if masked_NB.ndim != 2 or not masked_NB.dtype == processed_NB.dtype == torch.bool:
        raise ValueError(
            f"processed and masked must be bool [N, B], got {processed_NB.dtype} "
            f"{tuple(processed_NB.shape)}, {masked_NB.dtype} {tuple(masked_NB.shape)}"
        )
    if processed_NB.shape != masked_NB.shape or len(row_offsets_S1) <= len(masked_NB):
        raise ValueError(
            f"processed {tuple(processed_NB.shape)} must be as masked {tuple(masked_NB.shape)}, "
            f"and one more row offset than blocks is needed, got {len(row_offsets_S1)}"
        )
    if target_N is not None and (len(target_N) != len(masked_NB) or target_N.dtype != torch.int64):
        raise ValueError(
            f"target_N must be int64 [{len(masked_NB)}], got {target_N.dtype} "
            f"{tuple(target_N.shape)}"
        )
    given = (q_THd, k_TKd, row_offsets_S1, processed_NB, masked_NB)
    if not can_launch(*given, *([] if target_N is None else [target_N])):
        return importance_reference(*given, target_N)
    num_rows, block_length = masked_NB.shape
    received_NB = torch.empty(masked_NB.shape, dtype=torch.float32, device=q_THd.device)
    if received_NB.numel() == 0:
        return received_NB
    block = max(32, triton.next_power_of_2(block_length))
    partial_NKB = received_NB.new_empty(num_rows, num_kv_heads, block)
    finished_N = torch.zeros(num_rows, dtype=torch.int32, device=q_THd.device)
    _importance_kernel[(num_rows, num_kv_heads)](
        q_THd,
        k_TKd,
        row_offsets_S1.contiguous(),
        processed_NB.contiguous(),
        masked_NB.contiguous(),
        None if target_N is None else target_N.contiguous(),
        partial_NKB,
        finished_N,
        received_NB,
        q_THd.stride(0),
        q_THd.stride(1),
        k_TKd.stride(0),
        k_TKd.stride(1),
        block_length,
        head_dim,
        head_dim**-0.5 * math.log2(math.e),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=num_heads // num_kv_heads,
        BLOCK=block,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        QUERIES=64,
        num_warps=4,
        num_stages=1,  # a program has one or two tiles of queries: room for more programs is better
    )
    return received_NB


def importance_reference(
    q_THd: Tensor,
    k_TKd: Tensor,
    row_offsets_S1: Tensor,
    processed_NB: Tensor,
    masked_NB: Tensor,
    target_N: Tensor | None = None,
) -> Tensor:
    """The definition."""
    num_tokens, num_heads, head_dim = q_THd.shape
    num_rows, block_length = masked_NB.shape
    if target_N is not None:
        masked_NB = masked_NB & (masked_NB.sum(1) > target_N)[:, None]
    if num_tokens == 0 or num_rows == 0:
        return torch.zeros(masked_NB.shape, device=q_THd.device)
    # masked tokens first, in order of position: neighbours are those of the list, not of the block
    order_NB = (~masked_NB).int().argsort(dim=1, stable=True)
    listed_NB = masked_NB.gather(1, order_NB)
    token_NB = row_offsets_S1[:num_rows, None] + processed_NB.cumsum(1) - 1
    token_NB = torch.where(listed_NB, token_NB.gather(1, order_NB), 0)
    q_NBKGd = q_THd[token_NB].float().unflatten(2, (k_TKd.shape[1], -1))
    score = torch.einsum("nikgd,njkd->nkgij", q_NBKGd, k_TKd[token_NB].float()) * head_dim**-0.5
    score = score.masked_fill(~listed_NB[:, None, None, None, :], -torch.inf)
    pooled = F.max_pool1d(score.flatten(1, 3), kernel_size=3, stride=1, padding=1)
    pooled_NHBB = pooled.view(num_rows, num_heads, block_length, block_length)
    pooled_NHBB = pooled_NHBB.masked_fill(~listed_NB[:, None, None, :], -torch.inf)
    weight_NHBB = pooled_NHBB.softmax(-1).masked_fill(~listed_NB[:, None, :, None], 0.0)
    received_NB = weight_NHBB.sum((1, 2))
    return torch.zeros_like(received_NB).scatter_(1, order_NB, received_NB) * masked_NB


@triton.jit
def _importance_kernel(
    q_ptr,
    k_ptr,
    row_offsets_ptr,
    processed_ptr,
    masked_ptr,
    target_ptr,
    partial_ptr,
    finished_ptr,
    received_ptr,
    q_stride_t,
    q_stride_h,
    k_stride_t,
    k_stride_h,
    block_length,
    head_dim,
    scale,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr,
):
    # One program owns one KV head of one block: what its masked keys receive from the queries of
    # the head's group. The last program of a block to finish adds up the heads, in their order;
    # where nobody is looked at, that of the first head writes.
    n = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    partial_ptr += n * NUM_KV_HEADS * BLOCK

    position = tl.arange(0, BLOCK)
    inside = position < block_length
    flag = n * block_length + position
    processed = tl.load(processed_ptr + flag, mask=inside, other=0).to(tl.int32)
    masked = tl.load(masked_ptr + flag, mask=inside, other=0).to(tl.int32)
    num_masked = tl.sum(masked, 0)
    least = 0
    if target_ptr is not None:
        least = tl.load(target_ptr + n)
    if num_masked <= least:
        if kv_head == 0:
            tl.store(received_ptr + flag, tl.zeros((BLOCK,), tl.float32), mask=inside)
        return
    # place in the list of masked tokens, of each position; token of each place, counted in the row
    place = tl.where(masked != 0, tl.cumsum(masked, 0) - 1, -1)
    token = tl.cumsum(processed, 0) - 1
    listed = tl.sum(tl.where(position[:, None] == place[None, :], token[None, :], 0), 1)

    first = tl.load(row_offsets_ptr + n).to(tl.int64)
    q_ptr += first * q_stride_t + kv_head * GROUP * q_stride_h
    k_ptr += first * k_stride_t + kv_head * k_stride_h
    # Keys in pairs of places: the larger of an even and an odd score is in the pooled scores
    # of both, and each lacks but its other neighbour. At the ends of the list a place stands
    # in for its missing neighbour.
    even = 2 * tl.arange(0, BLOCK // 2)
    last = num_masked - 1
    even_key = _load_keys(k_ptr, listed, even, last, k_stride_t, head_dim, BLOCK_D)
    odd_key = _load_keys(k_ptr, listed, even + 1, last, k_stride_t, head_dim, BLOCK_D)
    left_key = _load_keys(k_ptr, listed, even - 1, last, k_stride_t, head_dim, BLOCK_D)
    right_key = _load_keys(k_ptr, listed, even + 2, last, k_stride_t, head_dim, BLOCK_D)

    d = tl.arange(0, BLOCK_D)
    num_queries = num_masked * GROUP
    even_received = tl.zeros((QUERIES, BLOCK // 2), tl.float32)
    odd_received = tl.zeros((QUERIES, BLOCK // 2), tl.float32)
    for start in range(0, num_queries, QUERIES):
        query = start + tl.arange(0, QUERIES)
        exists = query < num_queries
        query_token = tl.gather(listed, tl.minimum(query // GROUP, last), 0)
        offset = query_token * q_stride_t + query % GROUP * q_stride_h
        inside_head = exists[:, None] & (d < head_dim)[None, :]
        q = tl.load(q_ptr + offset[:, None] + d[None, :], mask=inside_head, other=0.0)

        even_score = _dot(q, even_key)
        odd_score = _dot(q, odd_key)
        larger = _larger(even_score, odd_score)
        even_score = _larger(larger, _dot(q, left_key)) * scale
        odd_score = _larger(larger, _dot(q, right_key)) * scale
        even_score = tl.where((even <= last)[None, :], even_score, float("-inf"))
        odd_score = tl.where((even < last)[None, :], odd_score, float("-inf"))
        top = tl.max(_larger(even_score, odd_score), 1)[:, None]
        even_weight = tl.exp2(even_score - top)
        odd_weight = tl.exp2(odd_score - top)
        norm = tl.where(exists, 1.0 / tl.sum(even_weight + odd_weight, 1), 0.0)[:, None]
        even_received += even_weight * norm
        odd_received += odd_weight * norm
    head_ptr = partial_ptr + kv_head * BLOCK
    tl.store(head_ptr + even, tl.sum(even_received, 0))
    tl.store(head_ptr + even + 1, tl.sum(odd_received, 0))

    tl.debug_barrier()  # all threads have stored before one of them counts the program as finished
    if tl.atomic_add(finished_ptr + n, 1, sem="acq_rel") == NUM_KV_HEADS - 1:
        received = tl.zeros((BLOCK,), tl.float32)
        for head in range(NUM_KV_HEADS):
            received += tl.load(partial_ptr + head * BLOCK + place, mask=place >= 0, other=0.0)
        tl.store(received_ptr + flag, received, mask=inside)


@triton.jit
def _load_keys(k_ptr, listed, place, last, stride_t, head_dim, BLOCK_D: tl.constexpr):
    """Keys at places of the list, ``[BLOCK_D, places]``; places outside are moved to its ends."""
    token = tl.gather(listed, tl.minimum(tl.maximum(place, 0), last), 0)
    d = tl.arange(0, BLOCK_D)
    key = tl.load(
        k_ptr + token[:, None] * stride_t + d[None, :], mask=(d < head_dim)[None, :], other=0.0
    )
    return tl.trans(key)


@triton.jit
def _dot(q, key):
    # float32 heads as sums of three products of tensor cores, which lose no more than float32 does
    return tl.dot(q, key, input_precision="tf32x3")


@triton.jit
def _larger(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
