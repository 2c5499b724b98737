from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from focus_ray.kernels.fill_kv import fill_kv
from focus_ray.kernels.norm_rotary import norm_rotary
from focus_ray.kernels.norm_rotary_fill import norm_rotary_fill
from focus_ray.kernels.rotary import rotary_table

NUM_POSITIONS = 40
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_inputs(
    num_tokens: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 8,
    rotary_dim: int = 8,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """A projection as a view of something wider; pages full of other things."""
    generator = torch.Generator().manual_seed(num_heads)
    width = (num_heads + 2 * num_kv_heads) * head_dim
    num_pages = num_tokens // 4 + 2
    projected = torch.randn(num_tokens, width + 3, generator=generator).to(device, dtype)
    weights = (torch.rand(2, head_dim, generator=generator) * 2).to(device, dtype)
    shape = (2, num_pages, 4, num_kv_heads, head_dim)
    pages = torch.randn(shape, generator=generator).to(device, dtype)
    slot_T = torch.randperm(num_pages * 4, generator=generator)[:num_tokens]
    return {
        "qkv_TW": projected[:, :width],
        "q_weight": weights[0],
        "k_weight": weights[1],
        "eps": 1e-6,
        "table_P2r2": rotary_table(
            NUM_POSITIONS, rotary_dim, 1e4, dtype=dtype, device=torch.device(device)
        ),
        "positions_T": torch.randint(NUM_POSITIONS, (num_tokens,), generator=generator).to(device),
        "slot_T": slot_T.to(device),
        "key_pages": pages[0],
        "value_pages": pages[1],
    }


def one_by_one(inputs: dict[str, Any], num_heads: int) -> tuple[Tensor, Tensor]:
    """The two operations whose work it does, on pages of their own."""
    num_kv_heads, head_dim = inputs["key_pages"].shape[2:]
    heads = inputs["qkv_TW"].unflatten(1, (-1, head_dim))
    k_end = num_heads + num_kv_heads
    rotary = (inputs[n] for n in ("q_weight", "k_weight", "eps", "table_P2r2", "positions_T"))
    q_THd, k_TKd = norm_rotary(heads[:, :num_heads], heads[:, num_heads:k_end], *rotary)
    pages = (inputs["slot_T"], inputs["key_pages"], inputs["value_pages"])
    fill_kv(k_TKd, heads[:, k_end:], *pages)
    return q_THd, k_TKd


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keep_keys", [True, False], ids=["keys kept", "keys in pages alone"])
@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "num_kv_heads", "head_dim", "rotary_dim"),
    [
        pytest.param(5, 32, 8, 128, 128, id="SDAR-8B"),
        pytest.param(3, 8, 1, 64, 64, id="small heads, eight to one"),
        pytest.param(6, 14, 2, 24, 16, id="a tile of heads not full, a third of a head stays"),
        pytest.param(2, 11, 11, 64, 32, id="KV heads in two tiles, half of a head turned"),
        pytest.param(1, 1, 1, 7, 2, id="one token, one odd head, one pair"),
        pytest.param(0, 4, 2, 8, 8, id="no tokens"),
    ],
)
def test_equals_the_operations_one_by_one(
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    keep_keys: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    sizes = (num_tokens, num_heads, num_kv_heads, head_dim, rotary_dim)
    inputs = make_inputs(*sizes, dtype, device)
    apart = make_inputs(*sizes, dtype, device)
    q_THd, k_TKd = one_by_one(apart, num_heads)
    found_q, found_k = norm_rotary_fill(**inputs, keep_keys=keep_keys)
    assert torch.equal(found_q, q_THd)
    assert found_q.is_contiguous()
    for name in ("key_pages", "value_pages"):
        assert torch.equal(inputs[name], apart[name])
    if keep_keys:
        assert found_k is not None
        assert torch.equal(found_k, k_TKd)
        assert found_k.is_contiguous()
    else:
        assert found_k is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"qkv_TW": torch.zeros(2, 60)}, "60 wide", id="half a head"),
        pytest.param({"qkv_TW": torch.zeros(2, 32)}, "32 wide", id="no query heads"),
        pytest.param({"qkv_TW": torch.zeros(3, 64)}, "same tokens", id="other tokens"),
        pytest.param(
            {"slot_T": torch.zeros(3, dtype=torch.int64)}, "same tokens", id="slots of others"
        ),
        pytest.param({"qkv_TW": torch.zeros(2, 64).half()}, "one dtype", id="mixed dtypes"),
        pytest.param({"slot_T": torch.zeros(2).int()}, "int64", id="narrow slots"),
        pytest.param({"q_weight": torch.zeros(6)}, r"\[8\]", id="weight of another size"),
        pytest.param({"qkv_TW": torch.zeros(64, 2).T}, "unit stride", id="across the memory"),
        pytest.param({"table_P2r2": torch.zeros(3, 2, 5)}, "at least 10", id="heads too small"),
        pytest.param({"value_pages": torch.zeros(3, 4, 2, 8)}, "must both be", id="page counts"),
        pytest.param(
            {"key_pages": torch.zeros(4, 2, 2, 8).transpose(0, 1)},
            "contiguous",
            id="pages of a copy's view",
        ),
        pytest.param(
            {"table_P2r2": torch.zeros(6, 2, 4)[::2]}, "contiguous", id="every second row"
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Tensor], message: str) -> None:
    inputs = {**make_inputs(), **changes}
    if "key_pages" in changes:
        inputs["value_pages"] = torch.zeros(2, 4, 2, 8)
    with pytest.raises(ValueError, match=message):
        norm_rotary_fill(**inputs, keep_keys=False)
