"""Every tile and split, whatever a batch would choose; the contract has its own tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from paged_batches import TOLERANCE, Batch
from torch import Tensor

from focus_ray.kernels import attention_kernels
from focus_ray.kernels.attention_kernels import launch_attention
from focus_ray.kernels.launch import INTERPRETED, can_launch
from focus_ray.kernels.split_counters import finished_counters
from focus_ray.kernels.tuning import AttentionPlan, AttentionTile

LOW = AttentionTile(16, 16, 2, 2, 1)
TILES = [
    pytest.param(LOW, id="16x16"),
    pytest.param(AttentionTile(16, 64, 4, 3, 1), id="16x64"),
    pytest.param(AttentionTile(32, 32, 4, 3, 1), id="32x32"),
    pytest.param(AttentionTile(64, 64, 4, 3, 1), id="64x64"),
    pytest.param(AttentionTile(128, 64, 8, 3, 1), id="128x64"),
]
if INTERPRETED:  # it is slow, and knows no tensor cores: the least and the largest stand for all
    TILES = [TILES[0], TILES[-1]]
# Rows of one tile and of many, tokens of one row apart by more than a tile of positions, splits
# that are empty for some rows and for some tokens.
MIXED = Batch([[80, 33, 16], [5], [40] * 11, [70], [], []], unowned=3)
OWNED = sum(map(len, MIXED.rows))


@pytest.fixture(autouse=True)
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that rows of some ten positions are shared among splits."""
    monkeypatch.setattr(attention_kernels, "MIN_POSITIONS_PER_SPLIT", 16)


def launch(inputs: dict[str, Any], plan: AttentionPlan, owned: int | None = None) -> Tensor:
    """Where nothing may be left as it was allocated: fresh memory holds NaN.

    Of the tokens that belong to rows; all of them unless told otherwise.
    """
    if not can_launch(*(value for value in inputs.values() if isinstance(value, Tensor))):
        pytest.skip("kernels run on CUDA, or with TRITON_INTERPRET=1 and not in bfloat16")
    bounds = ("max_row_len", "max_kv_len")
    inputs = {name: value for name, value in inputs.items() if name not in bounds}
    with fresh_memory_is_nan():
        return launch_attention(**inputs, plan=plan)[:owned]


@contextmanager
def fresh_memory_is_nan() -> Iterator[None]:
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(was)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.parametrize("tile", TILES)
def test_every_tile_and_split_gives_the_same(
    tile: AttentionTile, num_splits: int, dtype: torch.dtype, device: torch.device
) -> None:
    inputs = MIXED.inputs(dtype, device)
    found = launch(inputs, AttentionPlan(tile, num_splits, 1), OWNED)
    expected = MIXED.attend_token_by_token(inputs)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("group", range(1, 9))
