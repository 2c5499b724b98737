"""Root-mean-square normalisation over the last dimension."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide by the root mean square, multiply by ``weight``: ``x / sqrt(mean(x^2) + eps) * w``.

    All arithmetic, the multiplication by the weight included, is float32 and rounds once at the
    end, as the fused kernel of SDAR's authors does (their Python fallback rounds before the
    multiplication; equal in float32, a last bit apart in bfloat16).

    Args:
        x: ``[..., D]``, any float dtype.
        weight: ``[D]``, any float dtype.
        eps: added to the mean square.

    Returns:
        Shape, dtype and device of ``x``.

    Raises:
        ValueError: ``weight`` is not as long as a row of ``x``.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be [{x.shape[-1]}] for this x, got {tuple(weight.shape)}")
    return rms_norm_reference(x, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition."""
    wide = x.to(torch.float32)
    inverse_rms = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * inverse_rms * weight.to(torch.float32)).to(x.dtype)
