from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from focus_ray.kernels.retain import Retained, eviction_target, retain, retain_reference

PUBLISHED: dict[str, Any] = {"importance_dtype": torch.bfloat16, "attend_cached": False}


def retain_on(device: torch.device, *inputs: Tensor, **options: Any) -> Retained:
    """The result on the CPU, by the published rule unless told otherwise."""
    settings = {"importance_dtype": torch.float32, "attend_cached": False, **options}
    found = retain(*(tensor.to(device) for tensor in inputs), **settings)
    return Retained(**{name: tensor.cpu() for name, tensor in vars(found).items()})


def keep(
    device: torch.device,
    delta: list[float],
    target: int,
    *,
    masked: list[int] | None = None,
    progress: int = 99,
) -> list[int]:
    """Retained positions of one block; ``masked`` lists its masked positions, all by default."""
    delta_NB = torch.tensor([delta], dtype=torch.float32)
    masked_NB = torch.ones_like(delta_NB, dtype=torch.bool)
    if masked is not None:
        masked_NB[:] = False
        masked_NB[0, masked] = True
    number = torch.tensor([target]), torch.tensor([progress])
    inputs = (torch.zeros_like(delta_NB), delta_NB, masked_NB, masked_NB, *number)
    kept: list[int] = retain_on(device, *inputs).kept_NB[0].nonzero()[:, 0].tolist()
    return kept


@pytest.mark.parametrize(
    ("delta", "target", "options", "expected"),
    [
        pytest.param([0, 5, 0, 4, 0, 0], 2, {}, [0, 1, 2, 3], id="left neighbours come along"),
        pytest.param(
            [9, 0, 0, 0, 5, 0], 1, {"masked": [0, 2, 4]}, [0], id="no neighbour, no deviation"
        ),
        pytest.param(
            [0, 0, 0, 0, 0, 0, 5, 0, 5], 1, {"masked": [0, 2, 4, 6, 8]}, [6, 8], id="mean + sigma"
        ),
        pytest.param([1, 1, 1, 1], 2, {}, [0, 1, 2, 3], id="equal deltas evict nothing"),
        pytest.param([0.1, 0.1, 0.1], 1, {}, [0, 1, 2], id="equal but for rounding of the mean"),
        pytest.param([0.3, 0.7], 1, {}, [0, 1], id="the larger of two is one deviation above"),
        pytest.param([0.7, 0, 0.3], 1, {"masked": [0, 2]}, [0], id="the other one is below"),
        pytest.param(
            [3, 0, 3, 0, 3, 0], 2, {"masked": [0, 2, 4, 5]}, [0, 2], id="ties go to the left"
        ),
        pytest.param([1, 2, 3, 4, 5, 6, 7, 8], 4, {}, [3, 4, 5, 6, 7], id="the target's best"),
        pytest.param(
            [0, 0, 0, 0, 9, 0], 1, {"progress": -1}, [0, 1, 2, 3, 4], id="a new block: a prefix"
        ),
        pytest.param(
            [0, 0, 0, 0, 9, 0], 1, {"progress": 1}, [2, 3, 4], id="no holes right of progress"
        ),
        pytest.param([1, 2, 3], 3, {}, [0, 1, 2], id="target not below the masks"),
        pytest.param([1, 2, 3], 1, {"masked": [1]}, [1], id="one masked token"),
        pytest.param([1, 2, 3], 0, {"masked": []}, [], id="nothing masked"),
        pytest.param([1, math.nan, 9, 1], 1, {}, [0, 1, 2, 3], id="a NaN keeps all"),
        pytest.param([*range(64)], 1, {"progress": 62}, [*range(49, 64)], id="largest block"),
        pytest.param([0] * 63 + [1], 1, {}, [62, 63], id="neighbour of the last of 64"),
    ],
)
def test_rules(
    delta: list[float],
    target: int,
    options: dict[str, Any],
    expected: list[int],
    device: torch.device,
) -> None:
    assert keep(device, delta, target, **options) == expected


