"""What the NVIDIA driver tells of GPUs, by a driver that is written here, as metrics."""

from __future__ import annotations

from types import SimpleNamespace

import pynvml
import pytest

from focus_ray.cluster.telemetry import GpuTelemetry
from focus_ray.serve.gpu_metrics import gpu_families

MEMORY = SimpleNamespace(used=3 * 2**30, total=8 * 2**30)


@pytest.fixture
def driver(monkeypatch):
    """Four GPUs; the last does not tell its power, as parts of GPUs do not."""

    def power(gpu):
        if gpu == 3:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return 350_500

    answers = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 4,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetHandleByUUID": lambda uuid: int(uuid.removeprefix("GPU-")),
        "nvmlDeviceGetUUID": lambda gpu: f"GPU-{gpu}",
        "nvmlDeviceGetName": lambda gpu: "H200",
        "nvmlDeviceGetMemoryInfo": lambda gpu: MEMORY,
        "nvmlDeviceGetUtilizationRates": lambda gpu: SimpleNamespace(gpu=87, memory=40),
        "nvmlDeviceGetPowerUsage": power,
        "nvmlDeviceGetTemperature": lambda gpu, sensor: 41,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [
        pytest.param({}, ["GPU-0", "GPU-1", "GPU-2", "GPU-3"], id="all are this process's"),
        pytest.param({"CUDA_VISIBLE_DEVICES": "2"}, ["GPU-2"], id="as Ray deals them out"),
        pytest.param({"CUDA_VISIBLE_DEVICES": "3, 0"}, ["GPU-3", "GPU-0"], id="several"),
        pytest.param({"CUDA_VISIBLE_DEVICES": "GPU-1"}, ["GPU-1"], id="by UUID"),
        pytest.param({"CUDA_VISIBLE_DEVICES": ""}, [], id="none"),
    ],
)
def test_the_gpus_of_this_process_are_read(driver, visible, gpus):
    assert [reading.gpu for reading in GpuTelemetry(visible).read()] == gpus


def test_readings_become_metrics_in_proper_units(driver):
    readings = GpuTelemetry({"CUDA_VISIBLE_DEVICES": "0,3"}).read()
    samples = {
        (sample.name, sample.labels["gpu"]): sample
        for family in gpu_families(readings, "tiny", "a")
        for sample in family.samples
    }
    values = {name: samples[f"focus_ray:gpu_{name}", "GPU-0"].value for name in UNITS}
    assert values == UNITS
    assert ("focus_ray:gpu_power_watts", "GPU-3") not in samples
    labels = samples["focus_ray:gpu_power_watts", "GPU-0"].labels
    assert labels == {"model_name": "tiny", "replica": "a", "gpu": "GPU-0", "gpu_name": "H200"}


UNITS = {
    "memory_used_bytes": 3 * 2**30,
    "memory_total_bytes": 8 * 2**30,
    "utilization_perc": 0.87,
    "power_watts": 350.5,
    "temperature_celsius": 41,
}


def test_without_a_driver_nothing_is_said(monkeypatch, caplog):
    asked = []

    def no_driver():
        asked.append(1)
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", no_driver)
    telemetry = GpuTelemetry({})
    assert telemetry.read() == telemetry.read() == []
    assert gpu_families([], "tiny", "a") == []
    assert len(asked) == 1, "the driver is looked for once"
    assert not caplog.records
