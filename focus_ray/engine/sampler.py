"""Which token each masked position would take, and how sure the model is of it.

R rows of logits (masked positions), V vocabulary, K stop ids. A draw depends on the request's
seed, the token's absolute position and the number of the step within its block, and on nothing
else: not on the batch, not on the slot, not on what was drawn before.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    (focus-algorithm 1.4; temperature 1 for greedy rows). The mask id is never chosen.

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

    sampled_R = params.temperature_R > 0
    scale_R = torch.where(sampled_R, params.temperature_R, 1.0)
    scaled_RV = logits_RV / scale_R[:, None]
    candidates_RV = candidates_RV / scale_R[:, None]
    candidates_RV[:, mask_token_id] = -torch.inf
    if any_filtered:
        candidates_RV = _filter(candidates_RV, params)
    drawn_R = (candidates_RV + _gumbel(params, logits_RV.shape[1])).argmax(1)
    token_R = torch.where(sampled_R, drawn_R, token_R)
    return Choice(token_R, _logprob(scaled_RV, token_R).exp(), _logprob(logits_RV, token_R))


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
    key_R = _mix(params.seed_R & _LOW_32)
    for part_R in ((params.seed_R >> 32) & _LOW_32, params.position_R, params.step_R):
        key_R = _mix(key_R ^ _mix(part_R + 0x9E3779B9))
    token_V = torch.arange(vocab, device=key_R.device) * 0x9E3779B1 & _LOW_32
    bits_RV = _mix(_mix(key_R[:, None] + token_V & _LOW_32) ^ key_R[:, None])
    # float64: the nearest float32 of the largest value would be 1, whose noise is infinite
    uniform_RV = (bits_RV.double() + 0.5) / 2.0**32
    return -torch.log(-torch.log(uniform_RV)).float()


def _mix(x: Tensor) -> Tensor:
    """Finaliser of MurmurHash3 (Appleby, public domain) on the low 32 bits of int64 values."""
    x = x & _LOW_32
    x = (x ^ (x >> 16)) * 0x85EBCA6B & _LOW_32
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & _LOW_32
    return x ^ (x >> 16)
