"""The cluster at a glance, out of what replicas measure anyway: the body of ``GET /cluster``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import Metric
from pydantic import Field

from focus_ray.openai.replies import Reply
from focus_ray.serve.metrics import PREFIX


class GpuView(Reply):
    """One GPU of a replica; null is what it does not tell."""

    gpu: str = Field(description="UUID.")
    name: str
    memory_used_bytes: float | None
    memory_total_bytes: float | None
    utilization: float | None = Field(description="Share of time in which a kernel ran, 0 to 1.")
    power_watts: float | None
    temperature_celsius: float | None


class ReplicaView(Reply):
    """One engine that answers."""

    replica: str
    running: int = Field(description="Sequences that take part in steps.")
    waiting: int = Field(description="Sequences that wait for a place.")
    kv_usage: float = Field(description="Share of the KV pages in use, 0 to 1.")
    occupancy: float | None = Field(
        description="Predicted tokens of a step over those from which on larger steps are hardly "
        "faster; null where it is not measured."
    )
    step_seconds: float = Field(description="Duration of a denoising step, lately.")
    generation_tokens: int = Field(description="Tokens sent since it started.")
    gpus: list[GpuView]


class ModelView(Reply):
    """One model and its replicas."""

    model: str
    states: dict[str, int] = Field(description="Replicas by state, those that start included.")
    replicas: list[ReplicaView]


class ClusterView(Reply):
    """Reply of ``GET /cluster``."""

    models: list[ModelView]


def view_of(model: str, states: Mapping[str, int], families: Iterable[Metric]) -> ModelView:
    """One model's part of the view.

    Args:
        model: its name in the API.
        states: number of replicas by state.
        families: of all of its replicas; values are taken by name and by label.
    """
    values: dict[str, dict[str, float]] = {}  # by replica and metric
    gpu_values: dict[str, dict[tuple[str, str], dict[str, float]]] = {}  # of these, by GPU
    for family in families:
        for sample in family.samples:
            replica, name = sample.labels.get("replica"), sample.name.removeprefix(PREFIX)
            if replica is None:
                continue
            place = values.setdefault(replica, {})
            if "gpu" in sample.labels:
                gpu = sample.labels["gpu"], sample.labels["gpu_name"]
                place = gpu_values.setdefault(replica, {}).setdefault(gpu, {})
            place[name] = sample.value
    replicas = [
        _replica(replica, values[replica], gpu_values.get(replica, {}))
        for replica in sorted(values)
    ]
    return ModelView(model=model, states=dict(states), replicas=replicas)


def _replica(
    replica: str, values: Mapping[str, float], gpus: Mapping[tuple[str, str], Mapping[str, float]]
) -> ReplicaView:
    return ReplicaView(
        replica=replica,
        running=int(values["num_requests_running"]),
        waiting=int(values["num_requests_waiting"]),
        kv_usage=values["kv_cache_usage_perc"],
        occupancy=values.get("effective_batch_occupancy"),
        step_seconds=values["step_seconds"],
        generation_tokens=int(values["generation_tokens_total"]),
        gpus=[
            GpuView(
                gpu=gpu,
                name=name,
                memory_used_bytes=told.get("gpu_memory_used_bytes"),
                memory_total_bytes=told.get("gpu_memory_total_bytes"),
                utilization=told.get("gpu_utilization_perc"),
                power_watts=told.get("gpu_power_watts"),
                temperature_celsius=told.get("gpu_temperature_celsius"),
            )
            for (gpu, name), told in sorted(gpus.items())
        ],
    )
