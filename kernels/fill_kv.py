"""Write the keys and values of a step into their slots of the KV pages.

T tokens, K KV heads, d head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fill_kv(
    k_TKd: Tensor, v_TKd: Tensor, slot_T: Tensor, key_pages: Tensor, value_pages: Tensor
) -> None:
    """Store ``k_TKd[t]`` and ``v_TKd[t]`` at slot ``slot_T[t]``, in place.

    Args:
        k_TKd: ``[T, K, d]``, dtype of the pages.
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
    fill_kv_reference(k_TKd, v_TKd, slot_T, key_pages, value_pages)


def fill_kv_reference(
    k_TKd: Tensor, v_TKd: Tensor, slot_T: Tensor, key_pages: Tensor, value_pages: Tensor
) -> None:
    """The definition: pages seen as one list of slots."""
    slot_shape = (-1, *key_pages.shape[2:])
    key_pages.view(slot_shape).index_copy_(0, slot_T, k_TKd)
    value_pages.view(slot_shape).index_copy_(0, slot_T, v_TKd)
