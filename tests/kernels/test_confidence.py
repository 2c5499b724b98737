from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from focus_ray.kernels.confidence import Choice, Draw, confidence
from focus_ray.kernels.launch import INTERPRETED
from focus_ray.kernels.noise import exponential_noise

# NumPy, which computes for Triton's interpreter, warns of what a GPU does in silence: a difference
# to the lowest float32 divided by a low temperature is -inf, and so is the logarithm of 0.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"
)

MASK = 2
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# float32 sums of up to 151936 weights; the logits themselves are exact
TOLERANCE = {"rtol": 3e-5, "atol": 3e-6}
VOCABULARIES = [
    pytest.param(2, 3, id="the mask and one token"),
    pytest.param(41, 5, id="an odd vocabulary in one tile"),
    pytest.param(8192, 3, id="exactly one tile"),
    pytest.param(10_007, 3, id="the last tile is not full, rows begin anywhere"),
    pytest.param(151_936, 2, id="SDAR"),
]


def random_logits(num_rows: int, vocab: int, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed)) * 4


def draw_of(num_rows: int, temperature: float, device: torch.device) -> Draw:
    row_R = torch.arange(num_rows, device=device)
    temperature_R = torch.full((num_rows,), temperature, device=device)
    return Draw(temperature_R, seed_R=row_R * 0x123456789AB, position_R=row_R, step_R=row_R + 1)


def expected_choice(
    logits_RV: Tensor, mask_token_id: int, barred: list[int], draw: Draw | None
) -> Choice:
    """Row by row in float64; of the noise, the definition is taken."""
    tokens, probabilities, logprobs = [], [], []
    for r, logit_V in enumerate(logits_RV.cpu().double()):
        temperature = 0.0 if draw is None else draw.temperature_R[r].item()
        weight_V = (logit_V / (temperature or 1.0)).softmax(0)
        score_V = logit_V.clone()
        if draw is not None and temperature:
            keys = (part[r : r + 1].cpu() for part in (draw.seed_R, draw.position_R, draw.step_R))
            noise_V = exponential_noise(*keys, len(logit_V))[0].double()
            score_V = logit_V / temperature - noise_V.log()
        score_V[[mask_token_id, *barred]] = -torch.inf
        token = int((score_V == score_V.max()).nonzero()[0])
        tokens.append(token)
        probabilities.append(weight_V[token].item())
        logprobs.append(logit_V.log_softmax(0)[token].item())
    return Choice(torch.tensor(tokens), torch.tensor(probabilities), torch.tensor(logprobs))


def assert_equal(found: Choice, expected: Choice) -> None:
    dtypes = (found.token_R.dtype, found.confidence_R.dtype, found.logprob_R.dtype)
    assert dtypes == (torch.int64, torch.float32, torch.float32)
    assert found.token_R.tolist() == expected.token_R.tolist()
    torch.testing.assert_close(found.confidence_R.cpu(), expected.confidence_R, **TOLERANCE)
    torch.testing.assert_close(found.logprob_R.cpu(), expected.logprob_R, **TOLERANCE)


@pytest.mark.parametrize(
    ("logits", "token", "probability"),
    [
        pytest.param([0.0, math.log(3.0), -1e9, 0.0], 1, 0.6, id="the largest"),
        pytest.param([0.0, 0.0, 0.0, 0.0], 0, 0.25, id="a tie goes to the lowest id"),
        pytest.param([0.0, 5.0, 1.0, 5.0], 1, None, id="a tie behind a smaller id"),
        pytest.param(
            [0.0, math.log(2.0), math.log(7.0), 0.0], 1, 2 / 11, id="the mask counts, never wins"
        ),
        pytest.param([-100.0, -90.0, 100.0, -90.0], 1, None, id="the mask holds nearly everything"),
    ],
)
def test_best_token_and_its_probability(
    logits: list[float], token: int, probability: float | None, device: torch.device
) -> None:
    if probability is None:
        probability = math.exp(logits[token] - max(logits)) / sum(
            math.exp(logit - max(logits)) for logit in logits
        )
    choice = confidence(torch.tensor([logits], device=device), MASK)
    assert choice.token_R.tolist() == [token]
    assert choice.logprob_R.item() == pytest.approx(math.log(probability), rel=1e-5)
    assert choice.confidence_R.item() == pytest.approx(probability, rel=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("vocab", "num_rows"), VOCABULARIES)
def test_the_best_equals_the_formula_in_float64(
    vocab: int, num_rows: int, dtype: torch.dtype, device: torch.device
) -> None:
    logits_RV = random_logits(num_rows, vocab).to(dtype)
    found = confidence(logits_RV.to(device), 1)
    assert_equal(found, expected_choice(logits_RV, 1, [], None))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.3] if INTERPRETED else [0.3, 1.0, 3.0])
