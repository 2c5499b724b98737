from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from focus_ray.kernels.importance import importance
from focus_ray.kernels.launch import INTERPRETED

GOLDEN = Path(__file__).parents[1] / "golden" / "focus" / "importance.npz"
NUM_CASES = 4
# float32 accumulation over d products and H * n weights of a sum of H * n: 4e-6 was the worst
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


@dataclass(frozen=True)
class Blocks:
    """Blocks of B positions whose processed tokens lie one after the other."""

    q_THd: Tensor
    k_TKd: Tensor
    row_offsets_S1: Tensor
    processed_NB: Tensor
    masked_NB: Tensor

    def importance(self, device: torch.device | str) -> Tensor:
        return importance(*(tensor.to(device) for tensor in vars(self).values())).cpu()

    def alone(self, row: int) -> Blocks:
        """One block of the batch as its own batch."""
        first, end = self.row_offsets_S1[row : row + 2].tolist()
        return Blocks(
            self.q_THd[first:end],
            self.k_TKd[first:end],
            torch.tensor([0, end - first], dtype=torch.int32),
            self.processed_NB[row : row + 1],
            self.masked_NB[row : row + 1],
        )


def blocks(
    num_rows: int,
    block_length: int,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    prefill: int = 3,
) -> Blocks:
    """Random blocks: one all masked, one all decoded, one with one token, the others anything."""
    generator = torch.Generator().manual_seed(num_rows * block_length)
    masked_NB = torch.rand(num_rows, block_length, generator=generator) < 0.5
    processed_NB = masked_NB | (torch.rand(masked_NB.shape, generator=generator) < 0.2)
    masked_NB[0] = processed_NB[0] = True
    if num_rows > 1:
        masked_NB[1] = False
    if num_rows > 2:
        masked_NB[2] = processed_NB[2] = torch.arange(block_length) == block_length - 1
    if num_rows > 3:
        masked_NB[3] = processed_NB[3] = False
    lens = [*processed_NB.sum(1).tolist(), prefill]
    num_tokens = sum(lens)
    q_THd = torch.randn(num_tokens, heads[0], head_dim, generator=generator).to(dtype)
    k_TKd = torch.randn(num_tokens, heads[1], head_dim, generator=generator).to(dtype)
    row_offsets_S1 = torch.tensor([0, *lens]).cumsum(0).int()
    return Blocks(q_THd, k_TKd, row_offsets_S1, processed_NB, masked_NB)


