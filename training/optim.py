"""Muon for the matrices of the layers, AdamW for embedding, head and norms.

Muon: Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024. It is
momentum, then the nearest orthogonal matrix by five steps of a quintic Newton-Schulz iteration
whose coefficients are the published ones. Matrices of one shape are stacked.
"""

from __future__ import annotations

from typing import Any

import torch
from model import Sdar
from torch import Tensor

MUON_LR = 0.02
EMBEDDING_LR, HEAD_LR, NORM_LR = 0.02, 0.005, 0.004
WEIGHT_DECAY = 0.05
MOMENTUM_FIRST, MOMENTUM_LAST, MOMENTUM_STEPS = 0.85, 0.95, 300
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor) -> Tensor:
    """``[n, a, b]`` to nearly orthogonal matrices of the same row and column spaces, bfloat16."""
    linear, cubic, quintic = _NEWTON_SCHULZ
    x = matrices.to(torch.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(
            x, torch.baddbmm(gram, gram, gram, beta=cubic, alpha=quintic), x, beta=linear
        )
    return x.mT if tall else x


class Optimizer:
    """Both optimizers under one learning-rate multiplier."""

    def __init__(self, model: Sdar) -> None:
        self._matrices: dict[tuple[int, ...], list[Tensor]] = {}
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed_tokens" not in name and "lm_head" not in name:
                self._matrices.setdefault(tuple(parameter.shape), []).append(parameter)
        self._momenta = {
            shape: torch.zeros(len(group), *shape, device=group[0].device)
            for shape, group in self._matrices.items()
        }
        norms = [parameter for parameter in model.parameters() if parameter.ndim == 1]
        self._others = [model.model.embed_tokens.weight, model.lm_head.weight, *norms]
        self._adam = torch.optim.AdamW(
            [
                {"params": [model.model.embed_tokens.weight], "lr": EMBEDDING_LR},
                {"params": [model.lm_head.weight], "lr": HEAD_LR},
                {"params": norms, "lr": NORM_LR},
            ],
            betas=(0.9, 0.95),
            eps=1e-10,
            weight_decay=0.0,
            fused=norms[0].is_cuda,
        )
        self._base_rates = [group["lr"] for group in self._adam.param_groups]

    def step(self, multiplier: float, num_steps: int) -> None:
        """Apply the gradients and clear them; ``num_steps`` were made before."""
        for group, rate in zip(self._adam.param_groups, self._base_rates, strict=True):
            group["lr"] = rate * multiplier
        torch.nn.utils.clip_grad_norm_(self._others, 1.0)
        self._adam.step()
        warm = min(1.0, num_steps / MOMENTUM_STEPS)
        self._muon_step(
            MUON_LR * multiplier, MOMENTUM_FIRST + (MOMENTUM_LAST - MOMENTUM_FIRST) * warm
        )
        for parameter in (*self._others, *(p for group in self._matrices.values() for p in group)):
            parameter.grad = None

    @torch.no_grad()
    def _muon_step(self, rate: float, momentum: float) -> None:
        for shape, group in self._matrices.items():
            gradients = torch.stack(
                [parameter.grad for parameter in group if parameter.grad is not None]
            )
            average = self._momenta[shape]
            average.lerp_(gradients, 1 - momentum)
            update = orthogonalise(gradients.lerp(average, momentum)).float()
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            torch._foreach_mul_(group, 1 - rate * WEIGHT_DECAY)
            torch._foreach_add_(group, list(update.unbind(0)), alpha=-rate * scale)

    def state_dict(self) -> dict[str, Any]:
        return {"adam": self._adam.state_dict(), "momenta": list(self._momenta.values())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._adam.load_state_dict(state["adam"])
        for own, saved in zip(self._momenta.values(), state["momenta"], strict=True):
            own.copy_(saved)
