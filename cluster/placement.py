"""Where Ray puts the ranks of an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RankPlace:
    """What Ray reserves for each rank of an engine, and the device that the engine runs on."""

    device: str
    num_cpus: float
    num_gpus: float

    @property
    def resources(self) -> dict[str, float]:
        """As Ray's options of an actor."""
        return {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus}


def cores_per_rank(num_ranks: int, cluster: Mapping[str, float]) -> float:
    """An even share of all cores, for ranks that run on them.

    Ray gives a process as many OpenMP threads as it reserves cores, and one if it reserves none.
    """
    return float(max(1, int(cluster.get("CPU", 1.0)) // num_ranks))


def place_rank(
    device: str,
    cores: float,
    cluster: Mapping[str, float],
    num_cpus: float | None = None,
    num_gpus: float | None = None,
) -> RankPlace:
    """Decide what was left open.

    Args:
        device: "auto" takes a GPU if there is any.
        cores: for a rank that runs on them.
        cluster: Ray's resources by name.
        num_cpus, num_gpus: what is known already.
    """
    if device == "auto":
        wants_gpu = bool(cluster.get("GPU")) if num_gpus is None else num_gpus > 0
        device = "cuda" if wants_gpu else "cpu"
    if num_gpus is None:
        num_gpus = 1.0 if device == "cuda" else 0.0
    if num_cpus is None:
        num_cpus = 1.0 if device == "cuda" else cores
    return RankPlace(device, num_cpus, num_gpus)


def placement(tensor_parallel_size: int, resources: dict[str, float]) -> dict[str, Any]:
    """Options of a Serve deployment whose replicas have so many ranks.

    A replica has one placement group, a bundle for each of its ranks; it sits in the first itself
    and runs rank 0. Ranks on GPUs share a machine, for they exchange tensors twice a layer; a
    replica of one rank needs no group.

    Args:
        resources: ``num_cpus`` and ``num_gpus`` of each rank.
    """
    if tensor_parallel_size == 1:
        return {}
    bundle = {"CPU": resources["num_cpus"], "GPU": resources["num_gpus"]}
    bundle = {name: amount for name, amount in bundle.items() if amount}
    return {
        "placement_group_bundles": [bundle] * tensor_parallel_size,
        "placement_group_strategy": "STRICT_PACK" if resources["num_gpus"] else "PACK",
    }
