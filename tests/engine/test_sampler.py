import pytest
import torch

from focus_ray.engine.sampler import RowParams, choose_tokens

VOCAB, MASK = 8, 7


def row_params(
    rows, *, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, seed=0, position=None, suppressed=None
):
    position = torch.arange(rows) if position is None else position
    return RowParams(
        temperature_R=torch.full((rows,), temperature),
        top_p_R=torch.full((rows,), top_p),
        top_k_R=torch.full((rows,), top_k, dtype=torch.int64),
        min_p_R=torch.full((rows,), min_p),
        seed_R=torch.full((rows,), seed, dtype=torch.int64),
        position_R=position,
        step_R=torch.zeros(rows, dtype=torch.int64),
        suppressed_RK=suppressed,
    )


def choose(logits_RV, params, filtered=True):
    return choose_tokens(
        logits_RV, params, mask_token_id=MASK, any_sampled=True, any_filtered=filtered
    )


LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -2.0, -3.0, 1.5])


def test_draws_follow_the_softmax_without_the_mask():
    rows = 40_000
    params = row_params(rows, temperature=0.7)
    counts = choose(LOGITS.expand(rows, -1), params).token_R.bincount(minlength=VOCAB)
    expected = (LOGITS / 0.7).masked_fill(torch.arange(VOCAB) == MASK, -torch.inf).softmax(0)
    # chi-square with 6 degrees of freedom; 22.5 has a tail of 0.001, and the draws are fixed
    live = expected > 0
    chi2 = ((counts[live] - rows * expected[live]) ** 2 / (rows * expected[live])).sum()
    assert counts[MASK] == 0
    assert chi2 < 22.5


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        pytest.param({"top_k": 2}, {0, 1}, id="top-k"),
        pytest.param({"top_k": 1}, {0}, id="top-k of one is greedy"),
        pytest.param({"top_p": 0.5}, {0}, id="nucleus of the best alone"),
        pytest.param({"top_p": 0.75}, {0, 1}, id="nucleus takes the token that crosses the mass"),
        pytest.param({"min_p": 0.3}, {0, 1}, id="min-p is relative to the best"),
        pytest.param({"top_k": 3, "top_p": 0.7}, {0, 1}, id="nucleus of what top-k left"),
    ],
)
def test_filters_limit_the_draws(options, allowed):
    rows = 2000
    choice = choose(LOGITS.expand(rows, -1), row_params(rows, **options))
    assert set(choice.token_R.tolist()) == allowed


def test_confidence_is_that_of_the_scaled_unfiltered_softmax():
    params = row_params(64, temperature=0.5, top_k=2)
    choice = choose(LOGITS.expand(64, -1), params)
    scaled = (LOGITS / 0.5).softmax(0)
    torch.testing.assert_close(choice.confidence_R, scaled[choice.token_R])
    torch.testing.assert_close(choice.logprob_R, LOGITS.log_softmax(0)[choice.token_R])


def test_greedy_rows_are_untouched_by_sampled_neighbours():
    logits_RV = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(0))
    params = row_params(6)
    params.temperature_R[::2] = 0.0
    mixed = choose(logits_RV, params)
    alone = choose_tokens(
        logits_RV, row_params(6), mask_token_id=MASK, any_sampled=False, any_filtered=False
    )
    assert mixed.token_R[::2].tolist() == alone.token_R[::2].tolist()
    torch.testing.assert_close(mixed.confidence_R[::2], alone.confidence_R[::2])


def test_a_draw_depends_on_seed_position_and_step_alone():
    logits_RV = torch.zeros(512, VOCAB)
    base = choose(logits_RV, row_params(512)).token_R
    part = choose(logits_RV[:3], row_params(3, position=torch.tensor([5, 100, 511]))).token_R
    assert part.tolist() == base[[5, 100, 511]].tolist()
    other_seed = choose(logits_RV, row_params(512, seed=1)).token_R
    high_seed = choose(logits_RV, row_params(512, seed=1 << 40)).token_R
    negative = choose(logits_RV, row_params(512, seed=-1)).token_R
    params = row_params(512)
    params.step_R[:] = 1
    other_step = choose(logits_RV, params).token_R
    variants = [base, other_seed, high_seed, negative, other_step]
    for i, first in enumerate(variants):
        for second in variants[i + 1 :]:
            # independent draws from 7 tokens agree in a seventh of the places
            assert 0.05 < (first == second).float().mean() < 0.25


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_suppressed_tokens_are_never_chosen_and_do_not_change_confidence(sampled):
    suppressed = torch.tensor([[0, MASK]]).expand(200, -1)
    params = row_params(200, temperature=float(sampled), suppressed=suppressed)
    choice = choose_tokens(
        LOGITS.expand(200, -1),
        params,
        mask_token_id=MASK,
        any_sampled=sampled,
        any_filtered=False,
    )
    assert not {0, MASK} & set(choice.token_R.tolist())
    torch.testing.assert_close(choice.confidence_R, LOGITS.softmax(0)[choice.token_R])


def test_noise_stays_finite_over_many_draws():
    logits_RV = torch.zeros(1000, 1000)
    params = row_params(1000)
    token_R = choose_tokens(
        logits_RV, params, mask_token_id=0, any_sampled=True, any_filtered=False
    ).token_R
    # uniform over 999 tokens: the mean and the spread of a uniform
    assert abs(token_R.double().mean() - 500) < 4 * 288 / 1000**0.5
    assert len(token_R.unique()) > 600


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-37, 1e-40, 1e-44])
@pytest.mark.parametrize("shift", [0.0, -50.0], ids=["some logits above zero", "all below zero"])
@pytest.mark.parametrize("best", [None, 0], ids=["nothing suppressed", "the best suppressed"])
def test_the_coldest_draw_is_the_best_token(temperature, shift, best):
    suppressed = None if best is None else torch.full((50, 1), best)
    params = row_params(50, temperature=temperature, top_p=0.9, suppressed=suppressed)
    choice = choose((LOGITS + shift).expand(50, -1), params)
    assert set(choice.token_R.tolist()) == {0 if best is None else 1}
    # where the best was suppressed, the temperature leaves nothing for the second
    assert set(choice.confidence_R.tolist()) == {1.0 if best is None else 0.0}
