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


def on(device, params):
    """The parameters on a device; a GPU draws with its kernel."""
    moved = {name: t if t is None else t.to(device) for name, t in vars(params).items()}
    return RowParams(**moved)


def choose(logits_RV, params, filtered=True):
    return choose_tokens(
        logits_RV, params, mask_token_id=MASK, any_sampled=True, any_filtered=filtered
    )


LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -2.0, -3.0, 1.5])


@pytest.mark.parametrize("filtered", [False, True], ids=["in one pass", "as where rows are cut"])
def test_draws_follow_the_softmax_without_the_mask(filtered, device):
    rows = 40_000
    # a top-k of the whole vocabulary cuts nothing, but goes the way of rows that are cut
    params = on(device, row_params(rows, temperature=0.7, top_k=VOCAB if filtered else 0))
    choice = choose(LOGITS.to(device).expand(rows, -1), params, filtered)
    counts = choice.token_R.cpu().bincount(minlength=VOCAB)
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
def test_filters_limit_the_draws(options, allowed, device):
    rows = 2000
    params = on(device, row_params(rows, **options))
    choice = choose(LOGITS.to(device).expand(rows, -1), params)
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


def test_a_row_that_is_not_cut_draws_the_same_beside_rows_that_are(device):
    logits_RV = torch.randn(64, VOCAB, generator=torch.Generator().manual_seed(0)).to(device)
    alone = choose(logits_RV, on(device, row_params(64)), filtered=False)
    params = on(device, row_params(64))
    params.top_k_R[::2] = 1
    beside = choose(logits_RV, params)
    for name, part in vars(alone).items():
        assert torch.equal(getattr(beside, name)[1::2], part[1::2])
    assert (beside.token_R[::2] != alone.token_R[::2]).any()


def test_half_precision_rows_are_cut_in_float32(device):
    logits_RV = LOGITS.to(device, torch.bfloat16).expand(64, -1)
    choice = choose(logits_RV, on(device, row_params(64, top_p=0.75)))
    exact = choose(LOGITS.to(device).expand(64, -1), on(device, row_params(64, top_p=0.75)))
    for name, part in vars(exact).items():
        assert torch.equal(getattr(choice, name), part)  # these logits are exact in bfloat16


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
def test_suppressed_tokens_are_never_chosen_and_do_not_change_confidence(sampled, device):
    suppressed = torch.tensor([[0, MASK]]).expand(200, -1)
    params = row_params(200, temperature=float(sampled), suppressed=suppressed)
    choice = choose_tokens(
        LOGITS.to(device).expand(200, -1),
        on(device, params),
        mask_token_id=MASK,
        any_sampled=sampled,
        any_filtered=False,
    )
    assert not {0, MASK} & set(choice.token_R.tolist())
    confidence_R, token_R = choice.confidence_R.cpu(), choice.token_R.cpu()
    torch.testing.assert_close(confidence_R, LOGITS.softmax(0)[token_R])


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
@pytest.mark.parametrize("top_p", [1.0, 0.9], ids=["whole", "cut"])
def test_the_coldest_draw_is_the_best_token(temperature, shift, best, top_p, device):
    suppressed = None if best is None else torch.full((50, 1), best)
    params = row_params(50, temperature=temperature, top_p=top_p, suppressed=suppressed)
    choice = choose((LOGITS + shift).to(device).expand(50, -1), on(device, params))
    assert set(choice.token_R.tolist()) == {0 if best is None else 1}
    # where the best was suppressed, the temperature leaves nothing for the second
    assert set(choice.confidence_R.tolist()) == {1.0 if best is None else 0.0}