@pytest.mark.parametrize(("vocab", "num_rows"), VOCABULARIES)
def test_a_draw_equals_the_formula_in_float64(
    vocab: int, num_rows: int, temperature: float, dtype: torch.dtype, device: torch.device
) -> None:
    logits_RV = random_logits(num_rows, vocab, seed=1).to(dtype)
    draw = draw_of(num_rows, temperature, device)
    expected = expected_choice(logits_RV, 0, [], draw)
    assert_equal(confidence(logits_RV.to(device), 0, draw=draw), expected)


@pytest.mark.parametrize("drawn", [False, True], ids=["best", "drawn"])
def test_suppressed_ids_count_but_are_not_chosen(drawn: bool, device: torch.device) -> None:
    vocab = 9000
    logits_RV = random_logits(4, vocab)
    barred = [5, 8192, 8999, 17, 8191]  # of every tile, the first and the last of one among them
    logits_RV[:, barred] += torch.tensor([9.0, 9.5, 9.9, 9.2, 9.7]) - logits_RV[:, barred] + 10
    logits_RV[:, MASK] = 21.0
    draw = draw_of(4, 0.7, device) if drawn else None
    suppressed_RK = torch.tensor([[MASK, *barred, MASK]] * 4, device=device)
    found = confidence(logits_RV.to(device), MASK, suppressed_RK=suppressed_RK, draw=draw)
    assert_equal(found, expected_choice(logits_RV, MASK, barred, draw))


def test_each_row_has_its_own_temperature_and_suppressed_ids(device: torch.device) -> None:
    logits_RV = random_logits(4, 50)
    logits_RV[:, 7] = 12.0
    draw = draw_of(4, 1.5, device)
    draw.temperature_R[::2] = 0.0
    suppressed_RK = torch.tensor([[7], [7], [MASK], [MASK]], device=device)
    found = confidence(logits_RV.to(device), MASK, suppressed_RK=suppressed_RK, draw=draw)
    for rows, barred in ((slice(0, 2), [7]), (slice(2, 4), [])):
        some = Draw(**{name: part[rows] for name, part in vars(draw).items()})
        expected = expected_choice(logits_RV[rows], MASK, barred, some)
        assert_equal(Choice(**{name: part[rows] for name, part in vars(found).items()}), expected)


@pytest.mark.parametrize(
    "ids",
    [
        pytest.param((8191, 8192), id="last lane of a tile, first lane of the next"),
        pytest.param((3, 8195), id="one lane in two tiles"),
        pytest.param((15, 16, 17), id="within a lane's group, and the next lane"),
        pytest.param((16_383, 9, 18_000), id="three tiles, found in another order"),
    ],
)
def test_a_tie_goes_to_the_lowest_id_wherever_it_is_found(
    ids: tuple[int, ...], device: torch.device
) -> None:
    logits_RV = torch.zeros(1, 20_000, device=device)
    logits_RV[:, list(ids)] = 1.0
    assert confidence(logits_RV, MASK).token_R.item() == min(ids)


@pytest.mark.parametrize("drawn", [False, True], ids=["best", "drawn"])
@pytest.mark.parametrize("mask_token_id", [0, 40], ids=["first id", "last id"])
def test_a_mask_at_the_edge_of_the_vocabulary_is_never_chosen(
    mask_token_id: int, drawn: bool, device: torch.device
) -> None:
    logits_RV = random_logits(7, 41).to(device)
    logits_RV[:, mask_token_id] = 50.0
    before = logits_RV.clone()
    choice = confidence(logits_RV, mask_token_id, draw=draw_of(7, 1.0, device) if drawn else None)
    assert mask_token_id not in choice.token_R.tolist()
    assert torch.equal(logits_RV, before)


def test_a_mask_far_above_all_others_leaves_the_draw_to_them(device: torch.device) -> None:
    num_rows = 64
    logits_RV = torch.zeros(num_rows, 6, device=device)
    logits_RV[:, MASK], logits_RV[:, 5] = 1000.0, -1000.0
    choice = confidence(logits_RV, MASK, draw=draw_of(num_rows, 0.5, device))
    assert set(choice.token_R.tolist()) == {0, 1, 3, 4}
    assert choice.confidence_R.tolist() == [0.0] * num_rows
    assert choice.logprob_R.tolist() == [-1000.0] * num_rows


def test_half_precision_logits_are_summed_in_float32(device: torch.device) -> None:
    logits_RV = torch.zeros(1, 100_000, dtype=torch.bfloat16, device=device)
    choice = confidence(logits_RV, MASK)
    assert choice.logprob_R.item() == pytest.approx(-math.log(100_000), rel=1e-5)


