"""Where engines are placed: devices decided, cores and GPUs reserved."""

from __future__ import annotations

import pytest

from focus_ray.config import EngineConfig
from focus_ray.serve.model_args import AutoscalingArgs, ModelArgs
from focus_ray.serve.placing import place

CPUS = {"CPU": 8.0}
GPUS = {"CPU": 8.0, "GPU": 2.0}


@pytest.mark.parametrize(
    ("args", "cluster", "device", "num_cpus", "num_gpus"),
    [
        pytest.param({}, CPUS, "cpu", 8.0, 0.0, id="no GPU: all cores for the one engine"),
        pytest.param({}, GPUS, "cuda", 1.0, 1.0, id="a GPU is taken when there is one"),
        pytest.param({"num_replicas": 3}, CPUS, "cpu", 2.0, 0.0, id="engines share the cores"),
        pytest.param({"num_replicas": 9}, CPUS, "cpu", 1.0, 0.0, id="at least one core"),
        pytest.param(
            {"autoscaling": AutoscalingArgs(max_replicas=4)},
            CPUS,
            "cpu",
            2.0,
            0.0,
            id="engines that may come have their share",
        ),
        pytest.param(
            {"engine": EngineConfig(tensor_parallel_size=2), "num_replicas": 2},
            CPUS,
            "cpu",
            2.0,
            0.0,
            id="ranks share the cores",
        ),
        pytest.param({"num_gpus": 0}, GPUS, "cpu", 8.0, 0.0, id="no GPU wanted"),
        pytest.param(
            {"num_gpus": 0.5, "engine": EngineConfig(gpu_memory_utilization=0.4)},
            GPUS,
            "cuda",
            1.0,
            0.5,
            id="half a GPU",
        ),
        pytest.param({"num_cpus": 3}, GPUS, "cuda", 3.0, 1.0, id="cores as asked for"),
        pytest.param(
            {"engine": EngineConfig(device="cpu")}, GPUS, "cpu", 8.0, 0.0, id="device given: cpu"
        ),
        pytest.param(
            {"engine": EngineConfig(device="cuda")}, CPUS, "cuda", 1.0, 1.0, id="device given: cuda"
        ),
    ],
)
def test_one_model(args, cluster, device, num_cpus, num_gpus):
    [placed] = place([ModelArgs(**args)], cluster)
    assert placed.config.device == device
    assert placed.resources == {"num_cpus": num_cpus, "num_gpus": num_gpus}


def test_models_share_the_cores():
    models = [ModelArgs(num_replicas=3), ModelArgs(engine=EngineConfig(device="cpu"))]
    assert [placed.rank.num_cpus for placed in place(models, CPUS)] == [2.0, 2.0]
    assert [placed.num_ranks for placed in place(models, CPUS)] == [3, 1]
