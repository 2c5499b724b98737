from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from focus_ray.kernels.norm_rotary import norm_rotary
from focus_ray.kernels.rotary import rotary_table

# Heads are of size 1, weights up to 2, so results stay below 16: one unit in the last place there,
# since the definition rounds on its way and the formula below in the same places, but from float64.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2**-4, torch.float16: 2**-7}
EPS = 1e-6
NUM_POSITIONS = 40


def norm_and_rotate(x_THd: Tensor, weight: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    """The formula in float64, rounded to the dtype where the contract says so."""

    def rounded(x: Tensor) -> Tensor:
        return x.to(x_THd.dtype).double()

    wide = x_THd.double()
    normed = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    out = rounded(normed)
    half = table.shape[2]
    for t, position in enumerate(positions.tolist()):
        cos, sin = table[position].double()
        for head in out[t]:
            first, second = head[:half].clone(), head[half : 2 * half].clone()
            head[:half] = rounded(first * cos) - rounded(second * sin)
            head[half : 2 * half] = rounded(second * cos) + rounded(first * sin)
    return out.to(x_THd.dtype)


def separate(num_tokens: int, heads: int, head_dim: int) -> Tensor:
    generator = torch.Generator().manual_seed(heads)
    return torch.randn(num_tokens, heads, head_dim, generator=generator)


def part_of_a_product(num_tokens: int, heads: int, head_dim: int) -> Tensor:
    """As one projection of queries, keys and values would give it."""
    return separate(num_tokens, heads + 3, head_dim)[:, 1 : heads + 1]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("make", [separate, part_of_a_product])
@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "num_kv_heads", "head_dim", "rotary_dim"),
    [
        pytest.param(5, 32, 8, 128, 128, id="SDAR-8B"),
        pytest.param(3, 8, 1, 64, 64, id="small heads, eight to one"),
        pytest.param(2, 14, 2, 64, 32, id="a tile of heads not full, half of a head turned"),
        pytest.param(2, 11, 11, 24, 16, id="KV heads in two tiles, a third of a head stays"),
        pytest.param(1, 1, 1, 7, 2, id="one token, one odd head, one pair"),
        pytest.param(0, 4, 2, 8, 8, id="no tokens"),
    ],
)
def test_equals_the_formula(
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    make: Callable[[int, int, int], Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    generator = torch.Generator().manual_seed(0)
    q_THd = make(num_tokens, num_heads, head_dim).to(device, dtype)
    k_TKd = make(num_tokens, num_kv_heads, head_dim).to(device, dtype)
    q_weight, k_weight = (torch.rand(2, head_dim, generator=generator) * 2).to(device, dtype)
    table = rotary_table(NUM_POSITIONS, rotary_dim, 1e4, dtype=dtype, device=device)
    positions_T = torch.randint(NUM_POSITIONS, (num_tokens,), generator=generator).to(device)
    found = norm_rotary(q_THd, k_TKd, q_weight, k_weight, EPS, table, positions_T)
    for x, weight, turned in zip((q_THd, k_TKd), (q_weight, k_weight), found, strict=True):
        assert (turned.shape, turned.dtype) == (x.shape, dtype)
        assert turned.is_contiguous()
        expected = norm_and_rotate(x, weight, table, positions_T)
        torch.testing.assert_close(turned, expected, rtol=0, atol=TOLERANCE[dtype])
        if dtype != torch.float32 and turned.numel() > 1000:
            # float32 seldom falls on the other side of a rounding than float64; a rounding left
            # out moves a tenth of the values
            assert (turned != expected).float().mean() < 0.01


def test_a_token_does_not_feel_the_others(device: torch.device) -> None:
    q_THd, k_TKd = (separate(9, heads, 64).to(device) for heads in (4, 2))
    weight = torch.ones(64, device=device)
    table = rotary_table(NUM_POSITIONS, 64, 1e4, dtype=torch.float32, device=device)
    positions_T = torch.arange(9, device=device)
    together = norm_rotary(q_THd, k_TKd, weight, weight, EPS, table, positions_T)
    alone = norm_rotary(q_THd[4:5], k_TKd[4:5], weight, weight, EPS, table, positions_T[4:5])
    for many, one in zip(together, alone, strict=True):
        assert torch.equal(many[4:5], one)


Arguments = dict[str, Tensor]


def fitting() -> Arguments:
    return {
        "q_THd": torch.zeros(2, 4, 8),
        "k_TKd": torch.zeros(2, 2, 8),
        "q_weight": torch.zeros(8),
        "k_weight": torch.zeros(8),
        "table_P2r2": torch.zeros(3, 2, 4),
        "positions_T": torch.zeros(2, dtype=torch.int64),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"k_TKd": torch.zeros(3, 2, 8)}, "same tokens", id="keys of other tokens"),
        pytest.param(
            {"positions_T": torch.zeros(3, dtype=torch.int64)},
            "same tokens",
            id="positions of other tokens",
        ),
        pytest.param({"table_P2r2": torch.zeros(3, 2, 5)}, "at least 10", id="heads too small"),
        pytest.param({"k_TKd": torch.zeros(2, 2, 6)}, "one size", id="two head sizes"),
        pytest.param({"k_weight": torch.zeros(6)}, r"\[8\]", id="weight of another size"),
        pytest.param({"q_THd": torch.zeros(2, 4, 8).half()}, "one dtype", id="mixed dtypes"),
        pytest.param({"positions_T": torch.zeros(2).int()}, "int64", id="narrow positions"),
        pytest.param(
            {"q_THd": torch.zeros(2, 8, 4).mT}, "unit stride", id="heads across the memory"
        ),
        pytest.param(
            {"table_P2r2": torch.zeros(6, 2, 4)[::2]},
            "contiguous",
            id="every second row of a table",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes: Arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        norm_rotary(**{**fitting(), **changes}, eps=EPS)
