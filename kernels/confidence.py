"""The token a masked position would take, and how sure the model is of it.

R rows of logits, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def confidence(logits_RV: Tensor, mask_token_id: int) -> tuple[Tensor, Tensor]:
    """Best token of each row other than the mask, and the natural log of its probability.

    The probability is that of the softmax over the whole vocabulary, the mask token included: a
    model that would rather keep the mask is unsure. Writing the mask token itself would only lose
    the step, hence it is never chosen.

    Args:
        logits_RV: ``[R, V]``, any float dtype; computed in float32.
        mask_token_id: in ``[0, V)``, V at least 2.

    Returns:
        ``token_R`` int64, the lowest id where several are best, and ``log_confidence_R`` float32.

    Raises:
        ValueError: ``logits_RV`` is not two-dimensional or the mask id is outside it.
    """
    if logits_RV.ndim != 2 or logits_RV.shape[1] < 2:
        raise ValueError(f"logits_RV must be [R, V] with V >= 2, got {tuple(logits_RV.shape)}")
    if not 0 <= mask_token_id < logits_RV.shape[1]:
        raise ValueError(f"mask_token_id {mask_token_id} is not in [0, {logits_RV.shape[1]})")
    return confidence_reference(logits_RV, mask_token_id)


def confidence_reference(logits_RV: Tensor, mask_token_id: int) -> tuple[Tensor, Tensor]:
    """The definition."""
    logits_RV = logits_RV.to(torch.float32)
    allowed_RV = logits_RV.clone()
    allowed_RV[:, mask_token_id] = -torch.inf
    token_R = allowed_RV.argmax(1)  # the first of equal values
    best_R = logits_RV.gather(1, token_R[:, None])[:, 0]
    return token_R, best_R - logits_RV.logsumexp(1)
