"""What the parts of a step cost, and from how many tokens on larger steps are hardly faster.

Numbers only: no tensors, no clock.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, inf

CostCurve = Sequence[tuple[int, float]]
"""Measured points ``(tokens, seconds)``, ascending in tokens."""

SATURATED_SHARE = 0.9
"""Of the best tokens per second: from here on a larger step hardly computes faster."""


@dataclass(frozen=True)
class StepCosts:
    """Seconds of the parts of a step, measured at some token counts.

    Args:
        evicting_head: to the end of the choice of retained tokens in layer 1, by processed tokens.
        plain_head: the same part of the model when nothing is chosen.
        tail: everything after it up to the decoded tokens, by tokens that are left.

    Raises:
        ValueError: a curve has no point, or its points are not positive and ascending in tokens.
    """

    evicting_head: CostCurve
    plain_head: CostCurve
    tail: CostCurve

    def __post_init__(self) -> None:
        for name, curve in vars(self).items():
            tokens = [point[0] for point in curve]
            ascending = all(a < b for a, b in pairwise(tokens))
            timed = all(0.0 < seconds < inf for _, seconds in curve)
            if not curve or not ascending or tokens[0] < 1 or not timed:
                raise ValueError(
                    f"{name} must be points (tokens, seconds), both positive and tokens ascending, "
                    f"got {list(curve)}"
                )

    def evicting(self, num_processed: float, num_retained: float) -> float:
        """Seconds of a step that goes on with ``num_retained`` of its tokens."""
        return interpolate(self.evicting_head, num_processed) + interpolate(self.tail, num_retained)

    def plain(self, num_processed: float) -> float:
        """Seconds of a step that goes on with all its tokens."""
        return interpolate(self.plain_head, num_processed) + interpolate(self.tail, num_processed)


def interpolate(curve: CostCurve, num_tokens: float) -> float:
    """Seconds at a token count: linear between points, flat before the first.

    Behind the last one in proportion to tokens, as where the device has no more to give.
    """
    if num_tokens <= curve[0][0]:
        return curve[0][1]
    index = bisect_right(curve, num_tokens, key=lambda point: point[0])
    (left, left_s) = curve[index - 1]
    if index == len(curve):
        return left_s * num_tokens / left
    (right, right_s) = curve[index]
    return left_s + (right_s - left_s) * (num_tokens - left) / (right - left)


def saturation_tokens(costs: StepCosts) -> int:
    """Fewest tokens at which a step without eviction has 90 % of its best tokens per second."""
    counts = sorted({tokens for curve in (costs.plain_head, costs.tail) for tokens, _ in curve})
    best = max(count / costs.plain(count) for count in counts)
    wanted = SATURATED_SHARE * best
    end = next(count for count in counts if count / costs.plain(count) >= wanted)
    start = max((count for count in counts if count < end), default=0)
    # Between points seconds are linear: tokens = wanted * (offset + slope * tokens).
    slope = (costs.plain(end) - costs.plain(start)) / (end - start)
    offset = costs.plain(end) - slope * end
    return min(end, max(start + 1, ceil(wanted * offset / (1.0 - wanted * slope))))
