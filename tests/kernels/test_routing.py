from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from focus_ray.kernels.launch import can_launch
from focus_ray.kernels.routing import (
    Routing,
    route_by_softmax,
    route_by_softmax_reference,
    route_within_groups,
    route_within_groups_reference,
)

NAN, INF = math.nan, math.inf
# Weights are at most the scaling and are summed over few experts: some units of float32, and one
# of the dtype to which they are rounded where float32 falls on the other side of a rounding.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}

# NumPy, in Triton's interpreter, remarks on what GPUs compute without a word.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(invalid value|overflow) encountered:RuntimeWarning"
)

Chosen = list[tuple[int, float]]


def first_of(values: list[float]) -> list[int]:
    """Numbers of the values, the best first: what is no number last, of equals the lower first."""
    numbers = [-INF if math.isnan(value) else value for value in values]
    return sorted(range(len(values)), key=lambda i: (-numbers[i], i))


def softmax_loop(logits: list[float], count: int, *, renormalise: bool) -> Chosen:
    """One token, in the words of the models."""
    top = max(logits)
    total = sum(math.exp(logit - top) for logit in logits)
    chosen = [(e, math.exp(logits[e] - top) / total) for e in first_of(logits)[:count]]
    weight = sum(w for _, w in chosen) if renormalise else 1.0
    return [(e, w / weight) for e, w in chosen]


def groups_loop(
    logits: list[float],
    bias: list[float],
    count: int,
    *,
    num_groups: int,
    num_chosen_groups: int,
    scaling: float,
) -> Chosen:
    sigmoids = [1 / (1 + math.exp(-logit)) for logit in logits]
    ranks = [s + b for s, b in zip(sigmoids, bias, strict=True)]
    size = len(logits) // num_groups
    groups = [range(g * size, (g + 1) * size) for g in range(num_groups)]
    scores = [sum(sorted((ranks[e] for e in group), reverse=True)[:2]) for group in groups]
    eligible = sorted(e for g in first_of(scores)[:num_chosen_groups] for e in groups[g])
    chosen = [eligible[i] for i in first_of([ranks[e] for e in eligible])[:count]]
    total = sum(sigmoids[e] for e in chosen) if count > 1 else 1.0
    return [(e, sigmoids[e] / total * scaling) for e in chosen]


def apart(num_tokens: int, num_experts: int, seed: int = 0) -> Tensor:
    """Logits in random order whose sigmoids are so far apart that rounding changes no order."""
    generator = torch.Generator().manual_seed(seed)
    order = [torch.randperm(num_experts, generator=generator) for _ in range(num_tokens)]
    return torch.stack(order).float() / num_experts * 6 - 3


def assert_chosen(found: Routing, expected: list[Chosen], dtype: torch.dtype) -> None:
    assert (found.expert_Tk.dtype, found.weight_Tk.dtype) == (torch.int32, torch.float32)
    assert found.expert_Tk.is_contiguous() and found.weight_Tk.is_contiguous()
    assert found.expert_Tk.tolist() == [[e for e, _ in chosen] for chosen in expected]
    weight_Tk = torch.tensor([[w for _, w in chosen] for chosen in expected])
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found.weight_Tk.cpu(), weight_Tk, rtol=tolerance, atol=0)
    assert torch.equal(found.weight_Tk.to(dtype).float(), found.weight_Tk)  # rounded to it


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("renormalise", [False, True], ids=["as they are", "renormalised"])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "count"),
    [
        pytest.param(4, 128, 8, id="SDAR-30B-A3B"),
        pytest.param(1, 16, 3, id="one token"),
        pytest.param(3, 6, 6, id="every expert"),
        pytest.param(3, 21, 1, id="one of a number that is no power of two"),
        pytest.param(2, 1, 1, id="no choice"),
    ],
)
def test_softmax_equals_the_loop(
    num_tokens: int,
    num_experts: int,
    count: int,
    renormalise: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    logits_TE = apart(num_tokens, num_experts).to(dtype)
    expected = [softmax_loop(row, count, renormalise=renormalise) for row in logits_TE.tolist()]
    found = route_by_softmax(logits_TE.to(device), count, renormalise=renormalise)
    assert_chosen(found, expected, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "biased"])
