"""Attention of ragged query rows over paged keys and values: the one attention of every model.

The contract and the definition; the kernels of a GPU are in ``attention_kernels.py``, their tile
sizes in ``tuning.py``.

T query tokens in S rows (a row: consecutive tokens of one sequence), L most tokens in a row,
H query heads, K KV heads, G = H / K, d head size, M page tables of P pages, N KV positions looked
at.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from focus_ray.kernels.attention_kernels import launch_attention
from focus_ray.kernels.launch import can_launch
from focus_ray.kernels.tuning import attention_plan

# Elements of the largest temporary tensor of one chunk of rows. On a CPU a chunk should stay in the
# cache (64 rows of 32 tokens over 1024 positions, one thread: 58 ms, against 95 ms with 2**25);
# elsewhere the bound is on memory alone, 64 MiB in bfloat16.
MAX_CHUNK_ELEMENTS = 2**25
MAX_CHUNK_ELEMENTS_CPU = 2**20


def paged_attention(
    q_THd: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table_MP: Tensor,
    row_table_S: Tensor,
    row_offsets_S1: Tensor,
    kv_limit_T: Tensor,
    *,
    max_row_len: int,
    max_kv_len: int,
    busy_rows: int,
    scale: float,
) -> Tensor:
    """Attend from each token to the KV positions ``[0, kv_limit)`` of its own row.

    Slots at or past a row's largest limit may hold anything, NaN included: they have no weight.
    Scores and sums are float32. The same call gives the same bits; on a GPU the tile depends on
    the batch's sizes, so that in bfloat16 and float16 other company may change a row's last bit
    (never in float32).

    Args:
        q_THd: ``[T, H, d]``, float32, bfloat16 or float16; unit stride along d.
        key_pages: ``[num_pages, page_size, K, d]``, same dtype, contiguous; H is a multiple of K.
            Any page size; powers of two from 8 up are read fastest.
        value_pages: as ``key_pages``.
        page_table_MP: integer; page ``p`` of a table holds the KV positions
            ``[p * page_size, (p + 1) * page_size)``. Entries past a row's need are any valid page.
        row_table_S: integer, the page table of each row.
        row_offsets_S1: integer, row ``s`` is tokens ``[offsets[s], offsets[s + 1])``; ends at T or
            before. Empty rows stand behind all others.
        kv_limit_T: integer, at least 1 and at most ``max_kv_len``.
        max_row_len: most tokens in one row, or a bound.
        max_kv_len: largest ``kv_limit``, or a bound; neither bound costs much where it is loose.
        busy_rows: about how many rows are not empty, at least 1; a guess, for the choice of tiles.
        scale: factor of the scores before the softmax, above 0.

    Returns:
        ``[T, H, d]``, dtype and device of ``q_THd``; empty when T is 0. What stands at tokens of
        no row means nothing.

    Raises:
        ValueError: shapes, dtypes or strides do not fit together, or a number is out of range.
    """
    if q_THd.ndim != 3 or key_pages.ndim != 4 or key_pages.shape != value_pages.shape:
        raise ValueError(
            "paged_attention takes q [T, H, d] and equal key and value pages "
            f"[pages, page_size, K, d], got {tuple(q_THd.shape)}, {tuple(key_pages.shape)}, "
            f"{tuple(value_pages.shape)}"
        )
    num_tokens, num_heads, head_dim = q_THd.shape
    _, page_size, num_kv_heads, kv_head_dim = key_pages.shape
    if num_heads % num_kv_heads or head_dim != kv_head_dim:
        raise ValueError(
            f"q has {num_heads} heads of {head_dim}, the pages {num_kv_heads} of {kv_head_dim}: "
            "head sizes must be equal and query heads a multiple of KV heads"
        )
    if not q_THd.dtype == key_pages.dtype == value_pages.dtype:
        raise ValueError(
            f"q is {q_THd.dtype}, the pages {key_pages.dtype} and {value_pages.dtype}: "
            "they must be one dtype"
        )
    if not (q_THd.stride(2) == 1 and key_pages.is_contiguous() and value_pages.is_contiguous()):
        raise ValueError(
            "q needs unit stride along d and the pages to be contiguous, got strides "
            f"{q_THd.stride()}, {key_pages.stride()} and {value_pages.stride()}"
        )
    num_rows = len(row_table_S)
    if row_offsets_S1.shape != (num_rows + 1,) or kv_limit_T.shape != (num_tokens,):
        raise ValueError(
            f"{num_rows} rows and {num_tokens} tokens need one more row offset and as many limits, "
            f"got {tuple(row_offsets_S1.shape)} and {tuple(kv_limit_T.shape)}"
        )
    if num_tokens == 0 or num_rows == 0:
        return torch.zeros_like(q_THd)
    if max_row_len < 1 or not 1 <= max_kv_len <= page_table_MP.shape[1] * page_size:
        raise ValueError(
            f"max_row_len {max_row_len} must be at least 1 and max_kv_len {max_kv_len} between 1 "
            f"and the page table's {page_table_MP.shape[1] * page_size} positions"
        )
    if busy_rows < 1:
        raise ValueError(f"busy_rows {busy_rows} must be at least 1")
    if not scale > 0:
        raise ValueError(f"scale must be above 0, got {scale}")
    given = (q_THd, key_pages, value_pages, page_table_MP, row_table_S, row_offsets_S1, kv_limit_T)
    if can_launch(*given):
        plan = attention_plan(
            q_THd.device,
            q_THd.dtype,
            num_tokens=num_tokens,
            busy_rows=busy_rows,
            num_kv_heads=num_kv_heads,
            group=num_heads // num_kv_heads,
            head_dim=head_dim,
            max_row_len=max_row_len,
            max_kv_len=max_kv_len,
        )
        return launch_attention(*given, busy_rows=busy_rows, scale=scale, plan=plan)
    return paged_attention_reference(
        *given, max_row_len=max_row_len, max_kv_len=max_kv_len, scale=scale
    )


def paged_attention_reference(
    q_THd: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table_MP: Tensor,
    row_table_S: Tensor,
    row_offsets_S1: Tensor,
    kv_limit_T: Tensor,
    *,
    max_row_len: int,
    max_kv_len: int,
    scale: float,
) -> Tensor:
    """The definition: rows padded to L queries and N keys, then masked dense attention.

    Rows are taken in chunks such that no temporary tensor of a chunk exceeds
    ``MAX_CHUNK_ELEMENTS`` (``MAX_CHUNK_ELEMENTS_CPU`` on a CPU; one row is the least a chunk can
    be); a handful of such tensors live at a time.
    """
    num_tokens, num_heads, head_dim = q_THd.shape
    _, page_size, num_kv_heads, _ = key_pages.shape
    on_cpu = q_THd.device.type == "cpu"
    if on_cpu:  # where reading a number is free, and looking at no more than is seen pays
        max_row_len = max(int(row_offsets_S1.diff().max()), 1)
        max_kv_len = int(kv_limit_T.max())
    num_pages = -(-max_kv_len // page_size)
    padded_kv_len = num_pages * page_size
    row_elements = padded_kv_len * max(num_kv_heads * head_dim, num_heads * max_row_len)
    chunk_elements = MAX_CHUNK_ELEMENTS_CPU if on_cpu else MAX_CHUNK_ELEMENTS
    chunk_rows = max(1, chunk_elements // row_elements)

    column_L = torch.arange(max_row_len, device=q_THd.device)
    token_SL = row_offsets_S1[:-1, None].long() + column_L
    is_token_SL = token_SL < row_offsets_S1[1:, None]
    token_SL = token_SL.clamp(max=num_tokens - 1)
    # Padding queries see one slot, so that their softmax is defined; nobody reads the result.
    kv_limit_SL = torch.where(is_token_SL, kv_limit_T[token_SL], 1)

    out_SLHd = q_THd.new_empty(*token_SL.shape, num_heads, head_dim)
    for first in range(0, token_SL.shape[0], chunk_rows):
        rows = slice(first, first + chunk_rows)
        out_SLHd[rows] = _attend_rows(
            q_THd[token_SL[rows]],
            key_pages,
            value_pages,
            page_table_MP[row_table_S[rows].long(), :num_pages].long(),
            kv_limit_SL[rows],
            scale,
        )
    token_T = torch.arange(num_tokens, device=q_THd.device)
    row_T = torch.searchsorted(row_offsets_S1[1:].contiguous(), token_T, right=True)
    row_T = row_T.clamp(max=len(row_table_S) - 1)  # tokens of no row: some token of the last one
    column_T = (token_T - row_offsets_S1[row_T]).clamp(max=max_row_len - 1)
    return out_SLHd[row_T, column_T]


def _attend_rows(
    q_SLHd: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table_SP: Tensor,
    kv_limit_SL: Tensor,
    scale: float,
) -> Tensor:
    """Attention of padded rows, ``[S, L, H, d]``."""
    num_rows, row_len, num_heads, head_dim = q_SLHd.shape
    num_kv_heads = key_pages.shape[2]
    group = num_heads // num_kv_heads
    key_SNKd = key_pages[page_table_SP].flatten(1, 2)
    value_SNKd = value_pages[page_table_SP].flatten(1, 2)
    position_N = torch.arange(key_SNKd.shape[1], device=q_SLHd.device)
    # A weight of zero does not silence a NaN; slots no token of the row may see become zeros.
    unseen_SN11 = (position_N >= kv_limit_SL.amax(1, keepdim=True))[:, :, None, None]
    key_SNKd.masked_fill_(unseen_SN11, 0)
    value_SNKd.masked_fill_(unseen_SN11, 0)
    # The G query heads of a KV head become G queries of it, so that K and V are not repeated.
    q_SKMd = (
        q_SLHd.view(num_rows, row_len, num_kv_heads, group, head_dim)
        .transpose(1, 2)
        .reshape(num_rows, num_kv_heads, row_len * group, head_dim)
    )
    limit_SM = kv_limit_SL.repeat_interleave(group, dim=1)
    out_SKMd = F.scaled_dot_product_attention(
        q_SKMd,
        key_SNKd.transpose(1, 2),
        value_SNKd.transpose(1, 2),
        attn_mask=(position_N < limit_SM[:, :, None])[:, None],
        scale=scale,
    )
    return (
        out_SKMd.view(num_rows, num_kv_heads, row_len, group, head_dim)
        .transpose(1, 2)
        .reshape(num_rows, row_len, num_heads, head_dim)
    )
