"""``confidence`` where each of several ranks has the logits of a part of the vocabulary.

A rank sums up its part of every row in a few words, and from the words of all ranks each makes the
same choice: logits stay where they are. N ranks, R rows of logits, V ids of a part, K suppressed
ids, F words of a row and rank. Ids are those of the whole vocabulary everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from focus_ray.kernels.confidence import Choice, Draw, check_row_params
from focus_ray.kernels.confidence_kernels import launch_confidence
from focus_ray.kernels.launch import can_launch
from focus_ray.kernels.noise import exponential_noise

WORDS = ("token", "score", "chosen", "top", "top_of_all", "total", "cooled_total")
"""What a rank knows of a row: its token, int32, -1 where it has none that may be chosen; as bits of
float32, how good that is (the logit, or in a draw the quotient of weight and noise), its logit, the
highest logit that may be chosen and the highest of all; and sums of weights, at temperature 1 and,
in a draw, at the row's. Weights of sums are relative to the highest of all, those in quotients to
the one before."""

_LOWEST, _TINIEST = torch.finfo(torch.float32).min, torch.finfo(torch.float32).tiny


def confidence_part(
    logits_RV: Tensor,
    mask_token_id: int,
    first_id: int,
    *,
    suppressed_RK: Tensor | None = None,
    draw: Draw | None = None,
) -> Tensor:
    """What ``merge_parts`` needs to know of one rank.

    Args:
        logits_RV: ``[R, V]`` of the ids from ``first_id`` on, any float dtype, unit stride along V.
        mask_token_id, suppressed_RK, draw: as in ``confidence``; ids of other ranks among them.

    Returns:
        ``[F, R]`` int32, see ``WORDS``.

    Raises:
        ValueError: a shape, dtype or stride differs from the above.
    """
    if logits_RV.ndim != 2 or logits_RV.shape[1] < 1 or logits_RV.stride(1) != 1:
        raise ValueError(
            f"logits_RV must be [R, V] with V >= 1 and unit stride along V, got "
            f"{tuple(logits_RV.shape)} with strides {logits_RV.stride()}"
        )
    check_row_params(len(logits_RV), suppressed_RK, draw)
    if not can_launch(logits_RV):
        return confidence_part_reference(
            logits_RV, mask_token_id, first_id, suppressed_RK=suppressed_RK, draw=draw
        )
    part_FR = logits_RV.new_empty(len(WORDS), len(logits_RV), dtype=torch.int32)
    launch_confidence(
        logits_RV,
        mask_token_id,
        suppressed_RK,
        None if draw is None else [*vars(draw).values()],
        None,
        part_FR=part_FR,
        first_id=first_id,
    )
    return part_FR


def merge_parts(parts_NFR: Tensor, draw: Draw | None = None) -> Choice:
    """What ``confidence`` chooses over the whole vocabulary.

    Of equally good tokens the lowest id, as in ``confidence``; sums are those of ranks, in order.

    Args:
        parts_NFR: int32, what ``confidence_part`` found on each rank, ids ascending with N. Some
            rank has a token.
        draw: that of ``confidence_part``.
    """
    token_NR = parts_NFR[:, 0]
    score_NR, chosen_NR, top_NR, top_of_all_NR, total_NR, cooled_total_NR = (
        parts_NFR[:, 1:].view(torch.float32).unbind(1)
    )
    has_token_NR = token_NR >= 0
    better_NR = score_NR.masked_fill(~has_token_NR, -torch.inf)
    if draw is not None:
        temperature_R = draw.temperature_R.clamp_min(_TINIEST)
        score_NR = score_NR * ((top_NR - top_NR.amax(0)) / temperature_R).exp()
        drawn_NR = score_NR.masked_fill(~has_token_NR, -1.0)  # quotients are not negative
        better_NR = torch.where(draw.temperature_R > 0, drawn_NR, better_NR)
    best_1R = better_NR.argmax(0, keepdim=True)  # the first of equal values
    token_R = token_NR.gather(0, best_1R)[0].long()
    highest_R = top_of_all_NR.amax(0)
    below_NR = top_of_all_NR - highest_R
    chosen_R = chosen_NR.gather(0, best_1R)[0] - highest_R
    logprob_R = chosen_R - (total_NR * below_NR.exp()).sum(0).log()
    confidence_R = logprob_R.exp()
    if draw is not None:
        cooled_total_R = (cooled_total_NR * (below_NR / temperature_R).exp()).sum(0)
        cooled_R = (chosen_R / temperature_R).exp() / cooled_total_R
        confidence_R = torch.where(draw.temperature_R > 0, cooled_R, confidence_R)
    return Choice(token_R, confidence_R, logprob_R)


def confidence_part_reference(
    logits_RV: Tensor,
    mask_token_id: int,
    first_id: int,
    *,
    suppressed_RK: Tensor | None = None,
    draw: Draw | None = None,
) -> Tensor:
    """The definition."""
    logits_RV = logits_RV.to(torch.float32)
    vocab = logits_RV.shape[1]
    barred_R1 = torch.full_like(logits_RV[:, :1], mask_token_id, dtype=torch.int64)
    barred_RK = barred_R1 if suppressed_RK is None else torch.cat([suppressed_RK, barred_R1], 1)
    barred_RK = barred_RK - first_id
    elsewhere_RK = (barred_RK < 0) | (barred_RK >= vocab)
    candidates_RV = logits_RV.nan_to_num(nan=_LOWEST)
    padded_RV1 = torch.cat([candidates_RV, torch.zeros_like(logits_RV[:, :1])], 1)
    padded_RV1.scatter_(1, barred_RK.masked_fill(elsewhere_RK, vocab), -torch.inf)
    candidates_RV = padded_RV1[:, :vocab]
    score_R, token_R = candidates_RV.amax(1), candidates_RV.argmax(1)  # the first of equal values
    top_R = score_R.clamp_min(_LOWEST)
    top_of_all_R = logits_RV.amax(1).clamp_min(_LOWEST)
    below_RV = logits_RV - top_of_all_R[:, None]
    cooled_total_R = total_R = below_RV.exp().sum(1)
    if draw is not None:
        temperature_R1 = draw.temperature_R[:, None].clamp_min(_TINIEST)
        noise_RV = exponential_noise(draw.seed_R, draw.position_R, draw.step_R, vocab, first_id)
        quotient_RV = ((candidates_RV - top_R[:, None]) / temperature_R1).exp() / noise_RV
        drawn_R = draw.temperature_R > 0
        token_R = torch.where(drawn_R, quotient_RV.argmax(1), token_R)
        score_R = torch.where(drawn_R, quotient_RV.amax(1), score_R)
        cooled_total_R = (below_RV / temperature_R1).exp().sum(1)
    chosen_R = logits_RV.gather(1, token_R[:, None])[:, 0]
    barred_R = candidates_RV.gather(1, token_R[:, None])[:, 0] == -torch.inf
    id_R = (token_R + first_id).masked_fill(barred_R, -1).int()
    floats = (score_R, chosen_R, top_R, top_of_all_R, total_R, cooled_total_R)
    return torch.stack([id_R, *(part_R.view(torch.int32) for part_R in floats)])
