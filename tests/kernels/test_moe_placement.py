from __future__ import annotations

import pytest
import torch
from torch import Tensor

from focus_ray.kernels.moe_placement import (
    BLOCK_P,
    MOST_EXPERTS,
    Placement,
    most_tiles,
    place,
    place_reference,
)
from focus_ray.kernels.split_counters import finished_counters

BLOCK_T = 16


def draw(num_tokens: int, num_experts: int, count: int, nobodys: int = 0) -> Tensor:
    """Distinct experts for every token, none for the last few."""
    generator = torch.Generator().manual_seed(0)
    order = [torch.randperm(num_experts, generator=generator) for _ in range(num_tokens)]
    expert_Tk = torch.stack(order)[:, :count].int()
    expert_Tk[num_tokens - nobodys :] = num_experts
    return expert_Tk.contiguous()


def tiles_of(placement: Placement) -> list[tuple[int, frozenset[int]]]:
    """Expert and pairs of every tile that has any, in their order."""
    pairs = placement.pair_ET.flatten().tolist()
    return [
        (expert, frozenset(pairs[first : first + num_rows]))
        for expert, first, num_rows in placement.tile_3M.T.tolist()
        if num_rows
    ]


CASES = [
    pytest.param(draw(20, 8, 3), 8, id="a tile of each expert"),
    pytest.param(draw(70, 6, 3), 6, id="several tiles of each expert"),
    pytest.param(draw(2, 40, 3), 40, id="most experts without tokens"),
    pytest.param(draw(1, 8, 8), 8, id="one token, every expert"),
    pytest.param(draw(33, 1, 1), 1, id="one expert"),
    pytest.param(torch.full((40, 1), 5, dtype=torch.int32), 7, id="all tokens to one expert"),
    pytest.param(draw(20, 8, 3, nobodys=4), 8, id="the last tokens belong to nobody"),
    pytest.param(draw(3, 8, 3, nobodys=3), 8, id="all tokens belong to nobody"),
    pytest.param(draw(BLOCK_P + 9, 5, 2), 5, id="more pairs than a program takes"),
    pytest.param(draw(32, 4, 2)[:, :1].contiguous(), 4, id="a last tile may be full"),
]


@pytest.mark.parametrize(("expert_Tk", "num_experts"), CASES)
def test_every_pair_is_in_a_tile_of_its_expert(
    expert_Tk: Tensor, num_experts: int, device: torch.device
) -> None:
    found = place(expert_Tk.to(device), num_experts, BLOCK_T)
    tiles = tiles_of(found)
    placed = sorted((pair, expert) for expert, pairs in tiles for pair in pairs)
    pairs = enumerate(expert_Tk.flatten().tolist())
    assert placed == [(pair, expert) for pair, expert in pairs if expert < num_experts]
    experts = [expert for expert, _ in tiles]
    assert experts == sorted(experts)
    # no more tiles than needed, and the others known to be empty
    assert all(len(pairs) <= BLOCK_T for _, pairs in tiles)
    for expert in set(experts):
        sizes = [len(pairs) for number, pairs in tiles if number == expert]
        assert sizes[:-1] == [BLOCK_T] * (len(sizes) - 1)
    assert len(found.tile_3M[2]) == most_tiles(expert_Tk.numel(), num_experts, BLOCK_T)
    assert (found.tile_3M[2, len(tiles) :] == 0).all()


@pytest.mark.kernels
@pytest.mark.parametrize(("expert_Tk", "num_experts"), CASES)
def test_equals_the_definition_and_leaves_counters_as_it_found_them(
    expert_Tk: Tensor, num_experts: int, device: torch.device
) -> None:
    expected = place_reference(expert_Tk, num_experts, BLOCK_T)
    num_tiles = int((expected.tile_3M[2] > 0).sum())
    for _ in range(2):
        found = place(expert_Tk.to(device), num_experts, BLOCK_T)
        assert torch.equal(found.tile_3M[:, :num_tiles].cpu(), expected.tile_3M[:, :num_tiles])
        for found_T, expected_T, count in zip(
            found.pair_ET.cpu(), expected.pair_ET, counts(expert_Tk, num_experts), strict=True
        ):
            assert torch.equal(found_T[:count].sort().values, expected_T[:count])
        assert not finished_counters(device).any()


def counts(expert_Tk: Tensor, num_experts: int) -> list[int]:
    found: list[int] = expert_Tk.flatten().bincount(minlength=num_experts + 1).tolist()
    return found[:num_experts]


def test_more_experts_than_counters_are_refused() -> None:
    with pytest.raises(ValueError, match=f"more than the {MOST_EXPERTS}"):
        place(torch.zeros(1, 1, dtype=torch.int32), MOST_EXPERTS + 1, BLOCK_T)


@pytest.mark.parametrize(
    ("num_pairs", "num_experts", "expected"),
    [
        pytest.param(8, 256, 8, id="a tile for each pair"),
        pytest.param(1600, 10, 110, id="full ones, and one of each expert that is not"),
        pytest.param(1601, 10, 111, id="rounded up"),
    ],
)
def test_tiles_are_bounded(num_pairs: int, num_experts: int, expected: int) -> None:
    assert most_tiles(num_pairs, num_experts, BLOCK_T) == expected