@pytest.mark.parametrize(
    ("num_masked", "mean", "alpha", "expected"),
    [
        pytest.param(32, 1.0, 1.5, 2, id="a new block"),
        pytest.param(32, 0.5, 1.5, 2, id="a mean below one counts as one"),
        pytest.param(32, 5 / 3, 1.8, 3, id="the product is rounded to float32 before it is raised"),
        pytest.param(3, 4.0, 1.5, 3, id="never more than there are"),
        pytest.param(0, 1.0, 1.5, 0, id="nothing masked"),
    ],
)
def test_target(num_masked: int, mean: float, alpha: float, expected: int) -> None:
    found = eviction_target(torch.tensor([num_masked]), torch.tensor([mean]), torch.tensor([alpha]))
    assert found.tolist() == [expected]


def random_blocks(rows: int, block_length: int) -> tuple[Tensor, ...]:
    """Inputs of ``retain``; a third of the blocks has many ties."""
    generator = torch.Generator().manual_seed(block_length)
    first_NB = 20 * torch.rand(rows, block_length, generator=generator)
    second_NB = first_NB + torch.randn(rows, block_length, generator=generator)
    first_NB[::3], second_NB[::3] = first_NB[::3].round(), second_NB[::3].round()
    masked_NB = torch.rand(rows, block_length, generator=generator) < 0.6
    processed_NB = masked_NB | (torch.rand(masked_NB.shape, generator=generator) < 0.3)
    masked_NB[-1] = processed_NB[-1] = False
    target_N = torch.randint(1, block_length + 1, (rows,), generator=generator)
    target_N = torch.minimum(target_N, masked_NB.sum(1))
    progress_N = torch.randint(-1, block_length, (rows,), generator=generator)
    return first_NB, second_NB, processed_NB, masked_NB, target_N, progress_N


@pytest.mark.parametrize("attend_cached", [False, True], ids=["published limit", "attend cached"])
@pytest.mark.parametrize("block_length", [4, 7, 32, 64])
def test_invariants_on_random_blocks(
    block_length: int, attend_cached: bool, device: torch.device
) -> None:
    inputs = random_blocks(24, block_length)
    found = retain_on(device, *inputs, attend_cached=attend_cached)
    _, _, processed_NB, masked_NB, target_N, progress_N = inputs
    retained_NB = found.kept_NB & masked_NB

    assert not (found.kept_NB & ~processed_NB).any()
    assert not (processed_NB & ~masked_NB & ~found.kept_NB).any()
    assert (retained_NB.sum(1) >= target_N).all()
    assert (retained_NB.any(1) == masked_NB.any(1)).all()
    position_B = torch.arange(block_length)
    rightmost_N1 = torch.where(retained_NB, position_B, -1).amax(1, keepdim=True)
    hole_NB = masked_NB & ~retained_NB & (position_B < rightmost_N1)
    assert not (hole_NB & (position_B > progress_N[:, None])).any()

    for offsets_N1, counted_NB in (
        (found.row_offsets_N1, found.kept_NB),
        (found.masked_offsets_N1, retained_NB),
    ):
        assert offsets_N1.dtype == torch.int32
        assert offsets_N1.diff().tolist() == counted_NB.sum(1).tolist()
        assert offsets_N1[0] == 0
    assert found.counts_2.tolist() == [int(found.kept_NB.sum()), int(retained_NB.sum())]
    for row, limit in enumerate(found.limit_N.tolist()):
        seen_B = found.kept_NB[row] | (~masked_NB[row] if attend_cached else False)
        assert limit == max(seen_B.nonzero()[:, 0].tolist(), default=-1) + 1


