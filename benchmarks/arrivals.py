"""When the requests of an open loop come: gaps of a gamma distribution, drawn before the run."""

from __future__ import annotations

import math
import random
from itertools import accumulate


def arrival_times(
    number: int, requests_per_s: float, burstiness: float, seed: int
) -> tuple[float, ...]:
    """Seconds from the start of the run; the first request comes at 0.

    Args:
        requests_per_s: mean rate; infinite: all come at once.
        burstiness: shape of the gamma distribution. Gaps have a coefficient of variation of
            ``1 / sqrt(burstiness)``: 1 is a Poisson process, less comes in bursts, more is more
            even, infinite is a metronome.

    Raises:
        ValueError: the rate or the burstiness is not positive.
    """
    if not requests_per_s > 0:
        raise ValueError(f"request rate must be above 0, got {requests_per_s}; inf: all at once")
    if not burstiness > 0:
        raise ValueError(f"burstiness must be above 0, got {burstiness}; 1 is a Poisson process")
    if math.isinf(requests_per_s):
        return (0.0,) * number
    mean_s = 1.0 / requests_per_s
    rng = random.Random(f"{seed}/arrivals")
    gaps = (
        mean_s if math.isinf(burstiness) else rng.gammavariate(burstiness, mean_s / burstiness)
        for _ in range(number - 1)
    )
    return tuple(accumulate(gaps, initial=0.0))
