"""Which tokens of a block a denoising step decodes, and which it changes. Pure functions on arrays.

N sequences, B block length. A step has a quota. Static takes the quota's most confident tokens;
sequential those among the quota's positions from the leftmost masked one on; dynamic all above the
threshold or, where these are fewer than the quota, the quota's most confident. Source: generate.py
of JetAstra/SDAR (commit c2041a8), with its quota clamped to the masks that are left.

Joint threshold decodes as dynamic does with a quota of one, and edits: a decoded token that is not
the prompt's is replaced where the model is surer than the editing threshold of another one. Its
block therefore ends later than with its last mask: in the first step that found no mask and edited
nothing, or with the last of so many steps that found no mask. Source: the decoding of LLaDA2.1 as
JointThreshold of the SGLang in sands-lab/FOCUS (commit 277f1d1) has it, without its penalty.
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

    # joint threshold is told from dynamic by its quota alone
    sequential_N1 = (strategy_N == STRATEGIES.index("sequential"))[:, None]
    static_N1 = (strategy_N == STRATEGIES.index("low_confidence_static"))[:, None]
    return torch.where(sequential_N1, window_NB, torch.where(static_N1, best_NB, dynamic_NB))


def may_be_edited(strategy_N: Tensor, first_position_N: Tensor, decoded_NB: Tensor) -> Tensor:
    """The decoded tokens that a step looks at again.

    Args:
        strategy_N: any integer dtype, index in ``STRATEGIES``.
        first_position_N: any integer dtype, where the answer begins, from the block's first
            position on; negative where that is in a block before.
        decoded_NB: bool.

    Returns:
        ``[N, B]`` bool, a subset of ``decoded_NB``; none but under joint threshold.
    """
    position_B = torch.arange(decoded_NB.shape[1], device=decoded_NB.device)
    is_joint_N = strategy_N == STRATEGIES.index("joint_threshold")
    return decoded_NB & is_joint_N[:, None] & (position_B >= first_position_N[:, None])


def choose_edited(
    confidence_NB: Tensor,
    token_NB: Tensor,
    current_NB: Tensor,
    may_be_edited_NB: Tensor,
    threshold_N: Tensor,
) -> Tensor:
    """Choose the decoded tokens that are replaced.

    Args:
        confidence_NB: float32 probability of each position's chosen token; any value where it may
            not be edited.
        token_NB: int64, the chosen token; the same.
        current_NB: any integer dtype, the token that stands there.
        may_be_edited_NB: bool.
        threshold_N: float32; compared strictly.

    Returns:
        ``[N, B]`` bool, a subset of ``may_be_edited_NB``.
    """
    is_sure_NB = confidence_NB > threshold_N[:, None]
    return may_be_edited_NB & is_sure_NB & (token_NB != current_NB)
