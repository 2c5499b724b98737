"""Gates and experts as layers, against networks that are written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from focus_ray.models.layers import SwiGLU, stored_shards
from focus_ray.models.moe import Experts, GroupedGate, SoftmaxGate, SparseMLP

D, I, E, K, T = 24, 10, 12, 3, 9  # noqa: E741


def fill(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def weights_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """Under their names in a checkpoint."""
    return {name: shard.tensor for name, shard in stored_shards(module).items()}


def network(x_D: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    """One SwiGLU network of one token, from its stored weights."""
    gate_ID, up_ID, down_DI = (
        weights[f"{name}.{part}_proj.weight"] for part in ["gate", "up", "down"]
    )
    return down_DI @ (F.silu(gate_ID @ x_D) * (up_ID @ x_D))


@pytest.fixture
def x_TD() -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(1))


def everybody() -> Tensor:
    return torch.tensor([T], dtype=torch.int32)


@pytest.mark.parametrize("renormalise", [True, False])
def test_softmax_experts_are_the_sum_written_out(x_TD: Tensor, renormalise: bool) -> None:
    gate = SoftmaxGate(D, E, K, torch.float32, renormalise=renormalise)
    layer = SparseMLP(gate, Experts(E, D, I, torch.float32), None)
    fill(layer)
    weights = weights_of(layer)
    for x_D, found_D in zip(x_TD, layer(x_TD, everybody()), strict=True):
        probability_E = torch.softmax(weights["gate.weight"] @ x_D, 0)
        best = sorted(range(E), key=lambda e: -probability_E[e].item())[:K]
        total = probability_E[best].sum() if renormalise else torch.tensor(1.0)
        expected_D = torch.zeros(D)
        for expert in best:
            share = probability_E[expert] / total
            expected_D += share * network(x_D, weights, f"experts.{expert}")
        torch.testing.assert_close(found_D, expected_D, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shared_size", [0, I, 2 * I], ids=["none shared", "one", "two"])
def test_grouped_experts_are_the_sum_written_out(
    x_TD: Tensor, biased: bool, shared_size: int
) -> None:
    gate = GroupedGate(
        D, E, K, torch.float32, biased=biased, num_groups=4, num_chosen_groups=2, scaling=2.5
    )
    shared = SwiGLU(D, shared_size, torch.float32) if shared_size else None
    layer = SparseMLP(gate, Experts(E, D, I, torch.float32), shared)
    fill(layer)
    weights = weights_of(layer)
    for x_D, found_D in zip(x_TD, layer(x_TD, everybody()), strict=True):
        score_E = torch.sigmoid(weights["gate.weight"] @ x_D)
        rank = (score_E + weights["gate.expert_bias"] if biased else score_E).tolist()
        groups = [rank[start : start + 3] for start in range(0, E, 3)]
        order = sorted(range(4), key=lambda g: -sum(sorted(groups[g])[-2:]))[:2]
        eligible = [expert for expert in range(E) if expert // 3 in order]
        best = sorted(eligible, key=lambda e: -rank[e])[:K]
        expected_D = network(x_D, weights, "shared_experts") if shared else torch.zeros(D)
        for expert in best:
            share = 2.5 * score_E[expert] / score_E[best].sum()
            expected_D = expected_D + share * network(x_D, weights, f"experts.{expert}")
        torch.testing.assert_close(found_D, expected_D, rtol=1e-5, atol=1e-6)


def test_padding_goes_through_shared_experts_alone(x_TD: Tensor) -> None:
    gate = GroupedGate(
        D, E, K, torch.float32, biased=True, num_groups=4, num_chosen_groups=2, scaling=2.5
    )
    shared = SwiGLU(D, I, torch.float32)
    layer = SparseMLP(gate, Experts(E, D, I, torch.float32), shared)
    fill(layer)
    count_1 = torch.tensor([4], dtype=torch.int32)
    found_TD, whole_TD = layer(x_TD, count_1), layer(x_TD, everybody())
    torch.testing.assert_close(found_TD[:4], whole_TD[:4])
    torch.testing.assert_close(found_TD[4:], shared(x_TD, count_1)[4:])
    assert not torch.allclose(found_TD[4:], whole_TD[4:])