def slow_choice(delta: dict[int, float], target: int, progress: int) -> set[int] | None:
    """The rules, a number at a time in float64; None where mean + sigma is too close to decide."""
    if len(delta) <= target:
        return set(delta)
    mean = math.fsum(delta.values()) / len(delta)
    bound = mean + math.sqrt(math.fsum((d - mean) ** 2 for d in delta.values()) / len(delta))
    if any(abs(d - bound) < 1e-4 for d in delta.values()):
        return None
    chosen = {p for p in delta if delta[p] >= bound}
    if len(chosen) < target:
        chosen = set(sorted(delta, key=lambda p: (-delta[p], p))[:target])
    chosen |= {p - 1 for p in chosen} & set(delta)
    return chosen | {p for p in delta if progress < p < max(chosen)}


@pytest.mark.parametrize("block_length", [4, 7, 32, 64])
def test_equals_the_rules_one_at_a_time(block_length: int, device: torch.device) -> None:
    inputs = random_blocks(24, block_length)
    found = retain_on(device, *inputs)
    _, _, processed_NB, masked_NB, target_N, progress_N = inputs
    decided = 0
    for row, delta_B in enumerate(found.delta_NB.tolist()):
        masked = masked_NB[row].nonzero()[:, 0].tolist()
        delta = {p: delta_B[p] for p in masked}
        chosen = slow_choice(delta, int(target_N[row]), int(progress_N[row]))
        if chosen is not None:
            decided += 1
            decoded = (processed_NB[row] & ~masked_NB[row]).nonzero()[:, 0].tolist()
            kept = found.kept_NB[row].nonzero()[:, 0].tolist()
            assert kept == sorted(chosen | set(decoded))
    assert decided > 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_importances_are_rounded_before_they_are_subtracted(
    dtype: torch.dtype, device: torch.device
) -> None:
    inputs = random_blocks(20, 32)
    first_NB, second_NB, _, masked_NB, _, _ = inputs
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11])
    first_NB[0, :4], masked_NB[0, :4] = ties, True  # halfway between two of a 16-bit dtype
    inputs[2][0, :4] = True
    delta_NB = retain_on(device, *inputs, importance_dtype=dtype).delta_NB
    expected_NB = second_NB.to(dtype).float() - first_NB.to(dtype).float()
    assert torch.equal(delta_NB, expected_NB.masked_fill(~masked_NB, 0))


def test_a_block_does_not_feel_the_others(device: torch.device) -> None:
    inputs = random_blocks(20, 32)
    together = retain_on(device, *inputs)
    for row in range(0, 20, 3):
        alone = retain_on(device, *(tensor[row : row + 1] for tensor in inputs))
        for name in ("kept_NB", "delta_NB", "limit_N"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[row])


def test_no_block(device: torch.device) -> None:
    found = retain_on(device, *(tensor[:0] for tensor in random_blocks(1, 8)))
    assert found.kept_NB.shape == (0, 8)
    assert found.row_offsets_N1.tolist() == found.masked_offsets_N1.tolist() == [0]
    assert found.counts_2.tolist() == [0, 0]


