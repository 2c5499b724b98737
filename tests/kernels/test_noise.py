from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from focus_ray.kernels.launch import can_launch
from focus_ray.kernels.noise import (
    _exponential,
    _exponential_jit,
    _row_key,
    exponential_noise,
    noise_keys,
    noise_of_tokens,
)

VOCAB = 5000


def rows(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def test_noise_is_exponential() -> None:
    num_rows = 200
    position_R = torch.arange(num_rows)
    zero_R = torch.zeros_like(position_R)
    noise_RV = exponential_noise(zero_R, position_R, zero_R, VOCAB)
    assert noise_RV.dtype == torch.float32
    assert noise_RV.min() > 1e-10
    assert noise_RV.max() < 17
    sorted_n = noise_RV.flatten().double().sort().values
    ranks_n = (torch.arange(len(sorted_n)) + 0.5) / len(sorted_n)
    distance = ((1 - (-sorted_n).exp()) - ranks_n).abs().max()
    # Kolmogorov and Smirnov: 1.95 / sqrt(n) has a tail of 0.001, and the noise is fixed
    assert distance < 1.95 / len(sorted_n) ** 0.5


@pytest.mark.parametrize(
    ("seed", "position", "step"),
    [
        pytest.param(1, 0, 0, id="another seed"),
        pytest.param(1 << 40, 0, 0, id="a seed that differs in its high half"),
        pytest.param(-1, 0, 0, id="a negative seed"),
        pytest.param(0, 1, 0, id="another position"),
        pytest.param(0, 0, 1, id="another step"),
    ],
)
def test_each_part_of_the_key_changes_the_noise(seed: int, position: int, step: int) -> None:
    base_V = exponential_noise(rows(0), rows(0), rows(0), VOCAB)[0]
    other_V = exponential_noise(rows(seed), rows(position), rows(step), VOCAB)[0]
    both_2V = torch.stack([base_V, other_V])
    assert both_2V.corrcoef()[0, 1].abs() < 4 / VOCAB**0.5


def test_seeds_that_share_half_a_key_draw_differently() -> None:
    # the first two of the random seeds whose first keys are equal; 32 bits make that common
    seed_R = torch.randint(2**62, (300_000,), generator=torch.Generator().manual_seed(0))
    zero_R = torch.zeros_like(seed_R)
    first_R = _row_key(seed_R, zero_R, zero_R, 0)
    order_R = first_R.argsort()
    twins = (first_R[order_R][1:] == first_R[order_R][:-1]).nonzero()[:, 0]
    assert len(twins)
    pair = seed_R[order_R[twins[0] : twins[0] + 2]]
    both_2V = exponential_noise(pair, zero_R[:2], zero_R[:2], VOCAB)
    assert both_2V.corrcoef()[0, 1].abs() < 4 / VOCAB**0.5


@triton.jit
def _noise_kernel(seed_ptr, position_ptr, step_ptr, out_ptr, vocab, BLOCK: tl.constexpr):
    r = tl.program_id(0)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first_key, second_key = noise_keys(
        tl.load(seed_ptr + r), tl.load(position_ptr + r), tl.load(step_ptr + r)
    )
    noise = noise_of_tokens(first_key, second_key, token)
    tl.store(out_ptr + r * vocab + token, noise, mask=token < vocab)


def test_kernels_have_the_same_noise(device: torch.device) -> None:
    seed_R = rows(0, 1, -1, 1 << 40, 2**63 - 1, -(2**63)).to(device)
    if not can_launch(seed_R):
        pytest.skip("needs CUDA or TRITON_INTERPRET=1: the definition is all there is")
    position_R, step_R = rows(0, 1, 131_071, 5, 2, 3).to(device), rows(0, 63, 1, 2, 3, 4).to(device)
    vocab = 151_936
    found_RV = torch.full((len(seed_R), vocab), torch.nan, device=device)
    _noise_kernel[(len(seed_R), triton.cdiv(vocab, 32_768))](
        seed_R, position_R, step_R, found_RV, vocab, BLOCK=32_768
    )
    expected_RV = exponential_noise(seed_R, position_R, step_R, vocab)
    torch.testing.assert_close(found_RV, expected_RV, rtol=4e-6, atol=0)


@triton.jit
def _exponential_kernel(bits_ptr, out_ptr, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(out_ptr + place, _exponential_jit(tl.load(bits_ptr + place).to(tl.uint32)))


def test_no_bits_give_zero_or_infinite_noise(device: torch.device) -> None:
    last = 2**32 - 1
    bits = rows(0, 1, 2**27 - 1, 2**27, 2**31, last - 256, last - 128, last).to(device)
    fraction = ((bits.float() + 0.5) / 2**32).double()
    expected = -torch.log1p(-fraction.clamp(max=1 - 2.0**-24))
    torch.testing.assert_close(_exponential(bits).double(), expected, rtol=4e-6, atol=0)
    if can_launch(bits):
        found = torch.full((len(bits),), torch.nan, device=device)
        _exponential_kernel[(1,)](bits, found, BLOCK=len(bits))
        torch.testing.assert_close(found.double(), expected, rtol=4e-6, atol=0)
