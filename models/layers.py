"""Parts that several architectures share. Weights start uninitialised; loading fills them.

T tokens, D hidden size, I intermediate size, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from focus_ray.kernels.rms_norm import add_rms_norm, rms_norm
from focus_ray.kernels.rotary import rotary_table
from focus_ray.kernels.swiglu import swiglu


class Linear(nn.Module):
    """``x @ weight.T``, no bias; ``weight`` is ``[out, in]``."""

    def __init__(self, in_size: int, out_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_size, in_size, dtype=dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Embedding(nn.Module):
    """Rows of ``weight``, ``[V, D]``."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(vocab_size, hidden_size, dtype=dtype), requires_grad=False
        )

    def forward(self, token_ids_T: Tensor) -> Tensor:
        return F.embedding(token_ids_T, self.weight)


class RMSNorm(nn.Module):
    """Root-mean-square norm of the stream of hidden states; ``weight`` is as long as a state."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False)
        self.eps = eps

    def forward(self, x_TD: Tensor, added_TD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Add what is to be added to the stream first; the norm, and the stream."""
        if added_TD is None:
            return rms_norm(x_TD, self.weight, self.eps), x_TD
        return add_rms_norm(x_TD, added_TD, self.weight, self.eps)


class SwiGLU(nn.Module):
    """The feed-forward part: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, hidden_size: int, intermediate_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, dtype)
        self.up_proj = Linear(hidden_size, intermediate_size, dtype)
        self.down_proj = Linear(intermediate_size, hidden_size, dtype)

    def forward(self, x_TD: Tensor) -> Tensor:
        gated: Tensor = self.down_proj(swiglu(self.gate_proj(x_TD), self.up_proj(x_TD)))
        return gated


class Rotary(nn.Module):
    """Cosines and sines of every position, computed once; no weight of the checkpoint."""

    table_P2r2: Tensor

    def __init__(
        self, num_positions: int, rotary_dim: int, theta: float, dtype: torch.dtype
    ) -> None:
        super().__init__()
        table = rotary_table(
            num_positions, rotary_dim, theta, dtype=dtype, device=torch.get_default_device()
        )
        self.register_buffer("table_P2r2", table, persistent=False)
