"""A product whose inner dimension was shared, before its shares are added up.

S shares, T tokens, O output size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PartialSums:
    """What stands for a ``[T, O]`` tensor until an operation that reads it adds its shares up.

    Args:
        sums_STO: ``[S, T, O]`` float32, contiguous.
        dtype: to which the sum over the shares is rounded.
    """

    sums_STO: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """``[T, O]``."""
        return self.sums_STO.shape[1:]

    def total(self) -> Tensor:
        """The definition: ``[T, O]``, the shares added in their order and rounded once."""
        total_TO = torch.zeros_like(self.sums_STO[0])
        for sums_TO in self.sums_STO:
            total_TO += sums_TO
        return total_TO.to(self.dtype)


Summand = Tensor | PartialSums
"""What ``add_rms_norm`` adds."""
