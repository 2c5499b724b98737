from __future__ import annotations

import math

import pytest
import torch

from focus_ray.kernels.confidence import confidence

MASK = 2


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
    found_R, log_confidence_R = confidence(torch.tensor([logits], device=device), MASK)
    assert (found_R.dtype, log_confidence_R.dtype) == (torch.int64, torch.float32)
    assert found_R.tolist() == [token]
    assert log_confidence_R.item() == pytest.approx(math.log(probability), rel=1e-5)


@pytest.mark.parametrize("mask_token_id", [0, 40], ids=["first id", "last id"])
def test_a_mask_at_the_edge_of_the_vocabulary_is_never_chosen(mask_token_id: int) -> None:
    logits_RV = torch.randn(7, 41, generator=torch.Generator().manual_seed(0))
    logits_RV[:, mask_token_id] = 50.0
    before = logits_RV.clone()
    token_R, _ = confidence(logits_RV, mask_token_id)
    assert mask_token_id not in token_R.tolist()
    assert torch.equal(logits_RV, before)


def test_half_precision_logits_are_summed_in_float32(device: torch.device) -> None:
    logits_RV = torch.zeros(1, 100_000, dtype=torch.bfloat16, device=device)
    _, log_confidence_R = confidence(logits_RV, MASK)
    assert log_confidence_R.item() == pytest.approx(-math.log(100_000), rel=1e-5)


def test_no_rows_give_no_tokens() -> None:
    token_R, log_confidence_R = confidence(torch.zeros(0, 8), MASK)
    assert (token_R.shape, log_confidence_R.shape) == ((0,), (0,))


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
