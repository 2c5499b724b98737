from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from focus_ray.kernels.compact import Compacted, compact
from focus_ray.kernels.retain import Retained, retain

HEADS, HEAD_DIM = 3, 16


def step(
    num_rows: int,
    block_length: int,
    prefill: tuple[int, ...] = (),
    width: int = 64,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, ...]:
    """Tokens of a step, its rows, and masks: what ``compact`` takes, and a choice among them."""
    generator = torch.Generator().manual_seed(num_rows + block_length)
    masked_NB = torch.rand(num_rows, block_length, generator=generator) < 0.6
    processed_NB = masked_NB | (torch.rand(masked_NB.shape, generator=generator) < 0.3)
    kept_NB = processed_NB & (torch.rand(masked_NB.shape, generator=generator) < 0.4)
    kept_NB |= processed_NB & ~masked_NB
    for row, kept in enumerate((False, True)):
        if row < num_rows:
            kept_NB[row] = processed_NB[row] & kept
    row_lens = [*processed_NB.sum(1).tolist(), *prefill]
    num_tokens = sum(row_lens)
    return (
        torch.randn(num_tokens, width, generator=generator).to(dtype),
        torch.randn(num_tokens, HEADS, HEAD_DIM, generator=generator).to(dtype),
        torch.randint(0, 4000, (num_tokens,), generator=generator),
        torch.randperm(8192, generator=generator)[:num_tokens],
        torch.randint(1, 4000, (num_tokens,), generator=generator).int(),
        torch.tensor([0, *row_lens]).cumsum(0).int(),
        processed_NB,
        masked_NB,
        kept_NB,
        torch.arange(num_rows) * 100,
    )


def chosen(processed_NB: Tensor, masked_NB: Tensor, kept_NB: Tensor) -> Retained:
    """``kept_NB`` as ``retain`` would return it."""
    retained_NB = kept_NB & masked_NB
    position_B = torch.arange(kept_NB.shape[1])
    zero = torch.zeros(1, dtype=torch.int64)
    return Retained(
        kept_NB=kept_NB,
        delta_NB=torch.zeros(kept_NB.shape),
        row_offsets_N1=torch.cat([zero, kept_NB.sum(1).cumsum(0)]).int(),
        masked_offsets_N1=torch.cat([zero, retained_NB.sum(1).cumsum(0)]).int(),
        limit_N=torch.where(kept_NB, position_B + 1, 0).amax(1).int(),
        counts_2=torch.stack([(processed_NB & ~kept_NB).sum(), retained_NB.sum()]).int(),
    )


def compact_on(device: torch.device, *inputs: Tensor) -> Compacted:
    *per_token, processed_NB, masked_NB, kept_NB, block_start_N = inputs
    retained = chosen(processed_NB, masked_NB, kept_NB)
    num_evicted, num_masked = retained.counts_2.tolist()
    found = compact(
        *(tensor.to(device) for tensor in (*per_token, processed_NB, masked_NB)),
        Retained(**{name: tensor.to(device) for name, tensor in vars(retained).items()}),
        block_start_N.to(device),
        num_evicted=num_evicted,
        num_masked=num_masked,
    )
    return Compacted(**{name: tensor.cpu() for name, tensor in vars(found).items()})


