"""How much attention each masked token of a block receives in one layer (FOCUS, arXiv 2601.23278).

B tokens of one sequence's block, H query heads, K KV heads, G = H / K, d head size, n masked
tokens. Only the masked tokens take part, as queries and as keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def importance(q_NBHd: Tensor, k_NBKd: Tensor, masked_NB: Tensor) -> Tensor:
    """``importance_reference`` of N blocks at once, at the places of their masked tokens.

    Args:
        q_NBHd: ``[N, B, H, d]``; what stands at places that are not masked does not matter.
        k_NBKd: ``[N, B, K, d]``.
        masked_NB: bool.

    Returns:
        ``[N, B]`` float32, 0 where not masked.
    """
    num_rows, block_length, num_heads, head_dim = q_NBHd.shape
    num_kv_heads = k_NBKd.shape[2]
    # masked tokens first, in order of position: neighbours are those of the list, not of the block
    order_NB = (~masked_NB).int().argsort(dim=1, stable=True)
    listed_NB = masked_NB.gather(1, order_NB)
    q_NBHd = q_NBHd.take_along_dim(order_NB[:, :, None, None], 1).float()
    k_NBKd = k_NBKd.take_along_dim(order_NB[:, :, None, None], 1).float()
    q_NBKGd = q_NBHd.unflatten(2, (num_kv_heads, num_heads // num_kv_heads))
    score = torch.einsum("nikgd,njkd->nkgij", q_NBKGd, k_NBKd) * head_dim**-0.5
    score = score.masked_fill(~listed_NB[:, None, None, None, :], -torch.inf)
    pooled = F.max_pool1d(score.flatten(1, 3), kernel_size=3, stride=1, padding=1)
    pooled_NHBB = pooled.view(num_rows, num_heads, block_length, block_length)
    pooled_NHBB = pooled_NHBB.masked_fill(~listed_NB[:, None, None, :], -torch.inf)
    weight_NHBB = pooled_NHBB.softmax(-1).masked_fill(~listed_NB[:, None, :, None], 0.0)
    received_NB = weight_NHBB.sum((1, 2))
    return torch.zeros_like(received_NB).scatter_(1, order_NB, received_NB) * masked_NB


def importance_reference(q_BHd: Tensor, k_BKd: Tensor, masked_B: Tensor) -> Tensor:
    """Attention mass per masked token, summed over query heads and masked queries.

    Scores ``q . k / sqrt(d)`` in float32, each replaced by the largest of itself and its two
    neighbours in the list of masked tokens (not of block positions), then a softmax over the n
    masked keys, then the sum.

    Args:
        q_BHd: ``[B, H, d]`` after q-norm and rotary, any float dtype.
        k_BKd: ``[B, K, d]`` after k-norm and rotary; H is a multiple of K.
        masked_B: bool, the masked tokens; ``n = masked_B.sum()``.

    Returns:
        ``[n]`` float32 in order of position, summing to ``H * n``; not yet rounded, see
        ``round_importance``.

    Raises:
        ValueError: shapes do not fit together or ``masked_B`` is not bool.
    """
    num_tokens, num_heads, head_dim = q_BHd.shape
    num_kv_heads = k_BKd.shape[1]
    if k_BKd.shape != (num_tokens, num_kv_heads, head_dim) or num_heads % num_kv_heads:
        raise ValueError(
            f"q {tuple(q_BHd.shape)} and k {tuple(k_BKd.shape)} must have the same tokens and "
            "head size, and q a multiple of k's heads"
        )
    if masked_B.dtype != torch.bool or masked_B.shape != (num_tokens,):
        raise ValueError(
            f"masked_B must be bool [{num_tokens}], got {masked_B.dtype} {tuple(masked_B.shape)}"
        )
    q_nKGd = q_BHd[masked_B].float().unflatten(1, (num_kv_heads, num_heads // num_kv_heads))
    k_nKd = k_BKd[masked_B].float()
    if k_nKd.shape[0] == 0:
        return k_nKd.new_empty(0)
    score_Hnn = torch.einsum("ikgd,jkd->kgij", q_nKGd, k_nKd).flatten(0, 1) * head_dim**-0.5
    pooled_Hnn = F.max_pool1d(score_Hnn, kernel_size=3, stride=1, padding=1)
    return pooled_Hnn.softmax(-1).sum((0, 1))


def round_importance(importance_n: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to the model's dtype and back to float32.

    Deltas are differences of *rounded* importances; under bfloat16 that makes equal deltas common,
    and which tokens are retained depends on it.
    """
    return importance_n.to(dtype).to(torch.float32)
