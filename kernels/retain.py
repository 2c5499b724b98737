"""Which masked tokens of a block are computed past layer 1 (FOCUS, arXiv 2601.23278, section 4).

N sequences, B block length. Rows are blocks: position p of a row is position p of the block, and
only masked positions take part; the reference speaks of the compressed list of masked tokens,
which is the same in order of position.
"""

from __future__ import annotations

import torch
from torch import Tensor


def eviction_target(num_masked_N: Tensor, mean_decoded_N: Tensor, alpha_N: Tensor) -> Tensor:
    """Masked tokens a block may keep at least: ``ceil(mean * alpha)``, 1 to the number of masks.

    The product is taken in float32 before it is rounded up; means below 1 count as 1. A block
    with more masks than its target evicts.

    Args:
        num_masked_N: int64.
        mean_decoded_N: float32, tokens decoded per productive step of the block so far.
        alpha_N: float32, at least 1.

    Returns:
        ``[N]`` int64; 0 where nothing is masked.
    """
    wanted_N = (mean_decoded_N.float().clamp_min(1.0) * alpha_N.float()).ceil().long()
    return torch.minimum(num_masked_N, wanted_N.clamp_min(1))


def retain(delta_NB: Tensor, masked_NB: Tensor, target_N: Tensor, progress_N: Tensor) -> Tensor:
    """Choose the retained masked tokens.

    Blocks with no more masks than their target retain all. Otherwise: the tokens whose delta is at
    least mean plus one (population) deviation, if these are as many as the target, else the
    target's largest deltas, ties to the left; then the left neighbour of every chosen token; then,
    so that later layers read no position that was never computed, every masked token left of the
    rightmost chosen one and right of the block's progress. A block with a NaN delta retains all.

    Args:
        delta_NB: float32, importance in layer 1 minus layer 0; any value where not masked.
        masked_NB: bool.
        target_N: int64, of ``eviction_target``.
        progress_N: int64, rightmost block position ever computed past layer 1; -1 for a new block.

    Returns:
        ``[N, B]`` bool, a subset of ``masked_NB``, not empty where that is not.

    Raises:
        ValueError: a shape or dtype differs from the above.
    """
    if masked_NB.ndim != 2 or masked_NB.dtype != torch.bool or delta_NB.shape != masked_NB.shape:
        raise ValueError(
            f"delta and masked must be [N, B] alike and masked bool, got {tuple(delta_NB.shape)}, "
            f"{masked_NB.dtype} {tuple(masked_NB.shape)}"
        )
    for name, tensor_N in (("target_N", target_N), ("progress_N", progress_N)):
        if tensor_N.shape != masked_NB.shape[:1] or tensor_N.dtype != torch.int64:
            raise ValueError(
                f"{name} must be int64 [{masked_NB.shape[0]}], got {tensor_N.dtype} "
                f"{tuple(tensor_N.shape)}"
            )
    return retain_reference(delta_NB, masked_NB, target_N, progress_N)


def retain_reference(
    delta_NB: Tensor, masked_NB: Tensor, target_N: Tensor, progress_N: Tensor
) -> Tensor:
    """The definition."""
    num_masked_N = masked_NB.sum(1)
    target_N1 = target_N[:, None]
    chosen_NB = _choose(delta_NB.float(), masked_NB, num_masked_N, target_N1)

    # the left neighbour in the block, judged by the choice itself and not by other neighbours
    right_chosen_NB = torch.zeros_like(chosen_NB)
    right_chosen_NB[:, :-1] = chosen_NB[:, 1:]
    kept_NB = chosen_NB | (masked_NB & right_chosen_NB)
    # a delta that is no number says nothing about the others either
    unknown_N1 = (masked_NB & delta_NB.isnan()).any(1, keepdim=True)
    kept_NB |= masked_NB & unknown_N1

    position_B = torch.arange(masked_NB.shape[1], device=masked_NB.device)
    rightmost_N1 = torch.where(kept_NB, position_B, -1).amax(1, keepdim=True)
    hole_NB = (position_B < rightmost_N1) & (position_B > progress_N[:, None])
    kept_NB |= masked_NB & hole_NB
    return torch.where((num_masked_N > target_N)[:, None], kept_NB, masked_NB)


def _choose(delta_NB: Tensor, masked_NB: Tensor, num_masked_N: Tensor, target_N1: Tensor) -> Tensor:
    """Mean plus deviation, or the target's best."""
    ranked_NB = torch.where(masked_NB, delta_NB, -torch.inf)
    order_NB = ranked_NB.argsort(dim=1, descending=True, stable=True)
    rank_NB = torch.empty_like(order_NB).scatter_(
        1, order_NB, torch.arange(order_NB.shape[1], device=order_NB.device).expand_as(order_NB)
    )
    best_NB = masked_NB & (rank_NB < target_N1)

    count_N1 = num_masked_N[:, None].clamp_min(1)
    mean_N1 = torch.where(masked_NB, delta_NB, 0.0).sum(1, keepdim=True) / count_N1
    apart_NB = torch.where(masked_NB, delta_NB - mean_N1, 0.0)
    deviation_N1 = (apart_NB.square().sum(1, keepdim=True) / count_N1).sqrt()
    # equal deltas deviate by nothing, which rounding of the mean must not hide
    lowest_N1 = torch.where(masked_NB, delta_NB, torch.inf).amin(1, keepdim=True)
    equal_N1 = ranked_NB.amax(1, keepdim=True) == lowest_N1
    above_NB = masked_NB & ((delta_NB >= mean_N1 + deviation_N1) | equal_N1)
    return torch.where(above_NB.sum(1, keepdim=True) >= target_N1, above_NB, best_NB)
