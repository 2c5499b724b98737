from __future__ import annotations

import pytest
import torch
from torch import Tensor

from focus_ray.kernels.fill_kv import fill_kv


def make_inputs(
    slots: list[int], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (len(slots), 2, 5)
    return {
        "k_TKd": torch.randn(shape, generator=generator).to(device, dtype),
        "v_TKd": torch.randn(shape, generator=generator).to(device, dtype),
        "slot_T": torch.tensor(slots, dtype=torch.int64, device=device),
        "key_pages": torch.full((3, 4, 2, 5), 7.0, dtype=dtype, device=device),
        "value_pages": torch.full((3, 4, 2, 5), 8.0, dtype=dtype, device=device),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "slots",
    [
        pytest.param([0, 1, 2, 3], id="a whole page"),
        pytest.param([11, 4, 6], id="across pages, out of order"),
        pytest.param([5], id="one token"),
        pytest.param([], id="nothing"),
    ],
)
def test_each_token_lands_in_its_slot(
    slots: list[int], dtype: torch.dtype, device: torch.device
) -> None:
    inputs = make_inputs(slots, dtype, device)
    expected_keys, expected_values = inputs["key_pages"].clone(), inputs["value_pages"].clone()
    for token, slot in enumerate(slots):
        expected_keys[slot // 4, slot % 4] = inputs["k_TKd"][token]
        expected_values[slot // 4, slot % 4] = inputs["v_TKd"][token]
    fill_kv(**inputs)
    torch.testing.assert_close(inputs["key_pages"], expected_keys, rtol=0, atol=0)
    torch.testing.assert_close(inputs["value_pages"], expected_values, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "head_dim"),
    [
        pytest.param(64, 8, 128, id="a block of 8 heads of 128"),
        pytest.param(67, 2, 64, id="tokens that fill no tile"),
        pytest.param(5, 3, 41, id="odd heads"),
        pytest.param(3, 33, 128, id="slots longer than a program"),
        pytest.param(40, 1, 1, id="one number per slot"),
    ],
)
def test_other_slots_keep_what_they_hold(
    num_tokens: int, num_heads: int, head_dim: int, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    num_pages = num_tokens // 8 + 2
    slot_T = torch.randperm(num_pages * 16, generator=generator)[:num_tokens].to(device)
    # as a fused projection leaves them: queries, keys and values of a token side by side
    fused_T4Kd = torch.randn(num_tokens, 4 * num_heads, head_dim, generator=generator).to(device)
    k_TKd, v_TKd = fused_T4Kd[:, 2 * num_heads :].chunk(2, dim=1)
    pages = torch.randn(2, num_pages, 16, num_heads, head_dim, generator=generator).to(device)
    expected = pages.clone().flatten(1, 2)
    expected[0, slot_T], expected[1, slot_T] = k_TKd, v_TKd
    fill_kv(k_TKd, v_TKd, slot_T, pages[0], pages[1])
    assert torch.equal(pages.flatten(1, 2), expected)


def test_pages_of_one_layer_are_written_in_the_whole_cache() -> None:
    inputs = make_inputs([6])
    all_layers = torch.zeros(2, 3, 4, 2, 5)
    fill_kv(**{**inputs, "key_pages": all_layers[1]})
    assert torch.equal(all_layers[1, 1, 2], inputs["k_TKd"][0])
    assert not all_layers[0].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"k_TKd": torch.zeros(1, 2, 5)}, "keys and values must be", id="too few keys"),
        pytest.param({"v_TKd": torch.zeros(2, 2, 6)}, "keys and values must be", id="head size"),
        pytest.param(
            {"k_TKd": torch.zeros(2, 5, 2).mT}, "unit stride along d", id="dimensions apart"
        ),
        pytest.param({"slot_T": torch.zeros(2, dtype=torch.int32)}, "int64", id="slots of int32"),
        pytest.param({"k_TKd": torch.zeros(2, 2, 5).half()}, "dtype of the pages", id="dtype"),
        pytest.param({"value_pages": torch.zeros(2, 4, 2, 5)}, "must both be", id="page counts"),
        pytest.param(
            {"key_pages": torch.zeros(4, 3, 2, 5).transpose(0, 1)}, "contiguous", id="a copy's view"
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fill_kv(**{**make_inputs([0, 1]), **changes})
