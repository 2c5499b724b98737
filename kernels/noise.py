"""Exponential noise for drawing tokens, from a counter-based generator.

R rows, V vocabulary. The value of a token is a function of its row's seed, position and denoising
step and of its id: no generator has a state, so nothing else in the batch can change a draw.

Of tokens that weigh ``w``, the one with the largest ``w / noise`` is a draw in proportion to the
weights: the first of clocks that ring at rates ``w`` (the Gumbel-max trick before its logarithm,
whose differences of logarithms would cost a second one).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOW_32 = 0xFFFFFFFF


def exponential_noise(
    seed_R: Tensor, position_R: Tensor, step_R: Tensor, vocab_size: int, first_id: int = 0
) -> Tensor:
    """``[R, V]`` float32, each an independent draw from the standard exponential distribution.

    Above 1e-10 and below 17, so the largest quotient of weights up to 1 neither overflows nor
    vanishes.

    Args:
        seed_R: int64, any value.
        position_R, step_R: int64, not negative.
        vocab_size, first_id: V ids, counted from the first one.
    """
    # two keys: one of 32 bits would be shared by some pair among 65 000 seeds
    first_R1, second_R1 = (
        _row_key(seed_R, position_R, step_R, start)[:, None] for start in (0, 0x6A09E667)
    )
    token_V = torch.arange(first_id, first_id + vocab_size, device=seed_R.device) * 0x9E3779B1
    return _exponential(_mix(_mix(first_R1 + token_V) ^ second_R1))


def _exponential(bits: Tensor) -> Tensor:
    """``-log(1 - uniform)``, where ``uniform`` is 32 bits, in int64, seen as a fraction."""
    uniform = (bits.to(torch.float32) + 0.5) * 2.0**-32
    # the nearest float32 of the largest fractions is 1, whose noise would be infinite
    return uniform.clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_()


def _row_key(seed_R: Tensor, position_R: Tensor, step_R: Tensor, start: int) -> Tensor:
    """``[R]`` a hash of seed, position and step in 32 bits; another one for another ``start``."""
    key_R = _mix(seed_R ^ start)
    for part_R in (seed_R >> 32, position_R, step_R):
        key_R = _mix(key_R ^ _mix(part_R + 0x9E3779B9))
    return key_R


def _mix(x: Tensor) -> Tensor:
    """Finaliser of MurmurHash3 (Appleby, public domain) on the low 32 bits of int64 values."""
    x = x & _LOW_32
    x = (x ^ (x >> 16)) * 0x85EBCA6B & _LOW_32
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & _LOW_32
    return x ^ (x >> 16)


@triton.jit
def noise_keys(seed, position, step):
    """Both keys of a row, uint32, of its int64 values."""
    return _row_key_jit(seed, position, step, 0), _row_key_jit(seed, position, step, 0x6A09E667)


@triton.jit
def noise_of_tokens(first_key, second_key, token):
    """``exponential_noise`` of the tokens of these int32 ids, one row's two keys given."""
    return _exponential_jit(
        _mix_jit(_mix_jit(first_key + token.to(tl.uint32) * 0x9E3779B1) ^ second_key)
    )


@triton.jit
def _exponential_jit(bits):
    """``_exponential`` of uint32 bits."""
    uniform = tl.minimum((bits.to(tl.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    # A logarithm near 1 has no correct digits left where 1 - uniform was rounded; the noise of the
    # best token is nearly always there. The series' first term left out is 1e-10 of the sum.
    series = 1 / 6
    series = uniform * series + 1 / 5
    series = uniform * series + 1 / 4
    series = uniform * series + 1 / 3
    series = uniform * series + 1 / 2
    series = uniform * series + 1
    return tl.where(uniform < 1 / 32, uniform * series, -tl.log(1 - uniform))


@triton.jit
def _row_key_jit(seed, position, step, START: tl.constexpr):
    key = _mix_jit(seed.to(tl.uint32) ^ START)
    key = _mix_jit(key ^ _mix_jit((seed >> 32).to(tl.uint32) + 0x9E3779B9))
    key = _mix_jit(key ^ _mix_jit(position.to(tl.uint32) + 0x9E3779B9))
    return _mix_jit(key ^ _mix_jit(step.to(tl.uint32) + 0x9E3779B9))


@triton.jit
def _mix_jit(x):
    """``_mix`` in 32 bits: products wrap, and right shifts of unsigned values bring in zeros."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)
