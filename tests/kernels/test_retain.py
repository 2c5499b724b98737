from __future__ import annotations

import pytest
import torch
from torch import Tensor

from focus_ray.kernels.retain import eviction_target, retain


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float32)


def keep(
    delta: Tensor, target: int, *, masked: list[int] | None = None, progress: int = 99
) -> list[int]:
    """Retained positions of one block; ``masked`` lists its masked positions, all by default."""
    masked_NB = torch.ones_like(delta, dtype=torch.bool)
    if masked is not None:
        masked_NB[:] = False
        masked_NB[0, masked] = True
    kept_NB = retain(delta, masked_NB, torch.tensor([target]), torch.tensor([progress]))
    return kept_NB[0].nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("delta", "target", "options", "expected"),
    [
        pytest.param(row(0, 5, 0, 4, 0, 0), 2, {}, [0, 1, 2, 3], id="left neighbours come along"),
        pytest.param(
            row(9, 0, 0, 0, 5, 0), 1, {"masked": [0, 2, 4]}, [0], id="no neighbour, no deviation"
        ),
        pytest.param(
            row(0, 0, 0, 0, 0, 0, 5, 0, 5),
            1,
            {"masked": [0, 2, 4, 6, 8]},
            [6, 8],
            id="mean + sigma",
        ),
        pytest.param(row(1, 1, 1, 1), 2, {}, [0, 1, 2, 3], id="equal deltas evict nothing"),
        pytest.param(row(0.1, 0.1, 0.1), 1, {}, [0, 1, 2], id="equal but for rounding of the mean"),
        pytest.param(
            row(3, 0, 3, 0, 3, 0), 2, {"masked": [0, 2, 4, 5]}, [0, 2], id="ties go to the left"
        ),
        pytest.param(row(1, 2, 3, 4, 5, 6, 7, 8), 4, {}, [3, 4, 5, 6, 7], id="the target's best"),
        pytest.param(
            row(0, 0, 0, 0, 9, 0), 1, {"progress": -1}, [0, 1, 2, 3, 4], id="a new block: a prefix"
        ),
        pytest.param(
            row(0, 0, 0, 0, 9, 0), 1, {"progress": 1}, [2, 3, 4], id="no holes right of progress"
        ),
        pytest.param(row(1, 2, 3), 3, {}, [0, 1, 2], id="target not below the masks"),
        pytest.param(row(1, 2, 3), 1, {"masked": [1]}, [1], id="one masked token"),
        pytest.param(row(1, 2, 3), 0, {"masked": []}, [], id="nothing masked"),
        pytest.param(row(1, float("nan"), 9, 1), 1, {}, [0, 1, 2, 3], id="a NaN keeps all"),
    ],
)
def test_rules(delta: Tensor, target: int, options: dict[str, object], expected: list[int]) -> None:
    assert keep(delta, target, **options) == expected  # type: ignore[arg-type]


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


@pytest.mark.parametrize("block_length", [4, 7, 32, 64])
def test_invariants_on_random_blocks(block_length: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(block_length)
    rows = 2000
    delta_NB = torch.randn(rows, block_length, generator=generator)
    delta_NB[::3] = delta_NB[::3].round()  # many ties
    masked_NB = torch.rand(rows, block_length, generator=generator) < 0.6
    target_N = torch.randint(1, block_length + 1, (rows,), generator=generator)
    target_N = torch.minimum(target_N, masked_NB.sum(1))
    progress_N = torch.randint(-1, block_length, (rows,), generator=generator)
    inputs = (delta_NB, masked_NB, target_N, progress_N)
    kept_NB = retain(*(tensor.to(device) for tensor in inputs)).cpu()

    assert not (kept_NB & ~masked_NB).any()
    assert (kept_NB.sum(1) >= target_N).all()
    assert (kept_NB.any(1) == masked_NB.any(1)).all()
    position_B = torch.arange(block_length)
    rightmost_N1 = torch.where(kept_NB, position_B, -1).amax(1, keepdim=True)
    hole_NB = masked_NB & ~kept_NB & (position_B < rightmost_N1)
    assert not (hole_NB & (position_B > progress_N[:, None])).any()
    for index in range(0, rows, 97):  # a row alone decides as it does among others
        alone = retain(*(tensor[index : index + 1] for tensor in inputs))
        assert torch.equal(alone[0], kept_NB[index])


def test_what_does_not_fit_is_refused() -> None:
    delta, masked = torch.zeros(2, 4), torch.ones(2, 4, dtype=torch.bool)
    target = torch.ones(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="masked bool"):
        retain(delta, masked.int(), target, target)
    with pytest.raises(ValueError, match="target_N must be int64"):
        retain(delta, masked, target.float(), target)
    with pytest.raises(ValueError, match="progress_N must be int64"):
        retain(delta, masked, target, target[:1])
