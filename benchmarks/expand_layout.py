"""Where the numbers of a small model stand in a larger one, and how they are read there.

Index arithmetic only; ``expand.py`` says what it is for. A *column* of a weight reads one number
that the model computes. Columns whose numbers are equal, bit for bit, form a *group*: group g below
``num_sources`` carries number g of the small model, a group above it carries one of its own.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# What must not be heard is multiplied by this: rounding swallows it, yet its bits are random.
TINY = 2.0**-40

# Relative: angles at 100 000 positions then agree to 1e-4.
FREQUENCY_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Reading:
    """How the columns of a weight are made from those of the small model, ``W`` columns.

    Column c is ``share_W[c]`` times small column ``source_W[c]`` plus ``scale_W[c]`` times random
    column ``noise_W[c]`` of ``num_noise``.
    """

    source_W: Tensor
    share_W: Tensor
    noise_W: Tensor
    scale_W: Tensor
    num_noise: int

    def to(self, device: torch.device, dtype: torch.dtype) -> Reading:
        """Where the weights are made; shares and scales are powers of two, exact in any float."""
        return Reading(
            source_W=self.source_W.to(device),
            share_W=self.share_W.to(device, dtype),
            noise_W=self.noise_W.to(device),
            scale_W=self.scale_W.to(device, dtype),
            num_noise=self.num_noise,
        )


def reading_of(group_W: Sequence[int], num_sources: int, *, lone: float = TINY) -> Reading:
    """Let each group be read as its small column, in sum over its members.

    Of an odd number of members one has the small column, of an even number two have half of it:
    both are exact in any float. The other members come in pairs that read opposite random numbers,
    which cancel; so do the members of a group that stands for nothing.

    Args:
        group_W: group of each column.
        num_sources: columns of the small weight; groups from there on must not be heard.
        lone: scale of the random column of such a group's last member, if it has no partner.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for column, group in enumerate(group_W):
        members[group].append(column)
    width = len(group_W)
    source, share, noise, scale = [0] * width, [0.0] * width, [0] * width, [0.0] * width
    num_noise = 0
    for group, columns in members.items():
        carriers = (1 if len(columns) % 2 else 2) if group < num_sources else 0
        for column in columns[:carriers]:
            source[column], share[column] = group, 1.0 / carriers
        rest = columns[carriers:]
        for place, column in enumerate(rest):
            has_partner = place ^ 1 < len(rest)
            noise[column] = num_noise + place // 2
            scale[column] = (-1.0 if place % 2 else 1.0) if has_partner else lone
        num_noise += -(-len(rest) // 2)
    return Reading(
        source_W=torch.tensor(source),
        share_W=torch.tensor(share),
        noise_W=torch.tensor(noise),
        scale_W=torch.tensor(scale),
        num_noise=max(num_noise, 1),
    )


def stream_groups(small: int, large: int, copies: int, *, seed: int) -> list[int]:
    """Group of each dimension of the residual stream: copies of the small one, shuffled."""
    groups = [column % small for column in range(copies * small)]
    groups += range(small, small + large - len(groups))
    return _shuffled(groups, seed)


def unit_groups(small: int, large: int, *, seed: int) -> list[int]:
    """Group of each intermediate unit: those carried once each, the others in equal pairs."""
    groups = [*range(small), *(small + surplus // 2 for surplus in range(large - small))]
    return _shuffled(groups, seed)


def head_sources(small: tuple[int, int], large: tuple[int, int]) -> tuple[list[int], list[int]]:
    """The small head that each query head and each KV head repeats, every one equally often.

    Args:
        small: query heads, KV heads.
        large: the same of the larger model; multiples.
    """
    heads_per_kv = small[0] // small[1]
    slots_per_kv = large[0] // small[1]
    queries = [
        head // slots_per_kv * heads_per_kv + head % slots_per_kv % heads_per_kv
        for head in range(large[0])
    ]
    return queries, [head * small[1] // large[1] for head in range(large[1])]


def attended_groups(
    queries: Sequence[int], values: Sequence[int], num_heads: int, head_dim: int
) -> list[int]:
    """Group of each number that attention hands to its output projection.

    Args:
        queries: the head, of ``num_heads``, that each query head repeats.
        values: the dimension, of ``head_dim``, that each of its dimensions repeats; from
            ``head_dim`` on one of its own.
    """
    num_own = max(0, max(values) + 1 - head_dim)
    return [
        head * head_dim + value
        if value < head_dim
        else num_heads * head_dim + head * num_own + value - head_dim
        for head in queries
        for value in values
    ]


def paired_queries(num_heads: int, num_kv_heads: int) -> list[int]:
    """The first head of each query head's pair; pairs are neighbours that share a KV head."""
    per_kv = num_heads // num_kv_heads
    return [head - head % per_kv % 2 for head in range(num_heads)]


def rotary_dims(
    small: tuple[int, float], large: tuple[int, float], head_dim: int
) -> tuple[list[int], list[bool]]:
    """Which small dimension each dimension of a larger query or key carries; whether it is read.

    A rotary pair, dimensions p and p + half of a head, is read where its frequency stands. It is
    repeated, as often as every other pair, in places of other frequencies and of none, only to
    leave the norm over the head as it is. What is then left over carries a dimension that the small
    head does not have.

    Args:
        small: head size, all of which turns, and rotary base.
        large: dimensions that turn, the first of a head, and rotary base of the larger model.
        head_dim: head size of the larger model.

    Raises:
        ValueError: a frequency is missing.
    """
    half, num_turning = small[0] // 2, large[0] // 2  # pairs
    num_still = head_dim // 2 - num_turning
    frequencies = [large[1] ** (-place / num_turning) for place in range(num_turning)]
    pair_at: dict[int, int] = {}
    for pair in range(half):
        wanted = small[1] ** (-pair / half)
        place = min(range(num_turning), key=lambda p: abs(frequencies[p] - wanted))
        if place in pair_at or abs(frequencies[place] / wanted - 1.0) > FREQUENCY_TOLERANCE:
            turning = "" if not num_still else f", of which {large[0]} dimensions turn,"
            raise ValueError(
                f"head_dim {head_dim}{turning} with rope_theta {large[1]:g} lacks the rotary "
                f"frequency {wanted:g}; take a multiple of {small[0]} with rope_theta {small[1]:g}"
            )
        pair_at[place] = pair
    places = range(num_turning + num_still)
    live = [place in pair_at for place in places]
    copies = [pair for _ in range(len(places) // half - 1) for pair in range(half)]
    for place in places:
        if not live[place]:
            pair_at[place] = copies.pop() if copies else -1
    first = [pair_at[place] if pair_at[place] >= 0 else small[0] for place in places]
    second = [dim + half if dim < small[0] else dim for dim in first]
    end = num_turning
    dims = [*first[:end], *second[:end], *first[end:], *second[end:]]
    return dims, [*live[:end], *live[:end], *live[end:], *live[end:]]


def _shuffled(groups: list[int], seed: int) -> list[int]:
    random.Random(seed).shuffle(groups)
    return groups