@pytest.mark.parametrize(
    ("num_experts", "count", "num_groups", "num_chosen_groups"),
    [
        pytest.param(256, 8, 8, 4, id="LLaDA2.0"),
        pytest.param(8, 4, 8, 4, id="groups of one"),
        pytest.param(12, 3, 1, 1, id="one group"),
        pytest.param(21, 7, 3, 1, id="all of one group, no powers of two"),
        pytest.param(15, 15, 3, 3, id="every expert"),
        pytest.param(10, 1, 5, 2, id="one expert, its weight not normalised"),
    ],
)
def test_groups_equal_the_loop(
    num_experts: int,
    count: int,
    num_groups: int,
    num_chosen_groups: int,
    biased: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    # Of one dtype, the bias leaves no two ranks closer than its rounding.
    logits_TE = apart(3, num_experts).to(dtype)
    bias_E = apart(1, num_experts, seed=1)[0] / 8
    sizes: dict[str, Any] = {
        "num_groups": num_groups,
        "num_chosen_groups": num_chosen_groups,
        "scaling": 2.5,
    }
    bias = bias_E.tolist() if biased else [0.0] * num_experts
    expected = [groups_loop(row, bias, count, **sizes) for row in logits_TE.tolist()]
    found = route_within_groups(
        logits_TE.to(device), bias_E.to(device) if biased else None, count, **sizes
    )
    assert_chosen(found, expected, dtype)


def test_sigmoids_of_0_weigh_nothing(device: torch.device) -> None:
    logits_TE = torch.full((1, 4), -200.0, device=device)
    found = route_within_groups(logits_TE, None, 2, num_groups=2, num_chosen_groups=1, scaling=3.0)
    assert found.expert_Tk.tolist() == [[0, 1]]
    assert found.weight_Tk.tolist() == [[0, 0]]


def test_weights_know_nothing_of_the_bias(device: torch.device) -> None:
    logits_TE, bias_E = (
        torch.zeros(1, 4, device=device),
        torch.tensor([0.0, 9, 0, 5], device=device),
    )
    found = route_within_groups(
        logits_TE, bias_E, 2, num_groups=1, num_chosen_groups=1, scaling=3.0
    )
    assert found.expert_Tk.tolist() == [[1, 3]]
    assert found.weight_Tk.tolist() == [[1.5, 1.5]]


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        pytest.param([1, 1, 1, 1, 1, 1], [0, 1, 2], id="equals, the lower first"),
        pytest.param([0, 2, -1, 2, 0, 2], [1, 3, 5], id="equal best"),
        pytest.param([-0.0, 0.0, -0.0, -1, -1, -1], [0, 1, 2], id="0 and -0 are equal"),
        pytest.param([NAN, 1, NAN, 3, 2, NAN], [3, 4, 1], id="what is no number is not the best"),
        pytest.param([NAN] * 6, [0, 1, 2], id="nothing is a number"),
        pytest.param([1, INF, 0, INF, 5, -INF], [1, 3, 4], id="infinite"),
        pytest.param([-INF] * 6, [0, 1, 2], id="nothing above -inf"),
        pytest.param([NAN, NAN, NAN, NAN, NAN, -INF], [0, 1, 2], id="no better than -inf"),
        pytest.param([-9, -2, -5, -1e30, -1e38, -3], [1, 5, 2], id="negative"),
        pytest.param([1e-45, 0, -1e-45, -9, -9, -9], [0, 1, 2], id="nearly 0"),
    ],
)
def test_softmax_chooses_in_words(
    logits: list[float], expected: list[int], device: torch.device
) -> None:
    logits_TE = torch.tensor([logits], dtype=torch.float32, device=device)
    found = route_by_softmax(logits_TE, 3, renormalise=True)
    assert found.expert_Tk[0].tolist() == expected


