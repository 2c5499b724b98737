"""The norm of each query and key head and its rotary position embedding, in one launch.

T tokens, H query heads, K KV heads, d head size, r <= d rotated dimensions, r2 = r / 2,
P positions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from focus_ray.kernels.launch import can_launch
from focus_ray.kernels.rms_norm import rms_norm_reference
from focus_ray.kernels.rotary import rotate

HEADS_PER_PROGRAM = 8
NUM_WARPS = 2


def norm_rotary(
    q_THd: Tensor,
    k_TKd: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    table_P2r2: Tensor,
    positions_T: Tensor,
) -> tuple[Tensor, Tensor]:
    """RMS norm of every head, then rotation of its first r dimensions by its token's angles.

    The normed head is rounded to the dtype, and so are the two products of a rotation before they
    are added: what the two operations give one after the other.

    Args:
        q_THd: ``[T, H, d]``, any float dtype, unit stride along d.
        k_TKd: ``[T, K, d]``, likewise, same dtype.
        q_weight, k_weight: ``[d]``, weights of the norms, any float dtype.
        eps: added to the mean square.
        table_P2r2: ``[P, 2, r / 2]`` of ``rotary_table``, dtype of ``q_THd``, contiguous.
        positions_T: int64, in ``[0, P)``.

    Returns:
        The new queries and keys, contiguous.

    Raises:
        ValueError: shapes, dtypes or strides differ from the above, or r is above d.
    """
    _check(q_THd, k_TKd, q_weight, k_weight, table_P2r2, positions_T)
    if not can_launch(q_THd, k_TKd, q_weight, k_weight, table_P2r2, positions_T):
        return norm_rotary_reference(q_THd, k_TKd, q_weight, k_weight, eps, table_P2r2, positions_T)
    num_tokens, num_heads, head_dim = q_THd.shape
    num_kv_heads, half = k_TKd.shape[1], table_P2r2.shape[2]
    q_out_THd, k_out_TKd = q_THd.new_empty(q_THd.shape), k_TKd.new_empty(k_TKd.shape)
    tiles = triton.cdiv(num_heads, HEADS_PER_PROGRAM) + triton.cdiv(num_kv_heads, HEADS_PER_PROGRAM)
    if num_tokens:
        _norm_rotary_kernel[(num_tokens, tiles)](
            q_THd,
            k_TKd,
            q_weight,
            k_weight,
            table_P2r2,
            positions_T,
            q_out_THd,
            k_out_TKd,
            q_THd.stride(0),
            q_THd.stride(1),
            k_TKd.stride(0),
            k_TKd.stride(1),
            num_heads,
            num_kv_heads,
            eps,
            HEAD_DIM=head_dim,
            HALF=half,
            BLOCK_HALF=triton.next_power_of_2(half),
            BLOCK_REST=triton.next_power_of_2(head_dim - 2 * half),
            HEADS=HEADS_PER_PROGRAM,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,  # LLVM would turn rounded products into bfloat16's fused ones
        )
    return q_out_THd, k_out_TKd


def _check(
    q_THd: Tensor,
    k_TKd: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    table_P2r2: Tensor,
    positions_T: Tensor,
) -> None:
    num_tokens, _, head_dim = q_THd.shape
    if k_TKd.shape[0] != num_tokens or positions_T.shape != (num_tokens,):
        raise ValueError(
            f"q, k and positions must be of the same tokens, got {tuple(q_THd.shape)}, "
            f"{tuple(k_TKd.shape)}, {tuple(positions_T.shape)}"
        )
    if 2 * table_P2r2.shape[2] > head_dim or k_TKd.shape[2] != head_dim:
        raise ValueError(
            f"heads of q and k must be one size of at least {2 * table_P2r2.shape[2]} rotated "
            f"dimensions, got {head_dim} and {k_TKd.shape[2]}"
        )
    if not q_weight.shape == k_weight.shape == (head_dim,):
        raise ValueError(
            f"the norms' weights must be [{head_dim}] as the heads, got {tuple(q_weight.shape)} "
            f"and {tuple(k_weight.shape)}"
        )
    if not q_THd.dtype == k_TKd.dtype == table_P2r2.dtype:
        raise ValueError(
            f"q, k and the table must be one dtype, got {q_THd.dtype}, {k_TKd.dtype}, "
            f"{table_P2r2.dtype}"
        )
    if positions_T.dtype != torch.int64:
        raise ValueError(f"positions_T must be int64, got {positions_T.dtype}")
    if not q_THd.stride(2) == k_TKd.stride(2) == 1:
        raise ValueError(
            f"q and k must have unit stride along d, got {q_THd.stride(2)} and {k_TKd.stride(2)}; "
            "make them contiguous"
        )
    if not (table_P2r2.is_contiguous() and positions_T.is_contiguous()):
        raise ValueError("the table and the positions must be contiguous")


def norm_rotary_reference(
    q_THd: Tensor,
    k_TKd: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    table_P2r2: Tensor,
    positions_T: Tensor,
) -> tuple[Tensor, Tensor]:
    """The definition."""
    cos_sin_T2r2 = table_P2r2.index_select(0, positions_T)
    return (
        rotate(rms_norm_reference(q_THd, q_weight, eps), cos_sin_T2r2),
        rotate(rms_norm_reference(k_TKd, k_weight, eps), cos_sin_T2r2),
    )


@triton.jit
def _norm_rotary_kernel(
    q_ptr,
    k_ptr,
    q_weight_ptr,
    k_weight_ptr,
    table_ptr,
    positions_ptr,
    q_out_ptr,
    k_out_ptr,
    q_stride_t,
    q_stride_h,
    k_stride_t,
    k_stride_h,
    num_heads,
    num_kv_heads,
    eps,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    HEADS: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)  # one program per token and HEADS heads of q or of k
    tile = tl.program_id(1)
    cos_ptr = table_ptr + tl.load(positions_ptr + t) * (2 * HALF)
    q_tiles = tl.cdiv(num_heads, HEADS)
    if tile < q_tiles:
        norm_rotate_heads(
            q_ptr + t * q_stride_t,
            q_stride_h,
            q_weight_ptr,
            cos_ptr,
            q_out_ptr + t * num_heads * HEAD_DIM,
            None,
            tile * HEADS,
            num_heads,
            eps,
            HEAD_DIM,
            HALF,
            BLOCK_HALF,
            BLOCK_REST,
            HEADS,
        )
    else:
        norm_rotate_heads(
            k_ptr + t * k_stride_t,
            k_stride_h,
            k_weight_ptr,
            cos_ptr,
            k_out_ptr + t * num_kv_heads * HEAD_DIM,
            None,
            (tile - q_tiles) * HEADS,
            num_kv_heads,
            eps,
            HEAD_DIM,
            HALF,
            BLOCK_HALF,
            BLOCK_REST,
            HEADS,
        )


@triton.jit
def norm_rotate_heads(
    x_ptr,
    x_stride_h,
    weight_ptr,
    cos_ptr,
    out_ptr,
    copy_ptr,
    first_head,
    num_heads,
    eps,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    HEADS: tl.constexpr,
):
    """HEADS heads of one token, written to ``out_ptr`` and, unless it is None, to ``copy_ptr``.

    The partners of pairs are loaded apart, so that a thread holds both.
    """
    head = first_head + tl.arange(0, HEADS)[:, None]
    x_ptr += head * x_stride_h
    out_ptr += head * HEAD_DIM
    # Weights and angles are read once per head: loaded as one row they would have to pass through
    # shared memory to reach the threads that need them.
    pair = tl.broadcast_to(tl.arange(0, BLOCK_HALF)[None, :], (HEADS, BLOCK_HALF))
    inside = (head < num_heads) & (pair < HALF)
    first = tl.load(x_ptr + pair, mask=inside, other=0.0)
    second = tl.load(x_ptr + HALF + pair, mask=inside, other=0.0)
    first_weight = tl.load(weight_ptr + pair, mask=inside, other=0.0).to(tl.float32)
    second_weight = tl.load(weight_ptr + HALF + pair, mask=inside, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + pair, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(cos_ptr + HALF + pair, mask=inside, other=0.0).to(tl.float32)

    dtype = first.dtype
    first, second = first.to(tl.float32), second.to(tl.float32)
    square = tl.sum(first * first + second * second, axis=1, keep_dims=True)
    if HEAD_DIM > 2 * HALF:
        column = tl.broadcast_to(2 * HALF + tl.arange(0, BLOCK_REST)[None, :], (HEADS, BLOCK_REST))
        in_rest = (head < num_heads) & (column < HEAD_DIM)
        rest = tl.load(x_ptr + column, mask=in_rest, other=0.0).to(tl.float32)
        square += tl.sum(rest * rest, axis=1, keep_dims=True)
    inverse_rms = tl.rsqrt(square / HEAD_DIM + eps)
    first = (first * inverse_rms * first_weight).to(dtype).to(tl.float32)
    second = (second * inverse_rms * second_weight).to(dtype).to(tl.float32)
    turned_first = (first * cos).to(dtype).to(tl.float32) - (second * sin).to(dtype).to(tl.float32)
    turned_second = (second * cos).to(dtype).to(tl.float32) + (first * sin).to(dtype).to(tl.float32)
    tl.store(out_ptr + pair, turned_first.to(dtype), mask=inside)
    tl.store(out_ptr + HALF + pair, turned_second.to(dtype), mask=inside)
    if copy_ptr is not None:
        copy_ptr += head * HEAD_DIM
        tl.store(copy_ptr + pair, turned_first.to(dtype), mask=inside)
        tl.store(copy_ptr + HALF + pair, turned_second.to(dtype), mask=inside)
    if HEAD_DIM > 2 * HALF:
        rest_weight = tl.load(weight_ptr + column, mask=in_rest, other=0.0).to(tl.float32)
        rest = (rest * inverse_rms * rest_weight).to(dtype)
        tl.store(out_ptr + column, rest, mask=in_rest)
        if copy_ptr is not None:
            tl.store(copy_ptr + column, rest, mask=in_rest)
