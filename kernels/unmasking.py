"""Which masked tokens a denoising step turns into decoded ones. Pure functions on arrays.

N sequences, B block length. A step has a quota. Static takes the quota's most confident tokens;
sequential those among the quota's positions from the leftmost masked one on; dynamic all above the
threshold or, where these are fewer than the quota, the quota's most confident. Source: generate.py
of JetAstra/SDAR (commit c2041a8), with its quota clamped to the masks that are left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from focus_ray.kernels.slot_words import STRATEGIES


def quota(block_length: int, denoising_steps_N: Tensor, step_N: Tensor) -> Tensor:
    """Tokens a step must decode at least, as long as so many are masked.

    ``block_length // steps``, one more in the first ``block_length % steps`` steps.

    Args:
        denoising_steps_N: any integer dtype, 1 to block_length.
        step_N: the same, number of this step within the block, from 0.

    Returns:
        ``[N]``, of the same dtype, at least 1.
    """
    base_N = block_length // denoising_steps_N
    extra_N = step_N < block_length % denoising_steps_N
    return (base_N + extra_N).clamp_min(1)


def choose_unmasked(
    confidence_NB: Tensor,
    masked_NB: Tensor,
    *,
    strategy_N: Tensor,
    threshold_N: Tensor,
    quota_N: Tensor,
) -> Tensor:
    """Choose the masked tokens that become decoded.

    Args:
        confidence_NB: float32 probability of each position's chosen token; any value where not
            masked.
        masked_NB: bool.
        strategy_N: any integer dtype, index in ``STRATEGIES``.
        threshold_N: float32; dynamic compares strictly.
        quota_N: any integer dtype, at least 1.

    Returns:
        ``[N, B]`` bool, a subset of ``masked_NB``; at least one in every row that has a mask.
        Equal confidences go by position, lowest first.
    """
    ranked_NB = torch.where(masked_NB, confidence_NB, -1.0)
    order_NB = ranked_NB.argsort(dim=1, descending=True, stable=True)
    rank_NB = torch.empty_like(order_NB).scatter_(
        1, order_NB, torch.arange(order_NB.shape[1], device=order_NB.device).expand_as(order_NB)
    )
    best_NB = masked_NB & (rank_NB < quota_N[:, None])
    position_B = torch.arange(masked_NB.shape[1], device=masked_NB.device)
    first_N1 = masked_NB.int().argmax(1, keepdim=True)
    window_NB = masked_NB & (position_B < first_N1 + quota_N[:, None])
    above_NB = masked_NB & (confidence_NB > threshold_N[:, None])
    enough_N = above_NB.sum(1) >= quota_N
    dynamic_NB = torch.where(enough_N[:, None], above_NB, best_NB)

    sequential_N1 = (strategy_N == STRATEGIES.index("sequential"))[:, None]
    static_N1 = (strategy_N == STRATEGIES.index("low_confidence_static"))[:, None]
    return torch.where(sequential_N1, window_NB, torch.where(static_N1, best_NB, dynamic_NB))
