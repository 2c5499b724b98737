"""What the GPUs of this process are doing, as the NVIDIA driver tells it.

Where there is no driver nothing is read and nothing is said about it; what a GPU does not tell, as
a part of one under MIG does not tell its power, is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import pynvml  # type: ignore[import-untyped]

Value = TypeVar("Value")


@dataclass(frozen=True)
class GpuReading:
    """One GPU now.

    Args:
        gpu: its UUID, which is the same in all processes and after a restart.
        name: product name.
        memory_used_bytes, memory_total_bytes: of the whole GPU, whoever uses it.
        utilization: share of the last moments in which a kernel ran, 0 to 1.
        power_w: watts.
        temperature_c: degrees Celsius.
    """

    gpu: str
    name: str
    memory_used_bytes: float | None
    memory_total_bytes: float | None
    utilization: float | None
    power_w: float | None
    temperature_c: float | None


class GpuTelemetry:
    """Reads the GPUs that a process may use.

    Args:
        environment: of the process; ``CUDA_VISIBLE_DEVICES`` in it, numbers or UUIDs, says which.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._visible = environment.get("CUDA_VISIBLE_DEVICES")
        self._handles: list[Any] | None = None

    def read(self) -> list[GpuReading]:
        """A reading of each; takes milliseconds."""
        if self._handles is None:
            self._handles = _handles(self._visible)
        return [_reading(handle) for handle in self._handles]


def _handles(visible: str | None) -> list[Any]:
    try:
        pynvml.nvmlInit()  # once: the process holds the driver until it ends
        if visible is None:
            count = pynvml.nvmlDeviceGetCount()
            return [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
        return [_handle(name.strip()) for name in visible.split(",") if name.strip()]
    except pynvml.NVMLError:
        return []


def _handle(name: str) -> Any:
    if name.isdigit():
        return pynvml.nvmlDeviceGetHandleByIndex(int(name))
    return pynvml.nvmlDeviceGetHandleByUUID(name)


def _reading(handle: Any) -> GpuReading:
    memory = _told(lambda: pynvml.nvmlDeviceGetMemoryInfo(handle))
    rates = _told(lambda: pynvml.nvmlDeviceGetUtilizationRates(handle))
    milliwatts = _told(lambda: pynvml.nvmlDeviceGetPowerUsage(handle))
    return GpuReading(
        gpu=_told(lambda: pynvml.nvmlDeviceGetUUID(handle)) or "",
        name=_told(lambda: pynvml.nvmlDeviceGetName(handle)) or "",
        memory_used_bytes=None if memory is None else memory.used,
        memory_total_bytes=None if memory is None else memory.total,
        utilization=None if rates is None else rates.gpu / 100,
        power_w=None if milliwatts is None else milliwatts / 1000,
        temperature_c=_told(
            lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)
        ),
    )


def _told(ask: Callable[[], Value]) -> Value | None:
    """The answer; None where this GPU does not give it, or is gone."""
    try:
        return ask()
    except pynvml.NVMLError:
        return None
