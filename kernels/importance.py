"""How much attention each masked token of a block receives in one layer (FOCUS, arXiv 2601.23278).

N decoding blocks of B positions, T tokens of the step in S >= N rows, of which row n holds the
processed tokens of block n; H query heads, K KV heads, G = H / K, d head size, n masked tokens of a
block. Only the masked tokens take part, as queries and as keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def importance(
    q_THd: Tensor,
    k_TKd: Tensor,
    row_offsets_S1: Tensor,
    processed_NB: Tensor,
    masked_NB: Tensor,
) -> Tensor:
    """Attention mass per masked token, summed over query heads and masked queries.

    Scores ``q . k / sqrt(d)`` in float32, each replaced by the largest of itself and its two
    neighbours in the list of masked tokens (not of block positions), then a softmax over the n
    masked keys, then the sum.

    Args:
        q_THd: ``[T, H, d]`` after q-norm and rotary, any float dtype.
        k_TKd: ``[T, K, d]`` after k-norm and rotary; H is a multiple of K.
        row_offsets_S1: int32, row ``s`` is tokens ``[offsets[s], offsets[s + 1])``; the first N
            rows are the blocks, further rows are not looked at.
        processed_NB: bool, the positions of each block that are among the T tokens, whose order
            they are in.
        masked_NB: bool, a subset of ``processed_NB``.

    Returns:
        ``[N, B]`` float32, 0 where not masked; a block's sum is ``H * n``. Not rounded to the
        model's dtype, which ``retain`` does.

    Raises:
        ValueError: shapes do not fit together or a mask is not bool.
    """
    num_tokens, num_heads, head_dim = q_THd.shape
    num_kv_heads = k_TKd.shape[1]
    if k_TKd.shape != (num_tokens, num_kv_heads, head_dim) or num_heads % num_kv_heads:
        raise ValueError(
            f"q {tuple(q_THd.shape)} and k {tuple(k_TKd.shape)} must have the same tokens and "
            "head size, and q a multiple of k's heads"
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
    return importance_reference(q_THd, k_TKd, row_offsets_S1, processed_NB, masked_NB)


def importance_reference(
    q_THd: Tensor,
    k_TKd: Tensor,
    row_offsets_S1: Tensor,
    processed_NB: Tensor,
    masked_NB: Tensor,
) -> Tensor:
    """The definition."""
    num_tokens, num_heads, head_dim = q_THd.shape
    num_rows, block_length = masked_NB.shape
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
