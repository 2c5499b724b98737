"""Readings of a replica's GPUs as Prometheus metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily

from focus_ray.cluster.telemetry import GpuReading
from focus_ray.serve.metrics import LABELS, PREFIX

GPU_LABELS = (*LABELS, "gpu", "gpu_name")
GAUGES: dict[str, tuple[str, Callable[[GpuReading], float | None]]] = {
    "gpu_memory_used_bytes": ("Memory in use on the GPU.", lambda x: x.memory_used_bytes),
    "gpu_memory_total_bytes": ("Memory of the GPU.", lambda x: x.memory_total_bytes),
    "gpu_utilization_perc": (
        "Share of time in which a kernel ran, 0 to 1.",
        lambda x: x.utilization,
    ),
    "gpu_power_watts": ("Power that the GPU draws.", lambda x: x.power_w),
    "gpu_temperature_celsius": ("Temperature of the GPU.", lambda x: x.temperature_c),
}


def gpu_families(
    readings: Sequence[GpuReading], model_name: str, replica_name: str
) -> list[Metric]:
    """A family for everything that at least one GPU tells; none where there is no GPU."""
    families: list[Metric] = []
    for name, (text, read) in GAUGES.items():
        gauge = GaugeMetricFamily(PREFIX + name, text, labels=GPU_LABELS)
        for reading in readings:
            if (value := read(reading)) is not None:
                gauge.add_metric((model_name, replica_name, reading.gpu, reading.name), value)
        if gauge.samples:
            families.append(gauge)
    return families
