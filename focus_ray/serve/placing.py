"""Where engines run: devices decided, cores and GPUs reserved. Plain numbers; no Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from focus_ray.cluster.placement import RankPlace, cores_per_rank, place_rank
from focus_ray.config import EngineConfig
from focus_ray.serve.model_args import ModelArgs


@dataclass(frozen=True)
class Placed:
    """A model's engines, with what Ray reserves for each of their ranks."""

    model: ModelArgs
    config: EngineConfig
    rank: RankPlace

    @property
    def resources(self) -> dict[str, float]:
        """As Ray's options of an actor."""
        return self.rank.resources

    @property
    def num_ranks(self) -> int:
        """Ranks that run from the start."""
        return self.model.min_engines * self.config.tensor_parallel_size


def place(models: Sequence[ModelArgs], cluster: Mapping[str, float]) -> tuple[Placed, ...]:
    """Decide devices and resources.

    Ranks on CPUs share the cores evenly.

    Args:
        cluster: Ray's resources by name.
    """
    num_ranks = sum(model.max_engines * model.engine.tensor_parallel_size for model in models)
    cores = cores_per_rank(num_ranks, cluster)
    return tuple(_place(model, cores, cluster) for model in models)


def _place(model: ModelArgs, cores: float, cluster: Mapping[str, float]) -> Placed:
    rank = place_rank(model.engine.device, cores, cluster, model.num_cpus, model.num_gpus)
    config = model.engine.model_copy(update={"device": rank.device})
    return Placed(model, config, rank)
