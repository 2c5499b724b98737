"""Which token each masked position would take, and how sure the model is of it.

R rows of logits (masked positions), V vocabulary, K stop ids. A draw depends on the request's
seed, the token's absolute position and the number of the step within its block, and on nothing
else: not on the batch, not on the slot, not on what was drawn before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from focus_ray.kernels.confidence import confidence

_LOW_32 = 0xFFFFFFFF


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

    def take(self, rows_S: Tensor) -> RowParams:
        """The parameters of some of the rows."""
        fields: dict[str, Any] = {
            name: None if t is None else t[rows_S] for name, t in vars(self).items()
        }
        return RowParams(**fields)


@dataclass(frozen=True)
class Choice:
    """Token of each row, its probability, and its log probability at temperature 1."""

    token_R: Tensor
    confidence_R: Tensor
    logprob_R: Tensor


def choose_tokens(
    logits_RV: Tensor,
    params: RowParams,
    *,
    mask_token_id: int,
    any_sampled: bool,
    any_filtered: bool,
) -> Choice:
    """Take the arg-max or draw a token for every row.

    Confidence is the probability of the chosen token under the softmax of ``logits / temperature``
    over the whole vocabulary, before top-k, top-p and min-p and whatever is suppressed
    (temperature 1 for greedy rows), as in sands-lab/FOCUS (commit 277f1d1). The mask id is never
    chosen.

    Args:
        logits_RV: float32; not changed.
        any_sampled, any_filtered: False skips work that no row needs.
    """
    candidates_RV = logits_RV
    if params.suppressed_RK is not None:
        candidates_RV = logits_RV.scatter(1, params.suppressed_RK, -torch.inf)
    token_R, logprob_R = confidence(candidates_RV, mask_token_id)
    if params.suppressed_RK is not None:
        logprob_R = _logprob(logits_RV, token_R)
    if not any_sampled:
        return Choice(token_R, logprob_R.exp(), logprob_R)

    rows_S = params.temperature_R.nonzero()[:, 0]  # greedy neighbours are spared the noise
    drawn = _draw(
        logits_RV[rows_S], candidates_RV[rows_S], params.take(rows_S), mask_token_id, any_filtered
    )
    return Choice(
        token_R.index_copy(0, rows_S, drawn.token_R),
        logprob_R.exp().index_copy(0, rows_S, drawn.confidence_R),
        logprob_R.index_copy(0, rows_S, drawn.logprob_R),
    )


def _draw(
    logits_RV: Tensor,
    candidates_RV: Tensor,
    params: RowParams,
    mask_token_id: int,
    any_filtered: bool,
) -> Choice:
    candidates_RV[:, mask_token_id] = -torch.inf  # a copy: rows were selected
    candidates_RV = _cool(candidates_RV, params.temperature_R)
    if any_filtered:
        candidates_RV = _filter(candidates_RV, params)
    token_R = (candidates_RV + _gumbel(params, logits_RV.shape[1])).argmax(1)
    scaled_RV = _cool(logits_RV, params.temperature_R)
    return Choice(token_R, _logprob(scaled_RV, token_R).exp(), _logprob(logits_RV, token_R))


def _cool(logits_RV: Tensor, temperature_R: Tensor) -> Tensor:
    """Divide by the temperature, down from the best: the coldest leaves ``0`` and ``-inf``."""
    temperature_R1 = temperature_R[:, None].clamp_min(torch.finfo(torch.float32).tiny)
    return (logits_RV - logits_RV.amax(1, keepdim=True)) / temperature_R1


def _logprob(logits_RV: Tensor, token_R: Tensor) -> Tensor:
    chosen_R = logits_RV.gather(1, token_R[:, None])[:, 0]
    return chosen_R - logits_RV.logsumexp(1)


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


def _gumbel(params: RowParams, vocab: int) -> Tensor:
    """Standard Gumbel noise ``[R, V]`` float32 from a counter-based generator.

    The arg-max of logits plus this noise is a draw from their softmax (the Gumbel-max trick).
    """
    # two keys: one of 32 bits would be shared by some pair among 65 000 seeds
    first_R1, second_R1 = (_key(params, start)[:, None] for start in (0, 0x6A09E667))
    token_V = torch.arange(vocab, device=first_R1.device) * 0x9E3779B1
    bits_RV = _mix(_mix(first_R1 + token_V) ^ second_R1)
    # float64: the nearest float32 of the largest value would be 1, whose noise is infinite
    uniform_RV = (bits_RV.double() + 0.5) / 2.0**32
    return -torch.log(-torch.log(uniform_RV)).float()


def _key(params: RowParams, start: int) -> Tensor:
    """``[R]`` a hash of seed, position and step in 32 bits; another one for another ``start``."""
    key_R = _mix(params.seed_R ^ start)
    for part_R in (params.seed_R >> 32, params.position_R, params.step_R):
        key_R = _mix(key_R ^ _mix(part_R + 0x9E3779B9))
    return key_R


def _mix(x: Tensor) -> Tensor:
    """Finaliser of MurmurHash3 (Appleby, public domain) on the low 32 bits of int64 values."""
    x = x & _LOW_32
    x = (x ^ (x >> 16)) * 0x85EBCA6B & _LOW_32
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & _LOW_32
    return x ^ (x >> 16)