def test_any_group_of_query_heads(group: int, device: torch.device) -> None:
    batch = Batch([[20] * 5, [3, 40], []], num_heads=2 * group)
    inputs = batch.inputs(torch.float32, device)
    found = launch(inputs, AttentionPlan(LOW, 2, 1))
    torch.testing.assert_close(
        found.cpu().double(), batch.attend_token_by_token(inputs), rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.parametrize("head_dim", [5, 16, 41, 64, 96, 128])
def test_any_head_size(head_dim: int, num_splits: int, device: torch.device) -> None:
    batch = Batch([[20] * 5, [3, 7]], head_dim=head_dim)
    inputs = batch.inputs(torch.float32, device)
    found = launch(inputs, AttentionPlan(LOW, num_splits, 1))
    torch.testing.assert_close(
        found.cpu().double(), batch.attend_token_by_token(inputs), rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("page_size", [1, 2, 3, 4, 16, 32, 128])
def test_any_page_size_and_nothing_unseen_matters(page_size: int, device: torch.device) -> None:
    batch = Batch([[40, 35, 3], [17], [64] * 2], page_size=page_size)
    inputs = batch.inputs(torch.float32, device)
    expected = batch.attend_token_by_token(inputs)
    batch.poison_unseen_slots(inputs)
    found = launch(inputs, AttentionPlan(AttentionTile(16, 32, 4, 3, 1), 2, 1))
    torch.testing.assert_close(found.cpu().double(), expected, rtol=0, atol=2e-5)


def test_rows_are_found_past_the_first_search(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_kernels, "ROWS_PER_SEARCH", (2, 4))
    batch = Batch([[3], [4] * 9, [5, 6], [7], [8], [9] * 2, [], []], num_kv_heads=1)
    inputs = batch.inputs(torch.float32, device)
    found = launch(inputs, AttentionPlan(LOW, 1, 1))
    torch.testing.assert_close(
        found.cpu().double(), batch.attend_token_by_token(inputs), rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.parametrize(
    ("busy_rows", "places"),
    [
        pytest.param(1, 1, id="one program takes all that nobody thought of"),
        pytest.param(1, 4, id="a few programs take it"),
        pytest.param(2, 2, id="some rows nobody thought of"),
        pytest.param(2, 100, id="all at once, and each may take another"),
        pytest.param(4, 100, id="a program for every tile"),
        pytest.param(100, 1, id="more rows thought of than there are"),
    ],
)
def test_every_tile_has_its_program(
    busy_rows: int, places: int, num_splits: int, device: torch.device
) -> None:
    inputs = {**MIXED.inputs(torch.float32, device), "busy_rows": busy_rows}
    found = launch(inputs, AttentionPlan(LOW, num_splits, places), OWNED)
    expected = MIXED.attend_token_by_token(inputs)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("num_likely", "num_unlikely", "expected"),
    [
        pytest.param(9, 0, [(0, 9, False)], id="as many rows as were thought of"),
        pytest.param(9, 700, [(0, 9, True)], id="a small step: the few take what else there is"),
        pytest.param(90, 10, [(0, 100, False)], id="a large step: a few leave at once"),
        pytest.param(90, 700, [(0, 90, False), (90, 20, True)], id="too many to leave at once"),
    ],
)
def test_small_steps_are_one_launch(
    num_likely: int, num_unlikely: int, expected: list[tuple[int, int, bool]]
) -> None:
    found = attention_kernels._launches(num_likely + num_unlikely, num_unlikely, 20)
    assert list(found) == expected


@pytest.mark.parametrize(
    "limits",
    [
        pytest.param([16], id="one split has work"),
        pytest.param([17], id="two splits have work"),
        pytest.param([64], id="every split has work"),
        pytest.param([65], id="splits longer than the least"),
        pytest.param([1, 64], id="a token that sees nothing of most splits"),
    ],
)
def test_as_many_splits_as_pay(limits: list[int], device: torch.device) -> None:
    batch = Batch([limits], page_size=16)
    inputs = batch.inputs(torch.float32, device)
    found = launch(inputs, AttentionPlan(LOW, 4, 1))
    expected = batch.attend_token_by_token(inputs)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=0, atol=2e-5)


def test_what_was_counted_is_forgotten(device: torch.device) -> None:
    inputs = MIXED.inputs(torch.float32, device)
    plan = AttentionPlan(LOW, 4, 1)
    first = launch(inputs, plan, OWNED)
    assert not finished_counters(first.device).any()
    assert torch.equal(launch(inputs, plan, OWNED), first)


def test_more_tiles_than_are_counted_are_not_split(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = MIXED.inputs(torch.float32, device)
    whole = launch(inputs, AttentionPlan(LOW, 1, 1), OWNED)
    monkeypatch.setattr(attention_kernels, "MAX_COUNTED_TILES", 3)
    assert torch.equal(launch(inputs, AttentionPlan(LOW, 4, 1), OWNED), whole)


def test_one_split_with_work_is_as_if_nothing_were_split(device: torch.device) -> None:
    inputs = Batch([[16] * 3, [9]]).inputs(torch.float32, device)
    assert torch.equal(
        launch(inputs, AttentionPlan(LOW, 8, 1)), launch(inputs, AttentionPlan(LOW, 1, 1))
    )


@pytest.mark.parametrize("num_splits", [1, 4])
def test_a_row_gets_the_same_bits_in_any_company(num_splits: int, device: torch.device) -> None:
    inputs = MIXED.inputs(torch.float32, device)
    plan = AttentionPlan(LOW, num_splits, 1)
    together = launch(inputs, plan, OWNED)
    first = 0
    for row, limits in enumerate(MIXED.rows):
        tokens = slice(first, first + len(limits))
        first = tokens.stop
        if not limits:
            continue
        alone = launch(
            inputs
            | {
                "q_THd": inputs["q_THd"][tokens],
                "row_table_S": inputs["row_table_S"][row : row + 1],
                "row_offsets_S1": torch.tensor([0, len(limits)], device=device),
                "kv_limit_T": inputs["kv_limit_T"][tokens],
            },
            plan,
        )
        assert torch.equal(alone, together[tokens])


@pytest.mark.gpu
def test_launching_never_waits_for_the_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA: torch.cuda.is_available() is false here")
    inputs = MIXED.inputs(torch.bfloat16, "cuda")
    expected = launch(inputs, AttentionPlan(LOW, 4, 1), OWNED)  # compiles
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = launch(inputs, AttentionPlan(LOW, 4, 1), OWNED)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert torch.equal(found, expected)
