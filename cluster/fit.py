"""Whether what models ask for fits what machines offer. Plain numbers; no file, no Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from focus_ray.cluster.accelerators import GIB, GPUS, Gpu
from focus_ray.config import EngineConfig

if TYPE_CHECKING:  # it loads torch, and files without models need none
    from focus_ray.cluster.estimate import Estimate


@dataclass(frozen=True)
class NodeGroup:
    """Machines of one kind.

    Args:
        name: in the file.
        num_gpus: of each; None: the file does not say.
        gpu: of which kind; None: there is none, or the file does not say.
        min_nodes, max_nodes: how many there are, at least and at most.
    """

    name: str
    num_gpus: int | None
    gpu: Gpu | None
    min_nodes: int
    max_nodes: int


@dataclass(frozen=True)
class Demand:
    """The engines of one model.

    Args:
        field: where the file describes it, for messages.
        num_gpus: of each rank; 0 on CPUs.
        min_engines, max_engines: from the start, and at most.
    """

    field: str
    name: str
    config: EngineConfig
    num_gpus: float
    min_engines: int
    max_engines: int

    @property
    def gpus_per_engine(self) -> float:
        return self.config.tensor_parallel_size * self.num_gpus


@dataclass(frozen=True)
class Findings:
    """What is wrong, and what is worth knowing; whole sentences with field, value and remedy."""

    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def smallest_gpu(demand: Demand, estimate: Estimate) -> Gpu | None:
    """The smallest kind of GPU on which an engine starts; None if none in the table is enough."""
    return next(
        (gpu for gpu in GPUS.values() if not memory_findings(demand, estimate, gpu).errors), None
    )


def memory_findings(demand: Demand, estimate: Estimate, gpu: Gpu) -> Findings:
    """Whether one rank fits on this kind of GPU, and its sequences beside it."""
    found = Findings()
    config, where = demand.config, f"{demand.field}.engine"
    room = estimate.room_bytes(config, gpu.memory_bytes)
    fixed_size = config.num_pages is not None or config.kv_cache_memory_bytes is not None
    all_bytes = estimate.fixed_bytes + room
    if fixed_size and all_bytes > gpu.memory_bytes * demand.num_gpus:
        share = f"{demand.num_gpus:g} of " if demand.num_gpus < 1 else ""
        found.errors.append(
            f"{where}: {demand.name} takes {_gib(all_bytes)}, KV of the given size included, and "
            f"{share}{gpu.name} has {_gib(gpu.memory_bytes * demand.num_gpus)}; lower "
            "kv_cache_memory_bytes or num_pages"
        )
    one = estimate.kv_bytes(1)
    if room < (one if config.max_model_len else estimate.page_bytes):
        found.errors.append(
            f"{where}: {demand.name} takes {_gib(estimate.fixed_bytes)} of {gpu.name}'s "
            f"{_gib(gpu.memory_bytes)} before any KV (weights {_gib(estimate.weights_bytes)}, step "
            f"{_gib(estimate.step_bytes)}), and one sequence of {estimate.longest} tokens "
            f"{_gib(one)}, with gpu_memory_utilization {config.gpu_memory_utilization:g}; raise "
            "tensor_parallel_size, lower max_num_seqs or max_model_len, or take a larger GPU"
        )
    elif room < one:
        found.notes.append(
            f"{where}.max_model_len: is lowered from {estimate.longest} to what {_gib(room)} of KV "
            "holds; set it to what you need"
        )
    elif room < estimate.kv_bytes(config.max_num_seqs):
        found.notes.append(
            f"{where}: KV holds {room // one} sequences of {estimate.longest} tokens, and "
            f"max_num_seqs is {config.max_num_seqs}; where all are that long, the others wait. "
            "Lower max_model_len if they never are"
        )
    spare = gpu.memory_bytes * (1 - config.gpu_memory_utilization)
    if demand.num_gpus == 1 and not fixed_size and estimate.graphs_bytes > spare:
        found.notes.append(
            f"{where}.gpu_memory_utilization: {config.gpu_memory_utilization:g} leaves "
            f"{_gib(spare)} of {gpu.name} for recorded steps, which may take "
            f"{_gib(estimate.graphs_bytes)}; lower it if the start runs out of memory"
        )
    return found


def room_findings(demands: Sequence[Demand], groups: Sequence[NodeGroup]) -> Findings:
    """Whether there are GPUs enough, and machines with enough of them for an engine's ranks."""
    found = Findings()
    on_gpus = [demand for demand in demands if demand.num_gpus]
    if not groups or any(group.num_gpus is None for group in groups):
        return found
    most = sum((group.num_gpus or 0) * group.max_nodes for group in groups)
    largest = max((group.num_gpus or 0 for group in groups if group.max_nodes), default=0)
    for demand in on_gpus:
        if demand.gpus_per_engine > largest:
            found.errors.append(
                f"{demand.field}.engine.tensor_parallel_size: an engine of {demand.name} needs "
                f"{demand.gpus_per_engine:g} GPUs of one machine, and the largest has {largest}; "
                "lower it or take larger machines"
            )
    if found.errors:
        return found
    wanted = sum(demand.gpus_per_engine * demand.min_engines for demand in on_gpus)
    at_most = sum(demand.gpus_per_engine * demand.max_engines for demand in on_gpus)
    if wanted > most:
        engines = ", ".join(
            f"{demand.min_engines} x {demand.gpus_per_engine:g} for {demand.name}"
            for demand in on_gpus
        )
        found.errors.append(
            f"num_replicas: {wanted:g} GPUs are asked for ({engines}), and the cluster has at most "
            f"{most}; lower num_replicas, or raise the number of machines"
        )
    elif at_most > most:
        found.notes.append(
            f"autoscaling.max_replicas: all models together may ask for {at_most:g} GPUs, and the "
            f"cluster has at most {most}; what is beyond will wait for a machine"
        )
    return found


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f} GiB"
