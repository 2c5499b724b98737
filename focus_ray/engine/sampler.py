"""Which token each masked position would take, and how sure the model is of it.

R rows of logits (masked positions), V vocabulary or the rank's part of it, K stop ids. A draw
depends on the request's seed, the token's absolute position and the number of the step within its
block, and on nothing else: not on the batch, not on the slot, not on what was drawn before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from focus_ray.engine.shared_logits import choose_over_ranks, whole_rows
from focus_ray.kernels.confidence import (
    Choice,
    Draw,
    candidates,
    cool,
    draw_token,
)
from focus_ray.models.parallel import WHOLE, Shards


@dataclass(frozen=True)
class RowParams:
    """Sampling parameters of each row of logits.

    Args:
        temperature_R: float32; 0 is greedy.
        top_p_R, min_p_R: float32 in [0, 1].
        top_k_R: int64; 0 keeps all.
        seed_R: int64.
        position_R, step_R: int64.
        suppressed_RK: int64 ids that may not be chosen; padded with the mask id.
    """

    temperature_R: Tensor
    top_p_R: Tensor
    top_k_R: Tensor
    min_p_R: Tensor
    seed_R: Tensor
    position_R: Tensor
    step_R: Tensor
    suppressed_RK: Tensor | None

    def draw(self) -> Draw:
        """What a draw depends on."""
        return Draw(self.temperature_R, self.seed_R, self.position_R, self.step_R)

    def take(self, rows_S: Tensor) -> RowParams:
        """The parameters of some of the rows."""
        fields: dict[str, Any] = {
            name: None if t is None else t[rows_S] for name, t in vars(self).items()
        }
        return RowParams(**fields)


def choose_tokens(
    logits_RV: Tensor,
    params: RowParams | None,
    *,
    mask_token_id: int,
    any_sampled: bool,
    any_filtered: bool,
    shards: Shards = WHOLE,
) -> Choice:
    """Take the arg-max or draw a token for every row.

    Confidence is the probability of the chosen token under the softmax of ``logits / temperature``
    over the whole vocabulary, before top-k, top-p and min-p and whatever is suppressed
    (temperature 1 for greedy rows), as in sands-lab/FOCUS (commit 277f1d1). The mask id is never
    chosen.

    Ranks exchange a few words of each row, and whole logits only of rows that are cut by top-k,
    top-p or min-p.

    Args:
        logits_RV: any float dtype; not changed.
        params: None: all rows are greedy, and may choose any token but the mask.
        any_sampled, any_filtered: False skips work that no row needs.
        shards: over whose ranks the vocabulary is divided.
    """
    if params is None:
        return choose_over_ranks(logits_RV, mask_token_id, shards)
    suppressed_RK = params.suppressed_RK
    draw = params.draw() if any_sampled else None
    if draw is None or not any_filtered:
        return choose_over_ranks(
            logits_RV, mask_token_id, shards, suppressed_RK=suppressed_RK, draw=draw
        )
    filtered_R = (params.top_k_R > 0) | (params.top_p_R < 1.0) | (params.min_p_R > 0.0)
    filtered_R &= params.temperature_R > 0.0
    unfiltered = replace(draw, temperature_R=params.temperature_R.masked_fill(filtered_R, 0.0))
    choice = choose_over_ranks(
        logits_RV, mask_token_id, shards, suppressed_RK=suppressed_RK, draw=unfiltered
    )
    rows_S = filtered_R.nonzero()[:, 0]
    logits_SV = whole_rows(logits_RV[rows_S], shards)
    drawn = _draw_filtered(logits_SV, params.take(rows_S), mask_token_id)
    return choice.replace(rows_S, drawn)


def _draw_filtered(logits_RV: Tensor, params: RowParams, mask_token_id: int) -> Choice:
    logits_RV = logits_RV.to(torch.float32)
    candidates_RV = candidates(logits_RV, mask_token_id, params.suppressed_RK)
    weights_RV = _filter(cool(candidates_RV, params.temperature_R), params).exp()
    return draw_token(logits_RV, weights_RV, params.draw())


def _filter(logits_RV: Tensor, params: RowParams) -> Tensor:
    """Min-p, then top-k, then top-p over what is left, in the order vLLM applies them."""
    best_first_RV, order_RV = logits_RV.sort(dim=1, descending=True, stable=True)
    vocab = logits_RV.shape[1]
    probability_RV = best_first_RV.softmax(1)
    drop_RV = probability_RV < params.min_p_R[:, None] * probability_RV[:, :1]
    top_k_R = torch.where(params.top_k_R > 0, params.top_k_R, vocab)
    drop_RV |= torch.arange(vocab, device=logits_RV.device) >= top_k_R[:, None]
    best_first_RV = best_first_RV.masked_fill(drop_RV, -torch.inf)
    probability_RV = best_first_RV.softmax(1)
    before_RV = probability_RV.cumsum(1) - probability_RV
    past_nucleus_RV = before_RV >= params.top_p_R[:, None]
    past_nucleus_RV &= (params.top_p_R < 1.0)[:, None]
    past_nucleus_RV[:, 0] = False
    best_first_RV = best_first_RV.masked_fill(past_nucleus_RV, -torch.inf)
    return torch.empty_like(best_first_RV).scatter_(1, order_RV, best_first_RV)
