from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from focus_ray.kernels.moe import moe, moe_reference
from focus_ray.kernels.partial_sums import PartialSums
from focus_ray.kernels.routing import Routing

# Of the norm of all results. float32 sums of some hundred products; 16-bit numbers are rounded in
# the hidden layer, behind the experts and in the end.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def draw(
    num_tokens: int,
    hidden: int,
    width: int,
    num_experts: int,
    count: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    num_used: int | None = None,
) -> tuple[Tensor, Routing, Tensor, Tensor]:
    """Tokens as a view of something wider, routed to the first ``num_used`` experts."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x_TD = normal(num_tokens, hidden + 8).to(device, dtype)[:, :hidden]
    gate_up_E2ID = (normal(num_experts, 2 * width, hidden) * hidden**-0.5).to(device, dtype)
    down_EDI = (normal(num_experts, hidden, width) * width**-0.5).to(device, dtype)
    chosen_TE = torch.rand(num_tokens, num_used or num_experts, generator=generator).argsort(1)
    weight_Tk = torch.rand(num_tokens, count, generator=generator).to(dtype).float()
    expert_Tk = chosen_TE[:, :count].int().contiguous()
    return x_TD, Routing(expert_Tk.to(device), weight_Tk.to(device)), gate_up_E2ID, down_EDI


def in_float64(x_TD: Tensor, routing: Routing, gate_up_E2ID: Tensor, down_EDI: Tensor) -> Tensor:
    """One pair after the other, from the formula."""
    rows = []
    for x_D, experts, weights in zip(
        x_TD.double(), routing.expert_Tk.tolist(), routing.weight_Tk.double(), strict=True
    ):
        row_D = torch.zeros_like(x_D)
        for expert, weight in zip(experts, weights, strict=True):
            if expert < len(down_EDI):
                gate_I, up_I = (gate_up_E2ID[expert].double() @ x_D).chunk(2)
                hidden_I = gate_I / (1 + (-gate_I).exp()) * up_I
                row_D += weight * (down_EDI[expert].double() @ hidden_I)
        rows.append(row_D)
    return torch.stack(rows)


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert (found.shape, found.dtype) == (expected.shape, dtype)
    assert found.is_contiguous()
    assert (found.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "sizes", "options"),
    [
        pytest.param(9, (64, 32, 16, 4), {}, id="few tokens an expert"),
        pytest.param(1, (64, 32, 16, 4), {}, id="one token"),
        pytest.param(40, (32, 32, 4, 2), {}, id="more than a tile of each expert"),
        pytest.param(20, (32, 32, 12, 1), {"num_used": 1}, id="all tokens to one of many"),
        pytest.param(6, (32, 32, 5, 5), {}, id="every expert, no power of two"),
        pytest.param(7, (33, 17, 6, 3), {}, id="odd sizes"),
        pytest.param(3, (8, 2, 2, 1), {}, id="sizes below any block"),
    ],
)
def test_equals_the_formula_in_float64(
    num_tokens: int,
    sizes: tuple[int, int, int, int],
    options: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    inputs = draw(num_tokens, *sizes, dtype, device, **options)
    assert_near(moe(*inputs), in_float64(*inputs), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_tokens_of_nobody_touch_no_expert(dtype: torch.dtype, device: torch.device) -> None:
    x_TD, routing, gate_up_E2ID, down_EDI = draw(12, 32, 16, 6, 2, dtype, device, num_used=5)
    x_TD[8:] = torch.nan
    expert_Tk = routing.expert_Tk.index_fill(0, torch.arange(8, 12, device=device), 6)
    weight_Tk = routing.weight_Tk.index_fill(0, torch.arange(8, 12, device=device), torch.nan)
    routing = Routing(expert_Tk, weight_Tk)
    gate_up_E2ID[5], down_EDI[5] = torch.nan, torch.nan  # an expert that nobody wants
    found = moe(x_TD, routing, gate_up_E2ID, down_EDI)
    first = Routing(expert_Tk[:8], weight_Tk[:8])
    assert_near(found[:8], in_float64(x_TD[:8], first, gate_up_E2ID, down_EDI), dtype)
    assert (found[8:] == 0).all()
    added_TD = torch.ones_like(x_TD)
    assert (moe(x_TD, routing, gate_up_E2ID, down_EDI, added_TD)[8:] == 1).all()


def test_nobody_at_all(device: torch.device) -> None:
    x_TD, routing, *weights = draw(3, 32, 16, 6, 2, torch.float32, device)
    nobodys = replace(routing, expert_Tk=torch.full_like(routing.expert_Tk, 6))
    assert (moe(x_TD, nobodys, *weights) == 0).all()


def test_no_tokens(device: torch.device) -> None:
    inputs = draw(0, 32, 16, 6, 2, torch.float32, device)
    assert moe(*inputs).shape == (0, 32)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_what_is_added_comes_last_as_a_rounded_number(
    dtype: torch.dtype, device: torch.device
) -> None:
    inputs = draw(9, 48, 32, 8, 3, dtype, device)
    generator = torch.Generator().manual_seed(1)
    sums_STD = torch.randn(3, 9, 48, generator=generator).to(device)
    shares = PartialSums(sums_STD, dtype)
    strided_TD = torch.cat([shares.total(), shares.total()], dim=1)[:, :48]
    alone_TD = moe(*inputs)
    expected = alone_TD + shares.total()
    assert torch.equal(moe(*inputs, shares), expected)
    assert torch.equal(moe(*inputs, strided_TD), expected)


def test_a_token_does_not_feel_the_others(device: torch.device) -> None:
    x_TD, routing, *weights = draw(9, 64, 32, 4, 2, torch.float16, device)
    others_TD = torch.full_like(x_TD, torch.nan)
    others_TD[4] = x_TD[4]
    found = moe(others_TD, routing, *weights)
    assert torch.equal(found[4], moe(x_TD, routing, *weights)[4])
    assert found[torch.arange(9) != 4].isnan().all()


def test_the_same_call_gives_the_same_bits(device: torch.device) -> None:
    inputs = draw(40, 64, 32, 4, 2, torch.float16, device)
    first = moe(*inputs)
    assert all(torch.equal(moe(*inputs), first) for _ in range(3))


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_equals_the_definition(dtype: torch.dtype, device: torch.device) -> None:
    inputs = draw(21, 64, 48, 7, 3, dtype, device)
    added_TD = torch.ones(21, 64, dtype=dtype, device=device)
    assert_near(moe(*inputs, added_TD), moe_reference(*inputs, added_TD).double(), dtype)


SHAPES = [
    pytest.param(2048, 512, 256, id="LLaDA2.0-mini"),
    pytest.param(2048, 768, 128, id="SDAR-30B-A3B"),
]


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 8, 64, 512, 2048, 5000])
@pytest.mark.parametrize(("hidden", "width", "num_experts"), SHAPES)
def test_real_shapes_equal_the_definition_in_float32(
    num_tokens: int, hidden: int, width: int, num_experts: int
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA: torch.cuda.is_available() is false here")
    device, dtype = torch.device("cuda"), torch.bfloat16
    x_TD, routing, *weights = draw(num_tokens, hidden, width, num_experts, 8, dtype, device)
    found = moe(x_TD, routing, *weights)
    wide = [weight.float() for weight in weights]
    expected = moe_reference(x_TD.float(), routing, wide[0], wide[1], None)
    assert_near(found, expected.double(), dtype)
    assert torch.equal(moe(x_TD, routing, *weights), found)


@pytest.mark.gpu
def test_a_recorded_graph_takes_any_routing() -> None:
    """Nothing of a routing reaches the host: what was recorded with one is replayed with others."""
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA: torch.cuda.is_available() is false here")
    device = torch.device("cuda")
    x_TD, routing, *weights = draw(96, 256, 128, 16, 4, torch.bfloat16, device, num_used=4)
    moe(x_TD, routing, *weights)  # compiles, and makes the counters
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = moe(x_TD, routing, *weights)
    for num_used, nobodys in ((4, 0), (16, 0), (5, 90), (16, 96), (16, 1)):
        _, other, *_ = draw(96, 256, 128, 16, 4, torch.bfloat16, device, num_used=num_used)
        routing.expert_Tk.copy_(other.expert_Tk)
        routing.expert_Tk[96 - nobodys :] = 16
        graph.replay()
        assert torch.equal(found, moe(x_TD, routing, *weights))
        expected = moe_reference(x_TD, routing, weights[0], weights[1], None)
        assert_near(found, expected.double(), torch.bfloat16)


def changed(**parts: Tensor) -> Callable[[], Tensor]:
    """A call with parts that do not fit the others."""

    def call() -> Tensor:
        x_TD, routing, gate_up, down = draw(2, 8, 4, 3, 2, torch.float32, torch.device("cpu"))
        inputs: dict[str, Any] = {
            "x_TD": x_TD,
            "expert_Tk": routing.expert_Tk,
            "weight_Tk": routing.weight_Tk,
            "gate_up_E2ID": gate_up,
            "down_EDI": down,
            **parts,
        }
        chosen = Routing(inputs.pop("expert_Tk"), inputs.pop("weight_Tk"))
        return moe(routing=chosen, **inputs)

    return call


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(changed(x_TD=torch.zeros(2, 9)), "of one D", id="hidden size"),
        pytest.param(changed(gate_up_E2ID=torch.zeros(3, 4, 8)), r"\[3, 8, 8\]", id="no up"),
        pytest.param(
            changed(expert_Tk=torch.zeros(3, 2).int()), r"\[2, k\]", id="experts of other tokens"
        ),
        pytest.param(
            changed(expert_Tk=torch.zeros(2, 2).long()), "experts must be int32", id="64 bits"
        ),
        pytest.param(
            changed(weight_Tk=torch.zeros(2, 2).half()), "weights float32", id="16-bit weights"
        ),
        pytest.param(changed(down_EDI=torch.zeros(3, 8, 4).half()), "one dtype", id="dtypes"),
        pytest.param(changed(x_TD=torch.zeros(8, 2).T), "unit stride", id="strided tokens"),
        pytest.param(
            changed(down_EDI=torch.zeros(3, 4, 8).mT), "contiguous", id="weights transposed"
        ),
        pytest.param(
            changed(added_TD=torch.zeros(2, 8).half()), "what is added must be", id="16 bits added"
        ),
        pytest.param(
            changed(added_TD=torch.zeros(8, 2).T), "make it contiguous", id="strided addition"
        ),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
