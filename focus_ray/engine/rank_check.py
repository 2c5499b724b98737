"""For debugging: whether all ranks hold the same."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from focus_ray.models.parallel import Shards

# Odd, so that every bit of every number changes the sum.
_MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)


class RanksDisagree(RuntimeError):
    """What ranks hold has come apart; collective calls would no longer fit each other."""


class RankCheck:
    """Compares fingerprints of tensors among ranks.

    Args:
        shards: those that compare; all call it in the same steps.
        every: in every so many steps.
    """

    def __init__(self, shards: Shards, every: int) -> None:
        self._shards = shards
        self._every = every

    def compare(self, step: int, held: Mapping[str, Tensor]) -> None:
        """Compare, if it is time; waits for the device.

        Args:
            step: its number.
            held: what is compared, by name; integers or bools.

        Raises:
            RanksDisagree: says in which step, what differs, and on which ranks.
        """
        if step % self._every:
            return
        own_K = torch.stack([_fingerprint(tensor) for tensor in held.values()])
        all_RK = self._shards.gather(own_K.to(self._shards.device)).cpu()
        differs_RK = all_RK != all_RK[0]
        if differs_RK.any():
            parts = [
                f"{name} on ranks {differs_R.nonzero()[:, 0].tolist()}"
                for name, differs_R in zip(held, differs_RK.unbind(1), strict=True)
                if differs_R.any()
            ]
            raise RanksDisagree(f"step {step}: not as on rank 0 are {'; '.join(parts)}")


def _fingerprint(tensor: Tensor) -> Tensor:
    """One int64: a sum of products with odd numbers that depend on the place, modulo 2**64."""
    values_N = tensor.reshape(-1).long()
    place_N = torch.arange(1, len(values_N) + 1, device=tensor.device)
    return ((values_N + place_N) * (place_N * _MULTIPLIER | 1)).sum()