def slow_importance(blocks: Blocks) -> Tensor:
    """The formula, a number at a time in float64."""
    num_heads, head_dim = blocks.q_THd.shape[1:]
    group = num_heads // blocks.k_TKd.shape[1]
    q, k = blocks.q_THd.double().numpy(), blocks.k_TKd.double().numpy()
    received = np.zeros(blocks.masked_NB.shape)
    for row, masked_B in enumerate(blocks.masked_NB):
        first = int(blocks.row_offsets_S1[row])
        place = {int(p): first + i for i, p in enumerate(blocks.processed_NB[row].nonzero())}
        listed = [int(p) for p in masked_B.nonzero()]
        for head in range(num_heads):
            for i in listed:
                scores = [q[place[i], head] @ k[place[j], head // group] for j in listed]
                pooled = [max(scores[max(j - 1, 0) : j + 2]) for j in range(len(listed))]
                weights = np.exp((np.array(pooled) - max(pooled)) * head_dim**-0.5)
                received[row, listed] += weights / weights.sum()
    return torch.from_numpy(received).float()


def from_bits(bits: np.ndarray) -> Tensor:
    """bfloat16 stored as uint16 bit patterns."""
    return torch.from_numpy((bits.astype(np.uint32) << 16).view(np.float32)).bfloat16()


@pytest.mark.parametrize("case", range(NUM_CASES))
def test_equals_the_authors_importance(case: int, device: torch.device) -> None:
    arrays = np.load(GOLDEN)
    q_THd, k_TKd = (from_bits(arrays[f"c{case:02d}_{name}"]) for name in "qk")
    row_lens = torch.from_numpy(arrays[f"c{case:02d}_q_lens"])
    row_offsets_S1 = torch.cat([torch.zeros(1), row_lens.cumsum(0)]).int()
    processed_NB = torch.arange(int(row_lens.max())) < row_lens[:, None]
    is_masked_T = torch.zeros(len(q_THd), dtype=torch.bool)
    is_masked_T[torch.from_numpy(arrays[f"c{case:02d}_mask_idx"]).long()] = True
    masked_NB = torch.zeros_like(processed_NB)
    masked_NB[processed_NB] = is_masked_T

    if INTERPRETED:  # which does not know bfloat16; its products are the same in float32
        q_THd, k_TKd = q_THd.float(), k_TKd.float()
    batch = Blocks(q_THd, k_TKd, row_offsets_S1, processed_NB, masked_NB)
    found_n = batch.importance(device)[masked_NB]
    exact_n = torch.from_numpy(arrays[f"c{case:02d}_imp_f32"])
    torch.testing.assert_close(found_n, exact_n, rtol=2e-5, atol=2e-5)
    # next to a rounding boundary the last of 8 bits may differ
    rounded_n = from_bits(arrays[f"c{case:02d}_imp_bf16"]).float()
    torch.testing.assert_close(found_n.bfloat16().float(), rounded_n, rtol=2**-7, atol=0)


@pytest.mark.parametrize(
    ("num_rows", "block_length", "heads", "head_dim"),
    [
        pytest.param(4, 4, (4, 2), 64, id="smallest block"),
        pytest.param(3, 7, (3, 1), 64, id="odd block, odd group"),
        pytest.param(2, 16, (5, 1), 128, id="group of 5"),
        pytest.param(2, 32, (2, 2), 128, id="no group"),
        pytest.param(2, 32, (16, 2), 64, id="group of 8"),
        pytest.param(1, 33, (4, 2), 48, id="one row, odd sizes"),
        pytest.param(2, 64, (4, 1), 128, id="largest block"),
        pytest.param(1, 1, (4, 2), 64, id="a block of one position"),
    ],
)
def test_equals_the_formula(
    num_rows: int,
    block_length: int,
    heads: tuple[int, int],
    head_dim: int,
    device: torch.device,
) -> None:
    batch = blocks(num_rows, block_length, heads, head_dim)
    torch.testing.assert_close(batch.importance(device), slow_importance(batch), **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(dtype: torch.dtype, device: torch.device) -> None:
    batch = blocks(4, 16, dtype=dtype)  # products of 16-bit numbers are exact in float32
    torch.testing.assert_close(batch.importance(device), slow_importance(batch), **TOLERANCE)


def test_sums_to_query_heads_times_masked_tokens(device: torch.device) -> None:
    batch = blocks(4, 9, heads=(6, 2))
    expected_N = 6.0 * batch.masked_NB.sum(1)
    torch.testing.assert_close(batch.importance(device).sum(1), expected_N, **TOLERANCE)


def test_zero_where_not_masked(device: torch.device) -> None:
    batch = blocks(5, 12)
    assert not batch.importance(device)[~batch.masked_NB].any()


def test_blocks_that_cannot_evict_are_not_looked_at(device: torch.device) -> None:
    batch = blocks(6, 16)
    num_masked_N = batch.masked_NB.sum(1)
    target_N = num_masked_N - torch.tensor([1, 0, 0, 0, 1, -2])
    inputs = [tensor.to(device) for tensor in vars(batch).values()]
    found_NB = importance(*inputs, target_N.to(device)).cpu()
    evicts_N1 = (num_masked_N > target_N)[:, None]
    assert evicts_N1.flatten().tolist() == [True, False, False, False, True, False]
    assert torch.equal(found_NB, batch.importance(device) * evicts_N1)


def test_targets_of_other_blocks_are_refused() -> None:
    inputs = vars(blocks(2, 8)).values()
    for wrong in (torch.ones(3, dtype=torch.int64), torch.ones(2)):
        with pytest.raises(ValueError, match=r"target_N must be int64 \[2\]"):
            importance(*inputs, wrong)


def test_tokens_that_are_not_masked_may_be_anything(device: torch.device) -> None:
    batch = blocks(4, 12)
    expected_NB = batch.importance(device)
    is_masked_T = torch.cat([batch.masked_NB[batch.processed_NB], torch.zeros(3).bool()])
    batch.q_THd[~is_masked_T] = torch.nan
    batch.k_TKd[~is_masked_T] = torch.nan
    assert torch.equal(batch.importance(device), expected_NB)


def test_parts_of_a_fused_projection(device: torch.device) -> None:
    batch = blocks(4, 12)
    fused_TX = torch.cat([batch.q_THd.flatten(1), batch.k_TKd.flatten(1)], 1).to(device)
    q_TX, k_TX = fused_TX.split([4 * 64, 2 * 64], dim=1)
    found_NB = importance(
        q_TX.unflatten(1, (4, 64)),
        k_TX.unflatten(1, (2, 64)),
        batch.row_offsets_S1.to(device),
        batch.processed_NB.T.contiguous().T.to(device),
        batch.masked_NB.T.contiguous().T.to(device),
    )
    assert torch.equal(found_NB.cpu(), batch.importance(device))


def test_a_block_does_not_feel_the_others(device: torch.device) -> None:
    batch = blocks(6, 16)
    together_NB = batch.importance(device)
    for row, expected_B in enumerate(together_NB):
        found_1B = batch.alone(row).importance(device)
        if device.type == "cpu" and not INTERPRETED:
            # matrix products of another batch size may be summed in another order on a CPU
            torch.testing.assert_close(found_1B[0], expected_B, **TOLERANCE)
        else:
            assert torch.equal(found_1B[0], expected_B)


@pytest.mark.parametrize(
    "shape",
    [pytest.param((0, 8), id="no block"), pytest.param((2, 8), id="nothing processed")],
)
def test_without_tokens(shape: tuple[int, int], device: torch.device) -> None:
    nothing = torch.zeros(shape, dtype=torch.bool)
    offsets = torch.zeros(shape[0] + 1, dtype=torch.int32)
    batch = Blocks(torch.zeros(0, 4, 64), torch.zeros(0, 2, 64), offsets, nothing, nothing)
    assert torch.equal(batch.importance(device), torch.zeros(shape))


@pytest.mark.parametrize(
    ("k_shape", "masked", "num_offsets", "message"),
    [
        pytest.param((3, 2, 8), [[True, True]], 2, "same tokens", id="keys of other tokens"),
        pytest.param((2, 3, 8), [[True, True]], 2, "multiple", id="4 query heads over 3"),
        pytest.param((2, 2, 8), [[1, 0]], 2, "must be bool", id="numbers for a mask"),
        pytest.param((2, 2, 8), [[True]], 2, "must be as masked", id="masks of two lengths"),
        pytest.param((2, 2, 8), [[True, True]], 1, "row offset", id="no end of the row"),
    ],
)
def test_what_does_not_fit_is_refused(
    k_shape: tuple[int, ...], masked: list[list[int]], num_offsets: int, message: str
) -> None:
    q_THd, k_TKd = torch.zeros(2, 4, 8), torch.zeros(k_shape)
    processed_NB = torch.ones(1, 2, dtype=torch.bool)
    row_offsets = torch.zeros(num_offsets, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        importance(q_THd, k_TKd, row_offsets, processed_NB, torch.tensor(masked))


def test_heads_with_gaps_are_refused() -> None:
    q_THd, k_TKd = torch.zeros(2, 4, 8), torch.zeros(2, 2, 8)
    masks = torch.tensor([0, 2]), torch.ones(1, 2).bool(), torch.ones(1, 2).bool()
    for wrong in (k_TKd.half(), torch.zeros(2, 2, 16)[..., ::2]):
        with pytest.raises(ValueError, match="one dtype and without gaps"):
            importance(q_THd, wrong, *masks)


@pytest.mark.kernels
def test_the_same_twice(device: torch.device) -> None:
    batch = blocks(5, 32, heads=(16, 8))
    assert torch.equal(batch.importance(device), batch.importance(device))