def test_rows_beside_the_blocks_that_decode(device: torch.device) -> None:
    """What eviction meets: tokens left over from a block, a prompt's block, empty rows."""
    masked_NB = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]).bool()
    processed_NB = torch.tensor([[0, 1, 0, 1], [1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    second_NB = torch.tensor([0.0, 0.0, 9.0, 0.0]).expand(4, 4)
    target_N, progress_N = torch.tensor([0, 1, 0, 0]), torch.tensor([-1, 3, -1, -1])
    inputs = (torch.zeros(4, 4), second_NB, processed_NB, masked_NB, target_N, progress_N)
    found = retain_on(device, *inputs)
    assert torch.equal(found.kept_NB[[0, 2, 3]], processed_NB[[0, 2, 3]])
    assert found.kept_NB[1].tolist() == [False, True, True, False]
    assert found.limit_N[:3].tolist() == [4, 3, 4]
    assert found.row_offsets_N1.tolist() == [0, 2, 4, 8, 8]
    assert found.masked_offsets_N1.tolist() == [0, 0, 2, 2, 2]
    assert found.counts_2.tolist() == [8, 2]


def test_into_buffers_of_a_larger_step(device: torch.device) -> None:
    """Written over and over, each step having as many rows as it has."""
    out = Retained.allocate(30, 16, device)
    for rows in (30, 7, 1, 20, 0):
        inputs = [tensor.to(device) for tensor in random_blocks(max(rows, 1), 16)]
        inputs = [tensor[:rows] for tensor in inputs]
        expected = retain(*inputs, **PUBLISHED)
        found = retain(*inputs, **PUBLISHED, out=out)
        for name, tensor in vars(expected).items():
            assert torch.equal(getattr(found, name), tensor), name
            if tensor.numel():
                assert getattr(found, name).data_ptr() == getattr(out, name).data_ptr(), name


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("rows", "block_length"),
    [
        pytest.param(1, 32, id="one block"),
        pytest.param(40, 16, id="many ties"),
        pytest.param(300, 64, id="more blocks than are added up at once"),
    ],
)
def test_kernel_equals_definition(rows: int, block_length: int, device: torch.device) -> None:
    if device.type == "cpu" and rows > 100:
        pytest.skip("needs CUDA: takes too long in the interpreter")
    inputs = random_blocks(rows, block_length)
    options = {"importance_dtype": torch.bfloat16, "attend_cached": True}
    expected = retain_reference(*inputs, **options)
    for _ in range(3):  # the last program to finish is another one each time
        found = retain_on(device, *inputs, **options)
        for name, tensor in vars(expected).items():
            assert torch.equal(getattr(found, name), tensor), name


def test_replay_of_a_cuda_graph(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs CUDA: a graph of launches")
    inputs = [tensor.to(device) for tensor in random_blocks(50, 32)]
    retain(*inputs, **PUBLISHED)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    out = Retained.allocate(50, 32, device)
    with torch.cuda.graph(graph):
        found = retain(*inputs, **PUBLISHED, out=out)
    for rows in (51, 52):
        for tensor, other in zip(inputs, random_blocks(rows, 32), strict=True):
            tensor.copy_(other[:50])
        graph.replay()
        expected = retain(*inputs, **PUBLISHED)
        for name, tensor in vars(expected).items():
            assert torch.equal(getattr(found, name), tensor), name


def test_tensors_that_are_not_contiguous(device: torch.device) -> None:
    inputs = random_blocks(9, 16)
    other = [tensor.T.contiguous().T if tensor.ndim == 2 else tensor for tensor in inputs]
    other[-1] = torch.stack([inputs[-1], inputs[-1]], 1)[:, 0]
    expected, found = retain_on(device, *inputs), retain_on(device, *other)
    for name, tensor in vars(expected).items():
        assert torch.equal(getattr(found, name), tensor), name


def test_what_does_not_fit_is_refused() -> None:
    scores, masked = torch.zeros(2, 4), torch.ones(2, 4, dtype=torch.bool)
    target = torch.ones(2, dtype=torch.int64)
    options: dict[str, Any] = {"importance_dtype": torch.float32, "attend_cached": False}
    good = (scores, scores, masked, masked, target, target)
    for index, wrong, message in (
        (0, scores[:1], r"first_NB must be \(2, 4\)"),
        (1, scores.half(), "must be float32"),
        (2, masked[:, :3], "processed_NB must be"),
        (3, masked.int(), "must be bool"),
        (4, target.float(), "target_N must be int64"),
        (5, target[:1], "progress_N must be int64"),
    ):
        inputs = [*good[:index], wrong, *good[index + 1 :]]
        with pytest.raises(ValueError, match=message):
            retain(*inputs, **options)
    with pytest.raises(ValueError, match="importance_dtype"):
        retain(*good, **{**options, "importance_dtype": torch.float64})
    for rows, block_length in ((1, 4), (2, 8)):
        with pytest.raises(ValueError, match="out must have room for 2 rows of 4 positions"):
            retain(*good, **options, out=Retained.allocate(rows, block_length, "cpu"))
