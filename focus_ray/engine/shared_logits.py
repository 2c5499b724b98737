"""Logits of which every rank has its part of the vocabulary: what all of them make of these.

Parts are equal and lie in the order of the ranks. N ranks, R rows of logits, V ids of a part, K
alternatives or suppressed ids.
"""

from __future__ import annotations

import torch
from torch import Tensor

from focus_ray.kernels.confidence import Choice, Draw, confidence
from focus_ray.kernels.confidence_parts import confidence_part, merge_parts
from focus_ray.models.parallel import Shards


def choose_over_ranks(
    logits_RV: Tensor,
    mask_token_id: int,
    shards: Shards,
    *,
    suppressed_RK: Tensor | None = None,
    draw: Draw | None = None,
) -> Choice:
    """``confidence`` over the whole vocabulary; a few words of each row are exchanged."""
    if shards.size == 1:
        return confidence(logits_RV, mask_token_id, suppressed_RK=suppressed_RK, draw=draw)
    part_FR = confidence_part(
        logits_RV,
        mask_token_id,
        shards.rank * logits_RV.shape[1],
        suppressed_RK=suppressed_RK,
        draw=draw,
    )
    return merge_parts(shards.gather(part_FR), draw)


def whole_rows(logits_RV: Tensor, shards: Shards) -> Tensor:
    """``[R, N V]``: the rows with the parts of all ranks; as many bytes are exchanged."""
    if shards.size == 1:
        return logits_RV
    return shards.gather(logits_RV.contiguous()).movedim(0, 1).flatten(1)


def best_alternatives(logits_RV: Tensor, num_best: int, shards: Shards) -> tuple[Tensor, Tensor]:
    """Ids and log probabilities of the most probable tokens, best first, ``[R, K]`` each.

    Every rank offers as many of its own. Which of equally probable ones are taken is left open, but
    is the same on all ranks.

    Args:
        num_best: K, at most ``N V``.
    """
    if shards.size == 1:
        best = logits_RV.log_softmax(1, dtype=torch.float32).topk(num_best, dim=1)
        return best.indices, best.values
    logits_RV = logits_RV.to(torch.float32)
    own = logits_RV.topk(min(num_best, logits_RV.shape[1]), dim=1)
    id_RK = (own.indices + shards.rank * logits_RV.shape[1]).int()
    log_total_R1 = logits_RV.logsumexp(1, keepdim=True)
    floats = (own.values.view(torch.int32), log_total_R1.view(torch.int32))
    words_RNW = shards.gather(torch.cat([id_RK, *floats], dim=1)).movedim(0, 1)
    id_RNK, floats_RNW = words_RNW.tensor_split([id_RK.shape[1]], dim=2)
    logit_RNK, log_total_RN1 = floats_RNW.view(torch.float32).tensor_split([-1], dim=2)
    logit_RK, place_RK = logit_RNK.flatten(1).topk(num_best, dim=1)
    id_RK = id_RNK.flatten(1).gather(1, place_RK).long()
    return id_RK, logit_RK - log_total_RN1.logsumexp(1)