@pytest.mark.parametrize(
    ("logits", "bias", "expected"),
    [
        pytest.param([0] * 8, [0] * 8, [0, 1, 2], id="equal groups and experts, the lower first"),
        pytest.param(
            [30, 90, 20, 40, 1, 2, 99, 50], [0] * 8, [0, 1, 2], id="saturated sigmoids are equal"
        ),
        pytest.param([-200] * 7 + [-9], [0] * 8, [7, 0, 1], id="sigmoids of 0"),
        pytest.param([9, -9, 1, 1, -9, -9, 5, -9], [0] * 8, [0, 2, 3], id="two good ones beat one"),
        pytest.param(
            [NAN, 9, 9, NAN, 1, 1, 0, 0], [0] * 8, [4, 5, 6], id="a NaN takes its group along"
        ),
        pytest.param([NAN, 9] * 4, [0] * 8, [1, 3, 0], id="NaN in all groups: numbers first"),
        pytest.param([NAN] * 8, [0] * 8, [0, 1, 2], id="nothing is a number"),
        pytest.param([INF, 0, -INF, 0, 1, 1, -INF, -INF], [0] * 8, [0, 4, 5], id="infinite"),
        pytest.param([0] * 8, [0, 0, 0, INF, 0, 0, INF, 0], [3, 6, 2], id="an infinite bias"),
        pytest.param([0] * 8, [-3, -3, -4, -9, -1, -9, -9, -2], [4, 0, 1], id="negative ranks"),
        pytest.param(
            [0] * 8, [INF, -INF, 1, 1, INF, -INF, 0, 0], [2, 3, 6], id="a score that is no number"
        ),
    ],
)
def test_groups_choose_in_words(
    logits: list[float], bias: list[float], expected: list[int], device: torch.device
) -> None:
    """Four groups of two, of which two are chosen."""
    found = route_within_groups(
        torch.tensor([logits], dtype=torch.float32, device=device),
        torch.tensor(bias, dtype=torch.float32, device=device),
        3,
        num_groups=4,
        num_chosen_groups=2,
        scaling=1.0,
    )
    assert found.expert_Tk[0].tolist() == expected


def softmax(logits_TE: Tensor, **options: Any) -> Routing:
    return route_by_softmax(logits_TE, 4, renormalise=True, **options)


def softmax_reference(logits_TE: Tensor, num_tokens_1: Tensor | None = None) -> Routing:
    return route_by_softmax_reference(logits_TE, 4, renormalise=True, num_tokens_1=num_tokens_1)


GROUPS: dict[str, Any] = {"num_groups": 4, "num_chosen_groups": 2, "scaling": 2.5}


def groups(logits_TE: Tensor, **options: Any) -> Routing:
    bias_E = torch.linspace(-1, 1, logits_TE.shape[1], device=logits_TE.device)
    return route_within_groups(logits_TE, bias_E, 4, **GROUPS, **options)


def groups_reference(logits_TE: Tensor, num_tokens_1: Tensor | None = None) -> Routing:
    bias_E = torch.linspace(-1, 1, logits_TE.shape[1], device=logits_TE.device)
    return route_within_groups_reference(logits_TE, bias_E, 4, **GROUPS, num_tokens_1=num_tokens_1)


