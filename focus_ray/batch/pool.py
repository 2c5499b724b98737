"""The pool of engines that a job gets from a Ray cluster."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import ray
from ray.util import placement_group, remove_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from focus_ray.cluster.placement import RankPlace, cores_per_rank, place_rank, placement
from focus_ray.config import EngineConfig

# So long nothing has come, and the cluster is too small by now: an engine was lost with its node.
LOST_AFTER_S = 45.0
LOOK_EVERY_S = 5.0


class EnginePool:
    """As many engines as asked for, or as the cluster has GPUs for.

    Args:
        num_replicas: None for all GPUs; without GPUs, one.
        cluster: Ray's resources by name.
        job: part of the actors' names.
    """

    def __init__(
        self,
        config: EngineConfig,
        num_replicas: int | None,
        cluster: Mapping[str, float],
        job: str,
    ) -> None:
        ranks = config.tensor_parallel_size
        gpus = int(cluster.get("GPU", 0))
        if num_replicas is None:
            on_gpus = config.device != "cpu" and gpus > 0
            num_replicas = max(1, gpus // ranks) if on_gpus else 1
        self.num_replicas = num_replicas
        cores = cores_per_rank(num_replicas * ranks, cluster)
        self.rank: RankPlace = place_rank(config.device, cores, cluster)
        self.config = config.model_copy(update={"device": self.rank.device})
        self._job = job
        self._names: list[str] = []
        self._groups: list[PlacementGroup] = []
        self._last_result_s = time.monotonic()
        self._ended = threading.Event()

    def missing(self, cluster: Mapping[str, float]) -> str | None:
        """What the cluster lacks for all of the pool; None if it lacks nothing."""
        ranks = self.num_replicas * self.config.tensor_parallel_size
        for name, each in (("GPU", self.rank.num_gpus), ("CPU", self.rank.num_cpus)):
            if ranks * each > cluster.get(name, 0.0):
                return f"{ranks * each:g} {name}s for {ranks} ranks, of {cluster.get(name, 0.0):g}"
        return None

    def __enter__(self) -> Self:
        self._last_result_s = time.monotonic()
        threading.Thread(target=self._watch, name="pool", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._kill()
        for group in self._groups:
            remove_placement_group(group)

    def actor_options(self) -> dict[str, Any]:
        """Ray's options of the next actor, which may have a placement group of its own.

        GPUs stand here, for where Ray Data knows of them it wants blocks to be of one size.
        """
        name = f"{self._job}-{len(self._names)}"
        self._names.append(name)
        group_options = placement(self.config.tensor_parallel_size, self.rank.resources)
        options: dict[str, Any] = {"name": name, "num_gpus": self.rank.num_gpus}
        if not group_options:
            return options
        group = placement_group(
            group_options["placement_group_bundles"],
            strategy=group_options["placement_group_strategy"],
        )
        self._groups.append(group)
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
        return {**options, "scheduling_strategy": strategy}

    def note_result(self) -> None:
        """Something came."""
        self._last_result_s = time.monotonic()

    def _watch(self) -> None:
        """End engines that Ray would wait for, though there is no place for them any more.

        What they had been given is run again then, by a pool of the size that there is.
        """
        while not self._ended.wait(LOOK_EVERY_S):
            waited_s = time.monotonic() - self._last_result_s
            if waited_s > LOST_AFTER_S and self.missing(ray.cluster_resources()):  # type: ignore[no-untyped-call]
                self._kill()

    def _kill(self) -> None:
        for name in self._names:
            try:
                ray.kill(ray.get_actor(name))
            except ValueError:  # it has ended by itself
                continue
