"""From the projection of queries, keys and values to what attention reads, in one launch.

T tokens, H query heads, K KV heads, d head size, W = (H + 2 K) d, r <= d rotated dimensions,
r2 = r / 2, P positions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from focus_ray.kernels.fill_kv import fill_kv
from focus_ray.kernels.launch import can_launch
from focus_ray.kernels.norm_rotary import (
    HEADS_PER_PROGRAM,
    NUM_WARPS,
    norm_rotary,
    norm_rotate_heads,
)
from focus_ray.kernels.overlap import let_next_begin, overlap_options, wait_for_previous


def norm_rotary_fill(
    qkv_TW: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    table_P2r2: Tensor,
    positions_T: Tensor,
    slot_T: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    *,
    keep_keys: bool,
) -> tuple[Tensor, Tensor | None]:
    """``norm_rotary`` of queries and keys, and ``fill_kv`` of the new keys and the values.

    Args:
        qkv_TW: ``[T, W]``, dtype of the pages, unit stride along W: of each token its H query
            heads, K key heads and K value heads.
        q_weight, k_weight, eps, table_P2r2, positions_T: as in ``norm_rotary``.
        slot_T, key_pages, value_pages: as in ``fill_kv``; the pages are written in place.
        keep_keys: whether the keys are wanted outside the pages, too.

    Returns:
        Queries ``[T, H, d]`` and, where wanted, keys ``[T, K, d]``, normed and rotated; contiguous.

    Raises:
        ValueError: a shape, dtype or layout differs from the above.
    """
    _check(qkv_TW, q_weight, k_weight, table_P2r2, positions_T, slot_T, key_pages, value_pages)
    arguments = (q_weight, k_weight, table_P2r2, positions_T, slot_T, key_pages, value_pages)
    if not can_launch(qkv_TW, *arguments):
        q_THd, keys_TKd = norm_rotary_fill_reference(
            qkv_TW,
            q_weight,
            k_weight,
            eps,
            table_P2r2,
            positions_T,
            slot_T,
            key_pages,
            value_pages,
        )
        return q_THd, keys_TKd if keep_keys else None
    num_tokens = qkv_TW.shape[0]
    num_kv_heads, head_dim = key_pages.shape[2:]
    num_heads = qkv_TW.shape[1] // head_dim - 2 * num_kv_heads
    half = table_P2r2.shape[2]
    q_THd = qkv_TW.new_empty(num_tokens, num_heads, head_dim)
    k_TKd = qkv_TW.new_empty(num_tokens, num_kv_heads, head_dim) if keep_keys else None
    q_tiles, kv_tiles = (
        triton.cdiv(heads, HEADS_PER_PROGRAM) for heads in (num_heads, num_kv_heads)
    )
    if num_tokens:
        _norm_rotary_fill_kernel[(num_tokens, q_tiles + 2 * kv_tiles)](
            qkv_TW,
            q_weight,
            k_weight,
            table_P2r2,
            positions_T,
            slot_T,
            q_THd,
            k_TKd,
            key_pages,
            value_pages,
            qkv_TW.stride(0),
            eps,
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            HALF=half,
            BLOCK_HALF=triton.next_power_of_2(half),
            BLOCK_REST=triton.next_power_of_2(head_dim - 2 * half),
            BLOCK_HEAD=triton.next_power_of_2(head_dim),
            HEADS=HEADS_PER_PROGRAM,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,  # LLVM would turn rounded products into bfloat16's fused ones
            **overlap_options(qkv_TW.device),
        )
    return q_THd, k_TKd


def _check(
    qkv_TW: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    table_P2r2: Tensor,
    positions_T: Tensor,
    slot_T: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
) -> None:
    if key_pages.ndim != 4 or key_pages.shape != value_pages.shape:
        raise ValueError(
            "key and value pages must both be [num_pages, page_size, K, d], got "
            f"{tuple(key_pages.shape)} and {tuple(value_pages.shape)}"
        )
    if not (key_pages.is_contiguous() and value_pages.is_contiguous()):
        raise ValueError("key and value pages must be contiguous to be written in place")
    num_tokens = positions_T.shape[0]
    num_kv_heads, head_dim = key_pages.shape[2:]
    if qkv_TW.ndim != 2 or qkv_TW.shape[0] != num_tokens or slot_T.shape != (num_tokens,):
        raise ValueError(
            f"the projection must be [T, W] and positions and slots be of the same tokens, got "
            f"{tuple(qkv_TW.shape)}, {tuple(positions_T.shape)}, {tuple(slot_T.shape)}"
        )
    width = qkv_TW.shape[1]
    if width % head_dim or width // head_dim <= 2 * num_kv_heads:
        raise ValueError(
            f"a projection {width} wide does not hold query heads of {head_dim} beside "
            f"{num_kv_heads} key and {num_kv_heads} value heads"
        )
    if 2 * table_P2r2.shape[2] > head_dim:
        raise ValueError(
            f"heads must have at least {2 * table_P2r2.shape[2]} rotated dimensions, got {head_dim}"
        )
    if not q_weight.shape == k_weight.shape == (head_dim,):
        raise ValueError(
            f"the norms' weights must be [{head_dim}] as the heads, got {tuple(q_weight.shape)} "
            f"and {tuple(k_weight.shape)}"
        )
    if not qkv_TW.dtype == table_P2r2.dtype == key_pages.dtype == value_pages.dtype:
        raise ValueError(
            f"the projection, the table and the pages must be one dtype, got {qkv_TW.dtype}, "
            f"{table_P2r2.dtype}, {key_pages.dtype}, {value_pages.dtype}"
        )
    if positions_T.dtype != torch.int64 or slot_T.dtype != torch.int64:
        raise ValueError(
            f"positions and slots must be int64, got {positions_T.dtype} and {slot_T.dtype}"
        )
    if qkv_TW.stride(1) != 1:
        raise ValueError(f"the projection needs unit stride along W, got {qkv_TW.stride(1)}")
    if not all(x.is_contiguous() for x in (table_P2r2, positions_T, slot_T)):
        raise ValueError("the table, the positions and the slots must be contiguous")


def norm_rotary_fill_reference(
    qkv_TW: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    table_P2r2: Tensor,
    positions_T: Tensor,
    slot_T: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
) -> tuple[Tensor, Tensor]:
    """The definition: the two operations one after the other."""
    num_kv_heads, head_dim = key_pages.shape[2:]
    heads = qkv_TW.unflatten(1, (-1, head_dim))
    num_heads = heads.shape[1] - 2 * num_kv_heads
    q_THd, k_TKd, v_TKd = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    q_THd, k_TKd = norm_rotary(q_THd, k_TKd, q_weight, k_weight, eps, table_P2r2, positions_T)
    fill_kv(k_TKd, v_TKd, slot_T, key_pages, value_pages)
    return q_THd, k_TKd


@triton.jit
def _norm_rotary_fill_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    table_ptr,
    positions_ptr,
    slot_ptr,
    q_ptr,
    k_ptr,
    key_ptr,
    value_ptr,
    qkv_stride_t,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    HEADS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    let_next_begin(OVERLAP)
    t = tl.program_id(0).to(tl.int64)  # one program per token and HEADS heads of q, of k or of v
    tile = tl.program_id(1)
    Q_TILES: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    KV_TILES: tl.constexpr = (NUM_KV_HEADS + HEADS - 1) // HEADS
    wait_for_previous(OVERLAP)
    qkv_ptr += t * qkv_stride_t
    cos_ptr = table_ptr + tl.load(positions_ptr + t) * (2 * HALF)
    slot_start = tl.load(slot_ptr + t) * (NUM_KV_HEADS * HEAD_DIM)
    if tile < Q_TILES:
        norm_rotate_heads(
            qkv_ptr,
            HEAD_DIM,
            q_weight_ptr,
            cos_ptr,
            q_ptr + t * (NUM_HEADS * HEAD_DIM),
            None,
            tile * HEADS,
            NUM_HEADS,
            eps,
            HEAD_DIM,
            HALF,
            BLOCK_HALF,
            BLOCK_REST,
            HEADS,
        )
    elif tile < Q_TILES + KV_TILES:
        norm_rotate_heads(
            qkv_ptr + NUM_HEADS * HEAD_DIM,
            HEAD_DIM,
            k_weight_ptr,
            cos_ptr,
            key_ptr + slot_start,
            None if k_ptr is None else k_ptr + t * (NUM_KV_HEADS * HEAD_DIM),
            (tile - Q_TILES) * HEADS,
            NUM_KV_HEADS,
            eps,
            HEAD_DIM,
            HALF,
            BLOCK_HALF,
            BLOCK_REST,
            HEADS,
        )
    else:
        head = (tile - Q_TILES - KV_TILES) * HEADS + tl.arange(0, HEADS)[:, None]
        column = tl.arange(0, BLOCK_HEAD)[None, :]
        inside = (head < NUM_KV_HEADS) & (column < HEAD_DIM)
        place = head * HEAD_DIM + column
        value = tl.load(qkv_ptr + (NUM_HEADS + NUM_KV_HEADS) * HEAD_DIM + place, mask=inside)
        tl.store(value_ptr + slot_start + place, value, mask=inside)
