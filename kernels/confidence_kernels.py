"""The kernel of ``confidence``, and of a rank's part of it: one pass over each row of logits.

R rows of logits, V ids that they hold, K suppressed ids.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from focus_ray.kernels.noise import noise_keys, noise_of_tokens

# One program per row whatever R is: what a row yields does not depend on the batch, to the last
# bit. A lane takes GROUP neighbouring ids at once, 16 bytes of half precision.
# Measured on an H100 with 16 to 1800 rows of 151936; tiles read ahead (num_stages) slow it down.
LANES = 1024
GROUP = 8
NUM_WARPS = 16

_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_TINIEST = tl.constexpr(torch.finfo(torch.float32).tiny)


def launch_confidence(
    logits_RV: Tensor,
    mask_token_id: int,
    suppressed_RK: Tensor | None,
    draw: Sequence[Tensor] | None,
    choice: Sequence[Tensor] | None,
    *,
    part_FR: Tensor | None = None,
    first_id: int = 0,
) -> None:
    """Write what ``confidence`` returns into ``choice``, or a rank's part of it into ``part_FR``.

    Args:
        draw: the tensors of a ``Draw``, in its order.
        choice: those of a ``Choice``; None where a part is wanted.
        first_id: of the V ids, as all other ids are counted.
    """
    num_rows, vocab = logits_RV.shape
    if not num_rows:
        return
    num_suppressed = 0 if suppressed_RK is None else suppressed_RK.shape[1]
    _confidence_kernel[(num_rows,)](
        logits_RV,
        None if suppressed_RK is None else suppressed_RK.contiguous(),
        *((None,) * 4 if draw is None else (t.contiguous() for t in draw)),
        *((None,) * 3 if choice is None else choice),
        part_FR,
        logits_RV.stride(0),
        num_rows,
        vocab,
        mask_token_id,
        FIRST_ID=first_id,
        NUM_SUPPRESSED=num_suppressed,
        DRAWN=draw is not None,
        LANES=LANES,
        GROUP=GROUP,
        BLOCK_EXCLUDED=triton.next_power_of_2(num_suppressed + 1),
        num_warps=NUM_WARPS,
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
    part_ptr,
    logits_stride_r,
    num_rows,
    vocab,
    mask_token_id,
    FIRST_ID: tl.constexpr,
    NUM_SUPPRESSED: tl.constexpr,
    DRAWN: tl.constexpr,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_EXCLUDED: tl.constexpr,
):
    # One program per row, which it reads once. In here ids count from the row's first logit.
    r = tl.program_id(0).to(tl.int64)
    logits_ptr += r * logits_stride_r
    mask_token_id -= FIRST_ID
    excluded = tl.full((BLOCK_EXCLUDED,), mask_token_id, tl.int64)
    if NUM_SUPPRESSED > 0:
        suppressed_ptr += r * NUM_SUPPRESSED
        place = tl.arange(0, BLOCK_EXCLUDED)
        listed = (place > 0) & (place <= NUM_SUPPRESSED)
        excluded = tl.load(suppressed_ptr + place - 1, mask=listed, other=mask_token_id + FIRST_ID)
        excluded -= FIRST_ID
    if DRAWN:
        temperature = tl.load(temperature_ptr + r)
        inverse_temperature = 1.0 / tl.maximum(temperature, _TINIEST)
        if temperature > 0:
            seed, position = tl.load(seed_ptr + r), tl.load(position_ptr + r)
            first_key, second_key = noise_keys(seed, position, tl.load(step_ptr + r))
            token, best, top, total, cooled_total = _scan_row(
                logits_ptr,
                suppressed_ptr,
                vocab,
                mask_token_id,
                FIRST_ID,
                NUM_SUPPRESSED,
                LANES,
                GROUP,
                True,
                inverse_temperature,
                first_key,
                second_key,
            )
        else:
            token, best, top, total, cooled_total = _scan_row(
                logits_ptr,
                suppressed_ptr,
                vocab,
                mask_token_id,
                FIRST_ID,
                NUM_SUPPRESSED,
                LANES,
                GROUP,
                False,
            )
    else:
        token, best, top, total, cooled_total = _scan_row(
            logits_ptr,
            suppressed_ptr,
            vocab,
            mask_token_id,
            FIRST_ID,
            NUM_SUPPRESSED,
            LANES,
            GROUP,
            False,
        )

    if token == vocab:  # nothing to choose by: the lowest id that may be chosen
        low = tl.arange(0, 2 * BLOCK_EXCLUDED)
        barred = tl.max((low[:, None] == excluded[None, :]).to(tl.int32), axis=1)
        token = tl.minimum(tl.min(tl.where(barred == 0, low, vocab), axis=0), vocab)

    # What may not be chosen counts all the same; the mask id, which pads the list, once.
    counted = (tl.arange(0, BLOCK_EXCLUDED) == 0) | (excluded != mask_token_id)
    counted &= (excluded >= 0) & (excluded < vocab)
    logit = tl.load(logits_ptr + excluded, mask=counted, other=-float("inf")).to(tl.float32)
    chosen = tl.load(logits_ptr + tl.minimum(token, vocab - 1)).to(tl.float32)
    top_of_all = tl.maximum(top, tl.max(logit, axis=0))
    total = total * tl.exp(top - top_of_all) + tl.sum(tl.exp(logit - top_of_all), axis=0)
    if DRAWN:
        fade = tl.exp((top - top_of_all) * inverse_temperature)
        weight = tl.exp((logit - top_of_all) * inverse_temperature)
        cooled_total = cooled_total * fade + tl.sum(weight, axis=0)
    if part_ptr is not None:
        part_ptr += r
        tl.store(part_ptr, tl.where(token < vocab, token + FIRST_ID, -1).to(tl.int32))
        tl.store(part_ptr + num_rows, best.to(tl.int32, bitcast=True))
        tl.store(part_ptr + 2 * num_rows, chosen.to(tl.int32, bitcast=True))
        tl.store(part_ptr + 3 * num_rows, top.to(tl.int32, bitcast=True))
        tl.store(part_ptr + 4 * num_rows, top_of_all.to(tl.int32, bitcast=True))
        tl.store(part_ptr + 5 * num_rows, total.to(tl.int32, bitcast=True))
        tl.store(part_ptr + 6 * num_rows, cooled_total.to(tl.int32, bitcast=True))
    else:
        logprob = chosen - top_of_all - tl.log(total)
        confidence = tl.exp(logprob)
        if DRAWN:
            cooled = tl.exp((chosen - top_of_all) * inverse_temperature) / cooled_total
            confidence = tl.where(temperature > 0, cooled, confidence)
        tl.store(token_ptr + r, tl.minimum(token, vocab - 1).to(tl.int64))
        tl.store(confidence_ptr + r, confidence)
        tl.store(logprob_ptr + r, logprob)


@triton.jit
def _scan_row(
    logits_ptr,
    suppressed_ptr,
    vocab,
    mask_token_id,
    FIRST_ID: tl.constexpr,
    NUM_SUPPRESSED: tl.constexpr,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
    DRAW: tl.constexpr,
    inverse_temperature=1.0,
    first_key=0,
    second_key=0,
):
    """Token of a row and its score; highest logit, sum of weights, their sum at its temperature.

    All of tokens that may be chosen; weights, and scores of draws, are relative to the highest
    logit. Each lane goes through its groups of neighbouring ids on its own and lanes meet at the
    end, so there is no barrier in the loop. The token is ``vocab`` where no logit is a number above
    -inf.
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
                suppressed = tl.load(suppressed_ptr + k) - FIRST_ID
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
            score = weight / noise_of_tokens(first_key, second_key, token + FIRST_ID)
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
    best_of_row = tl.max(best, axis=0)
    is_best = (best == best_of_row) & (best > worst)
    token_of_row = tl.min(tl.where(is_best, best_token, vocab), axis=0)
    return token_of_row, best_of_row, top_of_row, total, cooled_total