def slow_compact(*inputs: Tensor) -> Compacted:
    """Token by token."""
    x, q, positions, slots, limits, offsets, processed_NB, masked_NB, kept_NB, starts = inputs
    tokens: list[int] = []
    new_limits, new_offsets, masked_rows, masked_places = [], [0], [], []
    num_rows, block_length = masked_NB.shape
    for row, (first, end) in enumerate(pairwise(offsets.tolist())):
        if row < num_rows:
            places = processed_NB[row].nonzero()[:, 0].tolist()
            kept = [place for place in places if kept_NB[row, place]]
            for token, place in zip(range(first, end), places, strict=True):
                if not kept_NB[row, place]:
                    continue
                if masked_NB[row, place]:
                    masked_rows.append(len(tokens))
                    masked_places.append(row * block_length + place)
                tokens.append(token)
                new_limits.append(int(starts[row]) + max(kept) + 1)
        else:
            tokens += range(first, end)
            new_limits += limits[first:end].tolist()
        new_offsets.append(len(tokens))
    return Compacted(
        x_RD=x[tokens],
        q_RHd=q[tokens],
        positions_R=positions[tokens],
        slot_R=slots[tokens],
        kv_limit_R=torch.tensor(new_limits, dtype=torch.int32),
        row_offsets_S1=torch.tensor(new_offsets, dtype=torch.int32),
        masked_row_Q=torch.tensor(masked_rows, dtype=torch.int64),
        masked_place_Q=torch.tensor(masked_places, dtype=torch.int64),
    )


def assert_same(found: Compacted, expected: Compacted) -> None:
    for name, tensor in vars(expected).items():
        torch.testing.assert_close(getattr(found, name), tensor, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("num_rows", "block_length", "prefill", "width"),
    [
        pytest.param(5, 4, (), 64, id="decoding alone"),
        pytest.param(3, 8, (8, 8, 3), 41, id="prefill behind, odd width"),
        pytest.param(0, 8, (8, 5), 64, id="prefill alone"),
        pytest.param(1, 8, (0, 2), 64, id="nothing of the block retained, an empty row"),
        pytest.param(2, 64, (), 2500, id="largest block, more than one tile wide"),
        pytest.param(3, 1, (1,), 64, id="blocks of one position"),
    ],
)
def test_equals_token_by_token(
    num_rows: int,
    block_length: int,
    prefill: tuple[int, ...],
    width: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    inputs = step(num_rows, block_length, prefill, width, dtype)
    assert_same(compact_on(device, *inputs), slow_compact(*inputs))


def test_parts_of_wider_tensors(device: torch.device) -> None:
    x_TD, q_THd, *others = step(3, 8, (4,))
    wide_TX = torch.cat([q_THd.flatten(1), x_TD], 1)
    views = wide_TX[:, HEADS * HEAD_DIM :], wide_TX[:, : HEADS * HEAD_DIM].unflatten(1, (HEADS, -1))
    assert_same(compact_on(device, *views, *others), slow_compact(x_TD, q_THd, *others))


def test_takes_the_choice_of_retain(device: torch.device) -> None:
    x_TD, q_THd, *others = step(6, 16)
    processed_NB, masked_NB, _, block_start_N = others[-4:]
    importances = torch.rand(2, *masked_NB.shape, generator=torch.Generator().manual_seed(0))
    target_N, progress_N = torch.full((6,), 2), torch.full((6,), 15)
    options: dict[str, Any] = {"importance_dtype": torch.float32, "attend_cached": False}
    retained = retain(*importances, processed_NB, masked_NB, target_N, progress_N, **options)
    inputs = (x_TD, q_THd, *others[:4], processed_NB, masked_NB, retained.kept_NB, block_start_N)
    assert retained.counts_2[0] > 0
    assert_same(compact_on(device, *inputs), slow_compact(*inputs))


def test_what_does_not_fit_is_refused() -> None:
    inputs = step(3, 8)
    x_TD, q_THd, *others = inputs
    device = torch.device("cpu")
    with pytest.raises(ValueError, match=r"x_TD must be of \d+ tokens"):
        compact_on(device, x_TD[1:], q_THd, *others)
    with pytest.raises(ValueError, match="without gaps"):
        compact_on(device, x_TD.T.contiguous().T, q_THd, *others)
    with pytest.raises(ValueError, match="without gaps"):
        compact_on(device, x_TD, q_THd[..., ::2], *others)
    with pytest.raises(ValueError, match="must be int32"):
        compact_on(device, *inputs[:5], inputs[5].long(), *inputs[6:])
    with pytest.raises(ValueError, match="same blocks"):
        compact_on(device, *inputs[:-1], inputs[-1][:1])
