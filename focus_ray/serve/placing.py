"""Where engines run: devices decided, cores and GPUs reserved. Plain numbers; no Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from focus_ray.config import EngineConfig
from focus_ray.serve.model_args import ModelArgs


@dataclass(frozen=True)
class Placed:
    """A model's engines, with what Ray reserves for each of their ranks."""

    model: ModelArgs
    config: EngineConfig
    num_cpus: float
    num_gpus: float

    @property
    def resources(self) -> dict[str, float]:
        """As Ray's options of an actor."""
        return {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus}

    @property
    def num_ranks(self) -> int:
        """Ranks that run from the start."""
        return self.model.min_engines * self.config.tensor_parallel_size


def place(models: Sequence[ModelArgs], cluster: Mapping[str, float]) -> tuple[Placed, ...]:
    """Decide devices and resources.

    Ray gives a process as many OpenMP threads as it reserves cores, and one if it reserves none.
    Ranks on CPUs share the cores evenly.

    Args:
        cluster: Ray's resources by name.
    """
    num_ranks = sum(model.max_engines * model.engine.tensor_parallel_size for model in models)
    share = float(max(1, int(cluster.get("CPU", 1.0)) // num_ranks))
    return tuple(_place(model, bool(cluster.get("GPU")), share) for model in models)


def _place(model: ModelArgs, has_gpus: bool, cpu_share: float) -> Placed:
    device, num_gpus, num_cpus = model.engine.device, model.num_gpus, model.num_cpus
    if device == "auto":
        wants_gpu = has_gpus if num_gpus is None else num_gpus > 0
        device = "cuda" if wants_gpu else "cpu"
    if num_gpus is None:
        num_gpus = 1.0 if device == "cuda" else 0.0
    if num_cpus is None:
        num_cpus = 1.0 if device == "cuda" else cpu_share
    config = model.engine.model_copy(update={"device": device})
    return Placed(model, config, num_cpus, num_gpus)
