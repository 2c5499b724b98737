"""How many engines a model needs, from their effective batch occupancies.

Only the standard library is imported: Ray Serve sends this module to its controller by value.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

OCCUPANCY = "occupancy"
# Fewer engines must fit the work with this much to spare, lest one goes and comes back.
DOWNSCALE_MARGIN = 0.9
# Sums of floats: 3 engines at a target of 0.8 are asked for by 2.4000000000000004.
TOLERANCE = 1e-9


def replicas_for(
    occupancies: Collection[float],
    num_silent: int,
    target: float,
    bounds: tuple[int, int],
    current: int,
) -> int:
    """Engines among which the work is spread at the target, at most.

    Args:
        occupancies: of the engines that have reported one.
        num_silent: engines that run and have not reported lately: while there are any, whose work
            nobody knows, no engine is taken away.
        target: occupancy that an engine shall have.
        bounds: least and greatest number of engines.
        current: engines there are or will be, by the decisions so far.
    """
    least, greatest = bounds
    work = sum(occupancies)
    up = math.ceil(work / target - TOLERANCE)
    down = math.ceil(work / (target * DOWNSCALE_MARGIN) - TOLERANCE)
    wanted = max(up, current if num_silent else min(down, current))
    return max(least, min(wanted, greatest))


class OccupancyPolicy:
    """``replicas_for`` as a policy of Ray Serve, which adds the delays."""

    def __init__(self, target_occupancy: float) -> None:
        self._target = target_occupancy

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Engines, and the state to keep, of which there is none.

        Args:
            context: ``ray.serve.config.AutoscalingContext``.
        """
        # Serve's average over no samples is 0, as if an engine that says nothing were idle.
        samples = (context.raw_metrics or {}).get(OCCUPANCY, {})
        averages = (context.aggregated_metrics or {}).get(OCCUPANCY, {})
        occupancies = [average for replica, average in averages.items() if samples.get(replica)]
        num_silent = max(0, context.current_num_replicas - len(occupancies))
        bounds = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
        wanted = replicas_for(
            occupancies, num_silent, self._target, bounds, context.target_num_replicas
        )
        return wanted, {}
