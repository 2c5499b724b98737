"""Whether a Triton kernel may run on given tensors."""

from __future__ import annotations

import os

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton reads the variable when a kernel is defined, so it must be set before the first import."""


def can_launch(*tensors: Tensor) -> bool:
    """True on CUDA tensors, and on CPU tensors where Triton interprets its kernels.

    The interpreter computes bfloat16 as if its bits were integers (Triton 3.7 to 3.9), so bfloat16
    on a CPU is always left to the definitions.
    """
    if all(tensor.is_cuda for tensor in tensors):
        return True
    return INTERPRETED and all(
        tensor.device.type == "cpu" and tensor.dtype != torch.bfloat16 for tensor in tensors
    )
