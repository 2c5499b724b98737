"""Write the keys and values of a step into their slots of the KV pages.

T tokens, K KV heads, d head size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from focus_ray.kernels.launch import can_launch

# Elements of K, and again of V, that one program moves: two tokens of 8 heads of 128, four 16-byte
# words of each for every thread of 4 warps.
ELEMENTS_PER_PROGRAM = 2048


def fill_kv(
    k_TKd: Tensor, v_TKd: Tensor, slot_T: Tensor, key_pages: Tensor, value_pages: Tensor
) -> None:
    """Store ``k_TKd[t]`` and ``v_TKd[t]`` at slot ``slot_T[t]``, in place.

    Args:
        k_TKd: ``[T, K, d]``, dtype of the pages, unit stride along d: a view of a fused projection
            will do.
        v_TKd: as ``k_TKd``.
        slot_T: int64, ``page * page_size + offset``, no slot twice.
        key_pages: ``[num_pages, page_size, K, d]``, contiguous.
        value_pages: as ``key_pages``.

    Raises:
        ValueError: a shape, dtype or layout differs from the above.
    """
    if key_pages.shape != value_pages.shape or key_pages.ndim != 4:
        raise ValueError(
            "key and value pages must both be [num_pages, page_size, K, d], got "
            f"{tuple(key_pages.shape)} and {tuple(value_pages.shape)}"
        )
    if not (key_pages.is_contiguous() and value_pages.is_contiguous()):
        raise ValueError("key and value pages must be contiguous to be written in place")
    expected = (slot_T.numel(), *key_pages.shape[2:])
    if k_TKd.shape != expected or v_TKd.shape != expected:
        raise ValueError(
            f"keys and values must be {expected} to fill these slots and pages, got "
            f"{tuple(k_TKd.shape)} and {tuple(v_TKd.shape)}"
        )
    if slot_T.dtype != torch.int64:
        raise ValueError(f"slot_T must be int64, got {slot_T.dtype}")
    if not k_TKd.dtype == v_TKd.dtype == key_pages.dtype == value_pages.dtype:
        raise ValueError(
            f"keys {k_TKd.dtype} and values {v_TKd.dtype} must have the dtype of the pages, "
            f"{key_pages.dtype} and {value_pages.dtype}"
        )
    if k_TKd.stride(2) != 1 or v_TKd.stride(2) != 1:
        raise ValueError(
            f"keys and values need unit stride along d, got {k_TKd.stride()} and {v_TKd.stride()}"
        )
    if not can_launch(k_TKd, v_TKd, slot_T, key_pages, value_pages):
        fill_kv_reference(k_TKd, v_TKd, slot_T, key_pages, value_pages)
        return
    num_tokens, num_kv_heads, head_dim = k_TKd.shape
    if num_tokens == 0:
        return
    slot_len = num_kv_heads * head_dim
    block_e = min(triton.next_power_of_2(slot_len), ELEMENTS_PER_PROGRAM)
    block_t = ELEMENTS_PER_PROGRAM // block_e
    _fill_kv_kernel[(triton.cdiv(num_tokens, block_t), triton.cdiv(slot_len, block_e))](
        k_TKd,
        v_TKd,
        slot_T.contiguous(),
        key_pages,
        value_pages,
        k_TKd.stride(0),
        k_TKd.stride(1),
        v_TKd.stride(0),
        v_TKd.stride(1),
        num_tokens,
        HEAD_DIM=head_dim,
        SLOT_LEN=slot_len,
        BLOCK_T=block_t,
        BLOCK_E=block_e,
    )


def fill_kv_reference(
    k_TKd: Tensor, v_TKd: Tensor, slot_T: Tensor, key_pages: Tensor, value_pages: Tensor
) -> None:
    """The definition: pages seen as one list of slots."""
    slot_shape = (-1, *key_pages.shape[2:])
    key_pages.view(slot_shape).index_copy_(0, slot_T, k_TKd)
    value_pages.view(slot_shape).index_copy_(0, slot_T, v_TKd)


@triton.jit(do_not_specialize=["num_tokens"])
def _fill_kv_kernel(
    k_ptr,
    v_ptr,
    slot_ptr,
    key_ptr,
    value_ptr,
    k_stride_t,
    k_stride_h,
    v_stride_t,
    v_stride_h,
    num_tokens,
    HEAD_DIM: tl.constexpr,
    SLOT_LEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    # A program owns BLOCK_E elements, heads side by side, of the slots of BLOCK_T tokens.
    token_T = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    element_E = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    is_token_T = token_T < num_tokens
    is_inside_TE = is_token_T[:, None] & (element_E < SLOT_LEN)[None, :]
    slot_T = tl.load(slot_ptr + token_T, mask=is_token_T, other=0)
    place_TE = slot_T[:, None] * SLOT_LEN + element_E[None, :]
    head_E = (element_E // HEAD_DIM).to(tl.int64)
    column_E = element_E % HEAD_DIM
    k_ptrs = k_ptr + token_T[:, None] * k_stride_t + (head_E * k_stride_h + column_E)[None, :]
    v_ptrs = v_ptr + token_T[:, None] * v_stride_t + (head_E * v_stride_h + column_E)[None, :]
    k_TE = tl.load(k_ptrs, mask=is_inside_TE)
    v_TE = tl.load(v_ptrs, mask=is_inside_TE)
    tl.store(key_ptr + place_TE, k_TE, mask=is_inside_TE)
    tl.store(value_ptr + place_TE, v_TE, mask=is_inside_TE)
