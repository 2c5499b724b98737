"""How an engine starts where Ray may have to find places for its ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from focus_ray.config import EngineConfig

if TYPE_CHECKING:
    from focus_ray.engine.async_engine import AsyncEngine


def start_engine(config: EngineConfig) -> AsyncEngine:
    """The real engine; blocks until it is ready.

    Imported here: torch is loaded where the engine runs and nowhere else.
    """
    from focus_ray.engine.async_engine import AsyncEngine

    if config.tensor_parallel_size == 1:
        return AsyncEngine.start(config)
    from focus_ray.cluster.rank_actors import RayRanks

    return AsyncEngine.start(config, RayRanks(config))
