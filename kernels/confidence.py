"""The token a masked position would take, and how sure the model is of it.

R rows of logits, V vocabulary, K suppressed ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from focus_ray.kernels.launch import can_launch
from focus_ray.kernels.noise import exponential_noise, noise_keys, noise_of_tokens

# One program per row whatever R is: what a row yields does not depend on the batch, to the last
# bit. A lane takes GROUP neighbouring ids at once, 16 bytes of half precision.
# Measured on an H100 with 16 to 1800 rows of 151936; tiles read ahead (num_stages) slow it down.
LANES = 1024
GROUP = 8
NUM_WARPS = 16

_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_TINIEST = tl.constexpr(torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class Draw:
    """Which rows draw their token instead of taking the best, and what their noise depends on.

    Args:
        temperature_R: float32; 0 takes the best.
        seed_R, position_R, step_R: int64, see ``exponential_noise``.
    """

    temperature_R: Tensor
    seed_R: Tensor
    position_R: Tensor
    step_R: Tensor

    def take(self, rows_S: Tensor) -> Draw:
        """That of some of the rows."""
        return Draw(**{name: t[rows_S] for name, t in vars(self).items()})


@dataclass(frozen=True)
class Choice:
    """Token of each row, its probability, and its natural log probability at temperature 1.

    Args:
        token_R: int64.
        confidence_R: float32, at the row's temperature, or at 1 where it is 0.
        logprob_R: float32.
    """

    token_R: Tensor
    confidence_R: Tensor
    logprob_R: Tensor

    def replace(self, rows_S: Tensor, other: Choice) -> Choice:
        """With the choice of some of the rows taken from ``other``."""
        return Choice(
            **{
                name: t.index_copy(0, rows_S, getattr(other, name))
                for name, t in vars(self).items()
            }
        )


def confidence(
    logits_RV: Tensor,
    mask_token_id: int,
    *,
    suppressed_RK: Tensor | None = None,
    draw: Draw | None = None,
) -> Choice:
    """Choose a token for each row, never the mask, and say how probable it is.

    Probabilities are of the softmax over the whole vocabulary, the mask token and suppressed ids
    included: a model that would rather keep the mask is unsure. Writing the mask token itself
    would only lose the step, hence it is never chosen.

    A row that holds a NaN, or nothing above -inf, has no probabilities: they are NaN; one with
    +inf has none of meaning. The token is still one that may be chosen, and never a NaN's while
    there is another.

    Args:
        logits_RV: ``[R, V]``, any float dtype, unit stride along V; computed in float32.
        mask_token_id: in ``[0, V)``, V at least 2.
        suppressed_RK: int64 ``[R, K]`` ids in ``[0, V)`` that a row may not choose, each once;
            padded with the mask id. None: there are none.
        draw: None: every row takes its best token, the lowest id where several are best.

    Raises:
        ValueError: a shape, dtype or stride differs from the above, or the mask id is no id.
    """
    if logits_RV.ndim != 2 or logits_RV.shape[1] < 2 or logits_RV.stride(1) != 1:
        raise ValueError(
            f"logits_RV must be [R, V] with V >= 2 and unit stride along V, got "
            f"{tuple(logits_RV.shape)} with strides {logits_RV.stride()}"
        )
    num_rows, vocab = logits_RV.shape
    if not 0 <= mask_token_id < vocab:
        raise ValueError(f"mask_token_id {mask_token_id} is not in [0, {vocab})")
    _check_parameters(num_rows, suppressed_RK, draw)
    if not can_launch(logits_RV):
        return confidence_reference(
            logits_RV, mask_token_id, suppressed_RK=suppressed_RK, draw=draw
        )
    choice = Choice(
        logits_RV.new_empty(num_rows, dtype=torch.int64),
        logits_RV.new_empty(num_rows, dtype=torch.float32),
        logits_RV.new_empty(num_rows, dtype=torch.float32),
    )
    num_suppressed = 0 if suppressed_RK is None else suppressed_RK.shape[1]
    if num_rows:
        _confidence_kernel[(num_rows,)](
            logits_RV,
            None if suppressed_RK is None else suppressed_RK.contiguous(),
            *((None,) * 4 if draw is None else (t.contiguous() for t in vars(draw).values())),
            choice.token_R,
            choice.confidence_R,
            choice.logprob_R,
            logits_RV.stride(0),
            vocab,
            mask_token_id,
            NUM_SUPPRESSED=num_suppressed,
            DRAWN=draw is not None,
            LANES=LANES,
            GROUP=GROUP,
            BLOCK_EXCLUDED=triton.next_power_of_2(num_suppressed + 1),
            num_warps=NUM_WARPS,
        )
    return choice


def _check_parameters(num_rows: int, suppressed_RK: Tensor | None, draw: Draw | None) -> None:
    if suppressed_RK is not None and (
        suppressed_RK.ndim != 2
        or len(suppressed_RK) != num_rows
        or suppressed_RK.dtype != torch.int64
    ):
        raise ValueError(
            f"suppressed_RK must be int64 [{num_rows}, K], got {suppressed_RK.dtype} "
            f"{tuple(suppressed_RK.shape)}"
        )
    for name, part_R in vars(draw).items() if draw is not None else ():
        dtype = torch.float32 if name == "temperature_R" else torch.int64
        if part_R.shape != (num_rows,) or part_R.dtype != dtype:
            raise ValueError(
                f"{name} must be {str(dtype).removeprefix('torch.')} [{num_rows}], got "
                f"{part_R.dtype} {tuple(part_R.shape)}"
            )


def confidence_reference(
    logits_RV: Tensor,
    mask_token_id: int,
    *,
    suppressed_RK: Tensor | None = None,
    draw: Draw | None = None,
) -> Choice:
    """The definition."""
    logits_RV = logits_RV.to(torch.float32)
    candidates_RV = candidates(logits_RV, mask_token_id, suppressed_RK)
    token_R = candidates_RV.argmax(1)  # the first of equal values
    logprob_R = log_probability(logits_RV, token_R)
    best = Choice(token_R, logprob_R.exp(), logprob_R)
    if draw is None:
        return best
    rows_S = draw.temperature_R.nonzero()[:, 0]  # the others are spared the noise
    draw = draw.take(rows_S)
    weights_SV = cool(candidates_RV[rows_S], draw.temperature_R).exp()
    drawn = draw_token(logits_RV[rows_S], weights_SV, draw)
    return best.replace(rows_S, drawn)


def candidates(
    logits_RV: Tensor, mask_token_id: int, suppressed_RK: Tensor | None = None
) -> Tensor:
    """A copy of float32 logits: finite where a token may be chosen, -inf where it may not."""
    candidates_RV = logits_RV.nan_to_num(nan=torch.finfo(torch.float32).min)
    candidates_RV[:, mask_token_id] = -torch.inf
    if suppressed_RK is not None:
        candidates_RV.scatter_(1, suppressed_RK, -torch.inf)
    return candidates_RV


def cool(logits_RV: Tensor, temperature_R: Tensor) -> Tensor:
    """Divide by the temperature, down from the best: the coldest leaves ``0`` and ``-inf``."""
    temperature_R1 = temperature_R[:, None].clamp_min(torch.finfo(torch.float32).tiny)
    return (logits_RV - logits_RV.amax(1, keepdim=True)) / temperature_R1


def log_probability(logits_RV: Tensor, token_R: Tensor) -> Tensor:
    """``[R]`` of one token of each row, at temperature 1."""
    chosen_R = logits_RV.gather(1, token_R[:, None])[:, 0]
    return chosen_R - logits_RV.logsumexp(1)


def draw_token(logits_RV: Tensor, weights_RV: Tensor, draw: Draw) -> Choice:
    """Draw in proportion to ``weights_RV``; probabilities are those of all ``logits_RV``."""
    noise_RV = exponential_noise(draw.seed_R, draw.position_R, draw.step_R, logits_RV.shape[1])
    token_R = (weights_RV / noise_RV).argmax(1)
    cooled_RV = cool(logits_RV, draw.temperature_R)
    return Choice(
        token_R, log_probability(cooled_RV, token_R).exp(), log_probability(logits_RV, token_R)
    )


@triton.jit
def _confidence_kernel(
    logits_ptr,
    suppressed_ptr,
    temperature_ptr,
    seed_ptr,
    position_ptr,
    step_ptr,
    token_ptr,
    confidence_ptr,
    logprob_ptr,
    logits_stride_r,
    vocab,
    mask_token_id,
    NUM_SUPPRESSED: tl.constexpr,
    DRAWN: tl.constexpr,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_EXCLUDED: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)  # one program per row, which it reads once
    logits_ptr += r * logits_stride_r
    excluded = tl.full((BLOCK_EXCLUDED,), mask_token_id, tl.int64)
    if NUM_SUPPRESSED > 0:
        suppressed_ptr += r * NUM_SUPPRESSED
        place = tl.arange(0, BLOCK_EXCLUDED)
        listed = (place > 0) & (place <= NUM_SUPPRESSED)
        excluded = tl.load(suppressed_ptr + place - 1, mask=listed, other=mask_token_id)
    if DRAWN:
        temperature = tl.load(temperature_ptr + r)
        inverse_temperature = 1.0 / tl.maximum(temperature, _TINIEST)
        if temperature > 0:
            seed, position = tl.load(seed_ptr + r), tl.load(position_ptr + r)
            first_key, second_key = noise_keys(seed, position, tl.load(step_ptr + r))
            token, top, total, cooled_total = _scan_row(
                logits_ptr,
                suppressed_ptr,
                vocab,
                mask_token_id,
                NUM_SUPPRESSED,
                LANES,
                GROUP,
                True,
                inverse_temperature,
                first_key,
                second_key,
            )
        else:
            token, top, total, cooled_total = _scan_row(
                logits_ptr,
                suppressed_ptr,
                vocab,
                mask_token_id,
                NUM_SUPPRESSED,
                LANES,
                GROUP,
                False,
            )
    else:
        token, top, total, cooled_total = _scan_row(
            logits_ptr,
            suppressed_ptr,
            vocab,
            mask_token_id,
            NUM_SUPPRESSED,
            LANES,
            GROUP,
            False,
        )

    if token == vocab:  # nothing to choose by: the lowest id that may be chosen
        low = tl.arange(0, 2 * BLOCK_EXCLUDED)
        barred = tl.max((low[:, None] == excluded[None, :]).to(tl.int32), axis=1)
        token = tl.minimum(tl.min(tl.where(barred == 0, low, vocab), axis=0), vocab - 1)

    # What may not be chosen counts all the same; the mask id, which pads the list, once.
    counted = (tl.arange(0, BLOCK_EXCLUDED) == 0) | (excluded != mask_token_id)
    logit = tl.load(logits_ptr + excluded, mask=counted, other=-float("inf")).to(tl.float32)
    chosen = tl.load(logits_ptr + token).to(tl.float32)
    top_of_all = tl.maximum(top, tl.max(logit, axis=0))
    total = total * tl.exp(top - top_of_all) + tl.sum(tl.exp(logit - top_of_all), axis=0)
    logprob = chosen - top_of_all - tl.log(total)
    confidence = tl.exp(logprob)
    if DRAWN:
        fade = tl.exp((top - top_of_all) * inverse_temperature)
        weight = tl.exp((logit - top_of_all) * inverse_temperature)
        cooled_total = cooled_total * fade + tl.sum(weight, axis=0)
        cooled = tl.exp((chosen - top_of_all) * inverse_temperature) / cooled_total
        confidence = tl.where(temperature > 0, cooled, confidence)
    tl.store(token_ptr + r, token.to(tl.int64))
    tl.store(confidence_ptr + r, confidence)
    tl.store(logprob_ptr + r, logprob)


@triton.jit
def _scan_row(
    logits_ptr,
    suppressed_ptr,
    vocab,
    mask_token_id,
    NUM_SUPPRESSED: tl.constexpr,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
    DRAW: tl.constexpr,
    inverse_temperature=1.0,
    first_key=0,
    second_key=0,
):
    """Token of a row; highest logit, sum of weights, and their sum at its temperature.

    All of tokens that may be chosen; weights are relative to the highest logit. Each lane goes
    through its groups of neighbouring ids on its own and lanes meet at the end, so there is no
    barrier in the loop. The token is ``vocab`` where no logit is a number above -inf.
    """
    lane = tl.arange(0, LANES)
    top = tl.full((LANES,), _LOWEST, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    cooled_total = tl.zeros((LANES,), tl.float32)
    worst = 0.0 if DRAW else _LOWEST
    best = tl.full((LANES,), worst, tl.float32)
    best_token = tl.zeros((LANES,), tl.int32)
    for start in tl.range(0, vocab, LANES * GROUP, num_stages=1):
        token = start + lane[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        logit = tl.load(logits_ptr + token, mask=token < vocab, other=-float("inf"))
        barred = token == mask_token_id
        if NUM_SUPPRESSED > 0:
            for k in range(NUM_SUPPRESSED):
                suppressed = tl.load(suppressed_ptr + k)
                if (suppressed >= start) & (suppressed < start + LANES * GROUP):
                    barred = barred | (token == suppressed)
        logit = tl.where(barred, -float("inf"), logit.to(tl.float32))

        old_top = top
        top = tl.maximum(top, tl.max(logit, axis=1))
        total = total * tl.exp(old_top - top) + tl.sum(tl.exp(logit - top[:, None]), axis=1)
        if DRAW:
            fade = tl.exp((old_top - top) * inverse_temperature)
            weight = tl.exp((logit - top[:, None]) * inverse_temperature)
            cooled_total = cooled_total * fade + tl.sum(weight, axis=1)
            best *= fade
            score = weight / noise_of_tokens(first_key, second_key, token)
            score = tl.where(weight > 0, score, 0.0)  # a NaN is never the best
        else:
            score = tl.where(logit > _LOWEST, logit, _LOWEST)  # nor here
        best_of_group, index = tl.max(score, axis=1, return_indices=True)
        better = best_of_group > best
        best_token = tl.where(better, start + lane * GROUP + index, best_token)
        best = tl.where(better, best_of_group, best)

    top_of_row = tl.max(top, axis=0)
    total = tl.sum(total * tl.exp(top - top_of_row), axis=0)
    if DRAW:
        fade = tl.exp((top - top_of_row) * inverse_temperature)
        cooled_total = tl.sum(cooled_total * fade, axis=0)
        best *= fade
    else:
        cooled_total = total
    is_best = (best == tl.max(best, axis=0)) & (best > worst)
    return tl.min(tl.where(is_best, best_token, vocab), axis=0), top_of_row, total, cooled_total