@pytest.mark.parametrize("drawn", [False, True], ids=["best", "drawn"])
def test_a_row_does_not_feel_the_others(drawn: bool, device: torch.device) -> None:
    logits_RV = random_logits(5, 6000).to(device)
    draw = draw_of(5, 0.8, device) if drawn else None
    together = confidence(logits_RV, MASK, draw=draw)
    third = None if draw is None else draw.take(torch.tensor([3], device=device))
    alone = confidence(logits_RV[3:4], MASK, draw=third)
    for name, part in vars(alone).items():
        assert torch.equal(getattr(together, name)[3:4], part)


@pytest.mark.parametrize("drawn", [False, True], ids=["best", "drawn"])
def test_rows_may_lie_apart(drawn: bool, device: torch.device) -> None:
    wide = random_logits(6, 99).to(device)
    draw = draw_of(3, 0.8, device) if drawn else None
    apart = confidence(wide[::2, 3:74], MASK, draw=draw)
    together = confidence(wide[::2, 3:74].contiguous(), MASK, draw=draw)
    for name, part in vars(apart).items():
        assert torch.equal(getattr(together, name), part)


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("drawn", [False, True], ids=["best", "drawn"])
@pytest.mark.parametrize(
    ("row", "tokens", "is_nan"),
    [
        pytest.param([NAN] * 6, {1, 3, 5}, True, id="nothing but NaN"),
        pytest.param([-INF] * 6, {1, 3, 5}, True, id="nothing but -inf"),
        pytest.param([NAN, -INF, NAN, -INF, NAN, NAN], {1, 3, 5}, True, id="NaN and -inf"),
        pytest.param([0, -INF, 0, -INF, 0, -INF], {1, 3, 5}, False, id="-inf where allowed"),
        pytest.param([0, -INF, 0, 1, 0, -INF], {3}, False, id="one finite token"),
        pytest.param([0, NAN, 0, 1, 0, NAN], {3}, True, id="one token that is a number"),
        pytest.param([0, 0, NAN, 0, NAN, 0], {1, 3, 5}, True, id="NaN where it is not allowed"),
        pytest.param([0, 0, 0, INF, 0, 0], {1, 3, 5}, True, id="+inf"),
    ],
)
def test_a_row_without_probabilities_still_yields_an_allowed_token(
    row: list[float], tokens: set[int], is_nan: bool, drawn: bool, device: torch.device
) -> None:
    """Ids 0, 2 and 4 may not be chosen; the neighbours of the broken row stay whole."""
    logits_RV = torch.tensor([[1.0] * 6, row, [1.0] * 6], device=device)
    suppressed_RK = torch.tensor([[4, 2]] * 3, device=device)
    draw = draw_of(3, 0.5, device) if drawn else None
    choice = confidence(logits_RV, 0, suppressed_RK=suppressed_RK, draw=draw)
    assert choice.token_R[1].item() in tokens
    if row[3] != INF:
        assert choice.logprob_R.isnan().tolist() == [False, is_nan, False]
        assert choice.confidence_R.isnan().tolist() == [False, is_nan, False]
    if not drawn:
        allowed = [-INF if math.isnan(row[i]) else row[i] for i in (1, 3, 5)]
        assert choice.token_R[1].item() == (1, 3, 5)[allowed.index(max(allowed))]


@pytest.mark.parametrize("drawn", [False, True], ids=["best", "drawn"])
def test_no_rows_give_no_tokens(drawn: bool, device: torch.device) -> None:
    draw = draw_of(0, 1.0, device) if drawn else None
    choice = confidence(torch.zeros(0, 8, device=device), MASK, draw=draw)
    assert [part.shape for part in vars(choice).values()] == [(0,)] * 3


@pytest.mark.parametrize(
    ("shape", "mask_token_id", "message"),
    [
        pytest.param((8,), 2, r"\[R, V\]", id="one row without its dimension"),
        pytest.param((1, 8), 8, "not in", id="mask past the vocabulary"),
        pytest.param((1, 8), -1, "not in", id="negative mask"),
    ],
)
def test_what_does_not_fit_is_refused(
    shape: tuple[int, ...], mask_token_id: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        confidence(torch.zeros(shape), mask_token_id)


def test_parameters_of_other_rows_are_refused(device: torch.device) -> None:
    logits_RV = torch.zeros(3, 8, device=device)
    with pytest.raises(ValueError, match=r"suppressed_RK must be int64 \[3, K\]"):
        confidence(logits_RV, MASK, suppressed_RK=torch.zeros(2, 1, dtype=torch.int64))
    draw = draw_of(3, 1.0, device)
    with pytest.raises(ValueError, match=r"seed_R must be int64 \[3\]"):
        confidence(logits_RV, MASK, draw=replace(draw, seed_R=draw.seed_R[:2]))
    with pytest.raises(ValueError, match=r"temperature_R must be float32 \[3\]"):
        confidence(logits_RV, MASK, draw=replace(draw, temperature_R=draw.seed_R))
