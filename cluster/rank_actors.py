"""Ranks as Ray actors, in the placement group of the replica that owns them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util import get_current_placement_group, get_node_ip_address
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from focus_ray.config import EngineConfig
from focus_ray.engine.rank_process import RankSetup, run_rank
from focus_ray.engine.ranks import RankGroup


class RankActor:
    """The process of one rank. It belongs to the replica: if that goes, Ray ends it too."""

    def run(self, setup: RankSetup) -> None:
        """Until rank 0 says that there are no more steps."""
        run_rank(replace(setup, own_host=_own_host()))


class RayRanks(RankGroup):
    """Rank r sits in bundle r of the placement group that this process, rank 0, sits in.

    Raises:
        ValueError: there is no such group, or it has too few bundles.
    """

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config, _own_host())
        group, size = get_current_placement_group(), config.tensor_parallel_size
        if group is None or group.bundle_count < size:
            found = "none" if group is None else f"one of {group.bundle_count} bundles"
            raise ValueError(
                f"tensor_parallel_size {size} needs a placement group with a bundle for each rank, "
                f"and this process is in {found}; deploy with focus-ray serve, or set "
                "placement_group_bundles"
            )
        self._group: PlacementGroup = group
        self._actors: dict[int, Any] = {}
        self._ends: dict[int, Any] = {}

    def _start(self, setup: RankSetup) -> None:
        bundle = self._group.bundle_specs[setup.rank]
        actor = ray.remote(RankActor).options(
            num_cpus=bundle.get("CPU", 0),
            num_gpus=bundle.get("GPU", 0),
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=setup.rank
            ),
        )
        self._actors[setup.rank] = actor.remote()
        self._ends[setup.rank] = self._actors[setup.rank].run.remote(setup)

    def _gpu_of(self, rank: int) -> int:
        return 0  # Ray shows each actor its own GPU alone

    def _end_of(self, rank: int) -> str | None:
        ended, _ = ray.wait([self._ends[rank]], timeout=0)
        if not ended:
            return None
        try:
            ray.get(ended[0])
        except RayError as error:
            return f"ended with {type(error).__name__}: {error}"
        return "ended"

    def _kill(self, rank: int) -> None:
        if rank in self._actors:
            ray.kill(self._actors[rank])


def _own_host() -> str:
    address: str = get_node_ip_address()  # type: ignore[no-untyped-call]
    return address
