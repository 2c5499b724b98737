"""Parts of the vocabulary on several ranks choose what one rank chooses that has all of it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from focus_ray.kernels.confidence import Choice, Draw, confidence
from focus_ray.kernels.confidence_parts import (
    WORDS,
    confidence_part,
    confidence_part_reference,
    merge_parts,
)

# See test_confidence.py.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"
)

NAN, INF = math.nan, math.inf
# float32 sums of up to 151936 weights, and of parts of them; the logits themselves are exact
TOLERANCE = {"rtol": 3e-5, "atol": 3e-6}


def random_logits(num_rows: int, vocab: int, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed)) * 4


def draw_of(num_rows: int, device: torch.device, temperature: float = 0.8) -> Draw:
    row_R = torch.arange(num_rows, device=device)
    temperature_R = torch.full((num_rows,), temperature, device=device)
    return Draw(temperature_R, seed_R=row_R * 0x123456789AB, position_R=row_R, step_R=row_R + 1)


def in_parts(
    size: int,
    logits_RV: Tensor,
    mask_token_id: int,
    suppressed_RK: Tensor | None = None,
    draw: Draw | None = None,
) -> Choice:
    """As so many ranks choose."""
    parts_NFR = torch.stack(
        [
            confidence_part(
                part_RV,
                mask_token_id,
                rank * part_RV.shape[1],
                suppressed_RK=suppressed_RK,
                draw=draw,
            )
            for rank, part_RV in enumerate(logits_RV.chunk(size, dim=1))
        ]
    )
    return merge_parts(parts_NFR, draw)


def assert_as_whole(
    size: int,
    logits_RV: Tensor,
    mask_token_id: int,
    suppressed_RK: Tensor | None = None,
    draw: Draw | None = None,
) -> Choice:
    """Returns the choice."""
    found = in_parts(size, logits_RV, mask_token_id, suppressed_RK, draw)
    whole = confidence(logits_RV, mask_token_id, suppressed_RK=suppressed_RK, draw=draw)
    for name, expected in vars(whole).items():
        part = getattr(found, name)
        assert part.dtype == expected.dtype
        torch.testing.assert_close(part, expected, **TOLERANCE, equal_nan=True, msg=name)
    return found


@pytest.mark.parametrize("drawn", [False, True], ids=["best", "drawn"])
@pytest.mark.parametrize(
    ("size", "vocab", "num_rows", "dtype"),
    [
        pytest.param(8, 8, 4, torch.float32, id="one id each"),
        pytest.param(2, 18, 9, torch.bfloat16, id="half precision"),
        pytest.param(2, 2 * 8192, 3, torch.float32, id="whole tiles"),
        pytest.param(4, 4 * 2501, 3, torch.float16, id="no tile is full"),
        pytest.param(8, 151_936, 1, torch.float32, id="SDAR"),
    ],
)
def test_random_rows(
    size: int, vocab: int, num_rows: int, dtype: torch.dtype, drawn: bool, device: torch.device
) -> None:
    logits_RV = random_logits(num_rows, vocab).to(device, dtype)
    draw = draw_of(num_rows, device) if drawn else None
    assert_as_whole(size, logits_RV, 1, draw=draw)


@pytest.mark.parametrize("size", [2, 8])
def test_greedy_and_drawn_rows_stand_side_by_side(size: int, device: torch.device) -> None:
    draw = draw_of(6, device)
    draw.temperature_R[::3] = 0.0
    draw.temperature_R[1] = 1e-44
    logits_RV = random_logits(6, 800).to(device)
    choice = assert_as_whole(size, logits_RV, 7, draw=draw)
    greedy = confidence(logits_RV, 7)
    assert torch.equal(choice.token_R[::3], greedy.token_R[::3])


@pytest.mark.parametrize("drawn", [False, True], ids=["best", "drawn"])
@pytest.mark.parametrize(
    "mask_token_id", [0, 19, 20, 39], ids=["first", "last of a part", "first of a part", "last"]
)
def test_the_mask_and_suppressed_ids_are_counted_in_the_whole_vocabulary(
    mask_token_id: int, drawn: bool, device: torch.device
) -> None:
    logits_RV = random_logits(6, 40).to(device)
    barred = [9, 10, 29, 30, 5]  # at the edges of four parts of ten
    logits_RV[:, [mask_token_id, *barred]] += 20.0
    suppressed_RK = torch.tensor([[*barred, mask_token_id]] * 6, device=device)
    draw = draw_of(6, device) if drawn else None
    choice = assert_as_whole(4, logits_RV, mask_token_id, suppressed_RK, draw)
    assert not {mask_token_id, *barred} & set(choice.token_R.tolist())
    assert (choice.confidence_R < 0.01).all()


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "ids",
    [
        pytest.param((9, 10), id="neighbours on two ranks"),
        pytest.param((35, 12, 21), id="three ranks"),
        pytest.param(range(3, 40), id="everywhere"),
    ],
)
def test_a_tie_goes_to_the_lowest_id(size: int, ids: list[int], device: torch.device) -> None:
    logits_RV = torch.zeros(1, 40, device=device)
    logits_RV[:, list(ids)] = 1.0
    assert assert_as_whole(size, logits_RV, 2).token_R.item() == min(ids)


@pytest.mark.parametrize("drawn", [False, True], ids=["best", "drawn"])
@pytest.mark.parametrize(
    ("row", "tokens", "is_nan"),
    [
        pytest.param([NAN] * 6, {1, 3, 5}, True, id="nothing but NaN"),
        pytest.param([-INF] * 6, {1, 3, 5}, True, id="nothing but -inf"),
        pytest.param([-INF, -INF, NAN, -INF, NAN, NAN], {1, 3, 5}, True, id="NaN and -inf"),
        pytest.param([0, -INF, 0, -INF, 0, -INF], {1, 3, 5}, False, id="-inf where allowed"),
        pytest.param([-INF, -INF, 0, 1, 0, 2], {3, 5}, False, id="nothing on one rank"),
        pytest.param([0, -INF, 0, -INF, 0, 1], {5}, False, id="one finite token"),
        pytest.param([0, 1, 0, NAN, 0, NAN], {1}, True, id="NaN on other ranks"),
        pytest.param([0, 0, 0, NAN, NAN, 1], {1, 5}, True, id="NaN between numbers"),
        pytest.param([0, 0, 0, INF, 0, 0], {1, 3, 5}, True, id="+inf"),
    ],
)
def test_a_row_without_probabilities_still_yields_an_allowed_token(
    row: list[float], tokens: set[int], is_nan: bool, drawn: bool, device: torch.device
) -> None:
    """Ids 0, 2 and 4 may not be chosen; three ranks."""
    logits_RV = torch.tensor([[1.0] * 6, row, [1.0] * 6], device=device)
    suppressed_RK = torch.tensor([[4, 2]] * 3, device=device)
    draw = draw_of(3, device, 0.5) if drawn else None
    choice = in_parts(3, logits_RV, 0, suppressed_RK, draw)
    assert choice.token_R[1].item() in tokens
    if row[3] != INF:
        assert choice.logprob_R.isnan().tolist() == [False, is_nan, False]
        assert choice.confidence_R.isnan().tolist() == [False, is_nan, False]
        if not drawn:
            assert_as_whole(3, logits_RV, 0, suppressed_RK)


@pytest.mark.parametrize("drawn", [False, True], ids=["best", "drawn"])
@pytest.mark.parametrize("row", [[0.0] * 8, [NAN] * 8, [-INF] * 8], ids=str)
def test_a_rank_that_may_choose_nothing_is_not_asked(
    row: list[float], drawn: bool, device: torch.device
) -> None:
    suppressed_RK = torch.tensor([[0, 1, 7]], device=device)
    draw = draw_of(1, device) if drawn else None
    logits_RV = torch.tensor([row], device=device)
    part_FR = confidence_part(logits_RV[:, :2], 6, 0, suppressed_RK=suppressed_RK, draw=draw)
    assert part_FR[0].tolist() == [-1]
    choice = in_parts(4, logits_RV, 6, suppressed_RK, draw)
    assert choice.token_R.item() in {2, 3, 4, 5}


def test_a_mask_far_above_all_others_leaves_the_draw_to_them(device: torch.device) -> None:
    logits_RV = torch.zeros(16, 6, device=device)
    logits_RV[:, 2], logits_RV[:, 5] = 1000.0, -1000.0
    choice = assert_as_whole(3, logits_RV, 2, draw=draw_of(16, device, 0.5))
    assert set(choice.token_R.tolist()) == {0, 1, 3, 4}


@pytest.mark.parametrize("drawn", [False, True], ids=["best", "drawn"])
def test_a_part_equals_its_definition(drawn: bool, device: torch.device) -> None:
    logits_RV = random_logits(5, 9000).to(device)
    suppressed_RK = torch.tensor([[20_000, 8_999, 28_191]] * 5, device=device)
    draw = draw_of(5, device) if drawn else None
    arguments = (logits_RV, 20_100, 20_000)
    found_FR = confidence_part(*arguments, suppressed_RK=suppressed_RK, draw=draw)
    part_FR = confidence_part_reference(*arguments, suppressed_RK=suppressed_RK, draw=draw)
    assert torch.equal(found_FR[0], part_FR[0])
    assert (found_FR[0] >= 20_000).all()
    num_floats = len(WORDS) - 1 - (not drawn)  # the last is of draws
    for found_R, part_R in zip(found_FR[1:][:num_floats], part_FR[1:], strict=False):
        floats = found_R.view(torch.float32), part_R.view(torch.float32)
        torch.testing.assert_close(*floats, **TOLERANCE)


@pytest.mark.parametrize("drawn", [False, True], ids=["best", "drawn"])
def test_no_rows_give_no_tokens(drawn: bool, device: torch.device) -> None:
    draw = draw_of(0, device) if drawn else None
    choice = in_parts(2, torch.zeros(0, 8, device=device), 2, draw=draw)
    assert [part.shape for part in vars(choice).values()] == [(0,)] * 3


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"\[R, V\]"):
        confidence_part(torch.zeros(8, device=device), 2, 0)
    draw = draw_of(3, device)
    with pytest.raises(ValueError, match=r"seed_R must be int64 \[3\]"):
        draw = replace(draw, seed_R=draw.seed_R[:2])
        confidence_part(torch.zeros(3, 8, device=device), 2, 0, draw=draw)