ROUTERS = [
    pytest.param(softmax, softmax_reference, id="softmax"),
    pytest.param(groups, groups_reference, id="groups"),
]
Router = Callable[..., Routing]


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("route", "definition"), ROUTERS)
def test_equals_the_definition_where_much_is_equal(
    route: Router, definition: Router, dtype: torch.dtype, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(0)
    few = torch.tensor([-INF, -80.0, -2.0, -0.0, 0.0, 1.0, 18.0, 40.0, INF, NAN])
    drawn_TE = torch.randint(0, 9, (24, 32), generator=generator)
    drawn_TE[16:] = torch.randint(2, 8, (8, 32), generator=generator)  # nothing infinite
    drawn_TE[20:] = torch.randint(0, 10, (4, 32), generator=generator)  # no numbers, too
    logits_TE = few[drawn_TE].to(device, dtype)
    if not can_launch(logits_TE):
        pytest.skip("kernels run on CUDA, or with TRITON_INTERPRET=1 and not in bfloat16")
    found, expected = route(logits_TE), definition(logits_TE)
    assert torch.equal(found.expert_Tk, expected.expert_Tk)
    torch.testing.assert_close(
        found.weight_Tk,
        expected.weight_Tk,
        rtol=TOLERANCE[dtype],
        atol=1e-12,  # sigmoids of -80 vanish beside others
        equal_nan=True,
    )


@pytest.mark.parametrize(("route", "definition"), ROUTERS)
def test_tokens_of_nobody_have_no_expert(
    route: Router, definition: Router, device: torch.device
) -> None:
    logits_TE = apart(5, 16).to(device)
    logits_TE[3:] = NAN  # nobody wrote there
    all_real, found = (
        route(logits_TE),
        route(logits_TE, num_tokens_1=torch.tensor([3], dtype=torch.int32, device=device)),
    )
    assert torch.equal(found.expert_Tk[:3], all_real.expert_Tk[:3])
    assert torch.equal(found.weight_Tk[:3], all_real.weight_Tk[:3])
    assert (found.expert_Tk[3:] == 16).all()
    assert (found.weight_Tk[3:] == 0).all()


@pytest.mark.parametrize(("route", "definition"), ROUTERS)
def test_no_tokens(route: Router, definition: Router, device: torch.device) -> None:
    found = route(torch.zeros(0, 16, device=device))
    assert found.expert_Tk.shape == found.weight_Tk.shape == (0, 4)


@pytest.mark.gpu
@pytest.mark.parametrize(("route", "definition"), ROUTERS)
def test_equals_the_definition_for_many_tokens(route: Router, definition: Router) -> None:
    """Sigmoids have to be torch's to the last bit where random ones are next to each other."""
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA: torch.cuda.is_available() is false here")
    generator = torch.Generator().manual_seed(0)
    logits_TE = (torch.randn(1 << 17, 64, generator=generator) * 6).cuda()
    assert torch.equal(route(logits_TE).expert_Tk, definition(logits_TE).expert_Tk)


@pytest.mark.parametrize(
    ("route", "message"),
    [
        pytest.param(lambda: softmax(torch.zeros(16)), r"\[T, E\]", id="no tokens' dimension"),
        pytest.param(lambda: softmax(torch.zeros(16, 3).T), "contiguous", id="strided"),
        pytest.param(lambda: softmax(torch.zeros(2, 3)), "1 to 3, got 4", id="too few experts"),
        pytest.param(
            lambda: softmax(torch.zeros(2, 8), num_tokens_1=torch.tensor([2])),
            "num_tokens must be int32",
            id="count of another dtype",
        ),
        pytest.param(
            lambda: groups(torch.zeros(2, 10)), "4 does not divide 10", id="uneven groups"
        ),
        pytest.param(
            lambda: route_within_groups(torch.zeros(2, 8), None, 5, **GROUPS),
            "above the 4 experts of 2 of 4 groups",
            id="too few experts in the groups",
        ),
        pytest.param(
            lambda: route_within_groups(
                torch.zeros(2, 8), None, 4, **{**GROUPS, "num_chosen_groups": 5}
            ),
            "1 to 4, got 5",
            id="more groups than there are",
        ),
        pytest.param(
            lambda: route_within_groups(torch.zeros(2, 8), torch.zeros(8).half(), 4, **GROUPS),
            "bias must be float32",
            id="bias of another dtype",
        ),
    ],
)
def test_what_does_not_fit_is_refused(route: Callable[[], Routing], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        route()
