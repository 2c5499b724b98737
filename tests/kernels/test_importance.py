from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from focus_ray.kernels.importance import importance, importance_reference, round_importance

GOLDEN = Path(__file__).parents[1] / "golden" / "focus" / "importance.npz"
NUM_CASES = 4


def from_bits(bits: np.ndarray) -> Tensor:
    """bfloat16 stored as uint16 bit patterns."""
    return torch.from_numpy((bits.astype(np.uint32) << 16).view(np.float32)).bfloat16()


def golden_sequences(case: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """q, k, masked, importance and rounded importance of each sequence of a case."""
    arrays = np.load(GOLDEN)
    q, k, rounded = (from_bits(arrays[f"c{case:02d}_{name}"]) for name in ("q", "k", "imp_bf16"))
    exact = torch.from_numpy(arrays[f"c{case:02d}_imp_f32"])
    is_masked = torch.zeros(q.shape[0], dtype=torch.bool)
    is_masked[torch.from_numpy(arrays[f"c{case:02d}_mask_idx"]).long()] = True
    token_offsets = np.concatenate([[0], np.cumsum(arrays[f"c{case:02d}_q_lens"])])
    mask_offsets = arrays[f"c{case:02d}_mask_ptr"]
    for sequence in range(len(mask_offsets) - 1):
        tokens = slice(token_offsets[sequence], token_offsets[sequence + 1])
        masks = slice(mask_offsets[sequence], mask_offsets[sequence + 1])
        yield q[tokens], k[tokens], is_masked[tokens], exact[masks], rounded[masks]


@pytest.mark.parametrize("case", range(NUM_CASES))
def test_equals_the_authors_importance(case: int, device: torch.device) -> None:
    for q_BHd, k_BKd, masked_B, exact_n, rounded_n in golden_sequences(case):
        found_n = importance_reference(q_BHd.to(device), k_BKd.to(device), masked_B.to(device))
        torch.testing.assert_close(found_n.cpu(), exact_n, rtol=2e-5, atol=2e-5)
        # next to a rounding boundary the last of 8 bits may differ
        found_rounded_n = round_importance(found_n, torch.bfloat16).cpu()
        torch.testing.assert_close(found_rounded_n, rounded_n.float(), rtol=2**-7, atol=0)


def test_sums_to_query_heads_times_masked_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    q_BHd = torch.randn(9, 6, 16, generator=generator)
    k_BKd = torch.randn(9, 2, 16, generator=generator)
    masked_B = torch.tensor([True, False, True, True, False, False, True, True, False])
    importance_n = importance_reference(q_BHd, k_BKd, masked_B)
    assert importance_n.shape == (5,)
    assert importance_n.sum().item() == pytest.approx(6 * 5, rel=1e-5)


def test_neighbours_are_those_of_the_list_of_masked_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    q_BHd, k_BKd = torch.randn(2, 4, 2, 8, generator=generator)
    spread = torch.zeros(8, 2, 8), torch.zeros(8, 2, 8), torch.zeros(8, dtype=torch.bool)
    rows = torch.tensor([0, 3, 4, 7])
    for tensor, value in zip(spread, (q_BHd, k_BKd, True), strict=True):
        tensor[rows] = value
    torch.testing.assert_close(
        importance_reference(*spread),
        importance_reference(q_BHd, k_BKd, torch.ones(4, dtype=torch.bool)),
    )


@pytest.mark.parametrize(
    ("masked", "expected"),
    [
        pytest.param([False, False], [], id="no masked token"),
        pytest.param([False, True], [4.0], id="one masked token gets all"),
    ],
)
def test_few_masked_tokens(masked: list[bool], expected: list[float]) -> None:
    found_n = importance_reference(torch.randn(2, 4, 8), torch.randn(2, 2, 8), torch.tensor(masked))
    assert found_n.tolist() == expected


@pytest.mark.parametrize(
    ("k_shape", "masked", "message"),
    [
        pytest.param((3, 2, 8), [True, True], "same tokens", id="keys of other tokens"),
        pytest.param((2, 3, 8), [True, True], "multiple", id="4 query heads over 3"),
        pytest.param((2, 2, 8), [1, 0], "must be bool", id="numbers for a mask"),
        pytest.param((2, 2, 8), [True], "must be bool", id="a mask too short"),
    ],
)
def test_what_does_not_fit_is_refused(
    k_shape: tuple[int, ...], masked: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        importance_reference(torch.zeros(2, 4, 8), torch.zeros(k_shape), torch.tensor(masked))


@pytest.mark.parametrize("block_length", [1, 5, 32])
def test_blocks_at_once_equal_blocks_alone(block_length: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(block_length)
    q_NBHd = torch.randn(9, block_length, 4, 8, generator=generator)
    k_NBKd = torch.randn(9, block_length, 2, 8, generator=generator)
    masked_NB = torch.rand(9, block_length, generator=generator) < 0.5
    masked_NB[0], masked_NB[1] = True, False
    found_NB = importance(q_NBHd.to(device), k_NBKd.to(device), masked_NB.to(device)).cpu()
    for q_BHd, k_BKd, masked_B, found_B in zip(q_NBHd, k_NBKd, masked_NB, found_NB, strict=True):
        expected_n = importance_reference(q_BHd, k_BKd, masked_B)
        torch.testing.assert_close(found_B[masked_B], expected_n, rtol=1e-5, atol=1e-5)
        assert not found_B[~masked_B].any()
