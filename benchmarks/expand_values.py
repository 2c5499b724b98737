"""Numbers for the weights of a larger model: the small model's, random ones, and how they mix.

Shape letters of the larger model: D hidden size; N rows and W columns of any weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from focus_ray.benchmarks.expand_layout import TINY, Reading, reading_of, stream_groups
from focus_ray.models.decoder import DecoderConfig


def num_copies(small: DecoderConfig, large: DecoderConfig) -> int:
    """How often the larger stream holds the small one; surplus tokens need a dimension besides.

    Raises:
        ValueError: not once.
    """
    num_spare = int(large.vocab_size > small.vocab_size)
    copies = (large.hidden_size - num_spare) // small.hidden_size
    if copies < 1:
        raise ValueError(
            f"hidden_size {large.hidden_size} must be above the small model's {small.hidden_size}, "
            f"because vocab_size {large.vocab_size} is above its {small.vocab_size}"
        )
    return copies


def stream_share(small: DecoderConfig, large: DecoderConfig) -> float:
    """Mean square of the larger stream in units of the small one's."""
    return num_copies(small, large) * small.hidden_size / large.hidden_size


class Values:
    """Makes rows and columns of weights around the copies of the small stream in the larger one.

    Args:
        small: shape of the small model.
        large: shape of the larger one.
        device: where the larger weights are.
        dtype: theirs.
        seed: of everything random.

    Raises:
        ValueError: the larger stream cannot hold the small one.
    """

    def __init__(
        self,
        small: DecoderConfig,
        large: DecoderConfig,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
    ) -> None:
        self.device, self.dtype, self.seed = device, dtype, seed
        self.generator = torch.Generator(device).manual_seed(seed)
        self.num_copies = num_copies(small, large)
        self.small_size = small.hidden_size
        self.stream = stream_groups(
            small.hidden_size, large.hidden_size, self.num_copies, seed=seed
        )
        self.stream_D = self.tensor(self.stream)
        self.read_stream = self.reading(self.stream, small.hidden_size, lone=1.0)
        self._norm_scale = math.sqrt(stream_share(small, large))

    def read(self, small_NW: Tensor, reading: Reading, *, like: Tensor | None = None) -> Tensor:
        """Columns of the larger model for the small model's rows; random, and the same in sum.

        Args:
            like: says how large random ones are; None: ``small_NW``.
        """
        std = size_of(small_NW if like is None else like, len(reading.source_W))
        noise = self.random(len(small_NW), reading.num_noise, std=std)
        # One of the two is zero in every column, so that nothing is rounded.
        return small_NW[:, reading.source_W] * reading.share_W + (
            noise[:, reading.noise_W] * reading.scale_W
        )

    def rows(
        self, weight_NW: Tensor, row_N: Tensor, own: float, *, like: Tensor | None = None
    ) -> Tensor:
        """Rows ``row_N`` of a weight; beyond its end follow random ones, ``own`` times as large.

        Args:
            like: says how large the weight is; None: itself.
        """
        num_own = max(0, int(row_N.max()) + 1 - len(weight_NW))
        std = own * size_of(weight_NW if like is None else like, weight_NW.shape[1])
        return torch.cat([weight_NW, self.random(num_own, weight_NW.shape[1], std=std)])[row_N]

    def written(self, weight_NW: Tensor) -> Tensor:
        """Rows for what is added to the stream: each copy the same, next to nothing elsewhere."""
        return self.rows(weight_NW, self.stream_D, TINY)

    def fill_stream_norm(self, large_D: Tensor, small: Tensor) -> None:
        """The norm divides by less where the stream has dimensions left over."""
        self.fill_any_norm(large_D)
        carried_D = self.stream_D < self.small_size
        scaled = small.float()[self.stream_D.clamp(max=self.small_size - 1)] * self._norm_scale
        large_D.copy_(torch.where(carried_D, scaled, large_D.float()))

    def fill_any_norm(self, weight: Tensor) -> None:
        weight.uniform_(0.5, 1.5, generator=self.generator)

    def randomise(self, weight_NW: Tensor, *, like: Tensor) -> None:
        """Normal values of such a size that what is computed is as large as with ``like``."""
        weight_NW.normal_(0.0, size_of(like, weight_NW.shape[1]), generator=self.generator)

    def random(self, rows: int, columns: int, *, std: float) -> Tensor:
        values = torch.empty(rows, columns, device=self.device, dtype=self.dtype)
        return values.normal_(0.0, std, generator=self.generator)

    def own(self, weight: Tensor) -> Tensor:
        """A weight of the small model, where and as the larger ones are."""
        return weight.to(self.device, self.dtype)

    def reading(self, groups: Sequence[int], num_sources: int, lone: float = TINY) -> Reading:
        return reading_of(groups, num_sources, lone=lone).to(self.device, self.dtype)

    def tensor(self, values: Sequence[int] | Sequence[bool]) -> Tensor:
        return torch.tensor(values, device=self.device)


def size_of(weight_NW: Tensor, width: int | None = None) -> float:
    """Root mean square of a weight, for ``width`` columns if given: what is computed stays."""
    own = float(weight_NW.float().square().mean().sqrt())
    return own if width is None else own * math.sqrt(weight_NW.shape[1] / width)
