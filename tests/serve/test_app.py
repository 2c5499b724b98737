"""Where an engine is placed: its device decided, cores and GPUs reserved."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from focus_ray.config import EngineConfig
from focus_ray.serve.app import placed
from focus_ray.serve.args import ServeArgs

CPUS = {"CPU": 8.0}
GPUS = {"CPU": 8.0, "GPU": 2.0}


@pytest.mark.parametrize(
    ("args", "cluster", "device", "num_cpus", "num_gpus"),
    [
        pytest.param({}, CPUS, "cpu", 8.0, 0.0, id="no GPU: all cores for the one engine"),
        pytest.param({}, GPUS, "cuda", 1.0, 1.0, id="a GPU is taken when there is one"),
        pytest.param({"num_replicas": 3}, CPUS, "cpu", 2.0, 0.0, id="engines share the cores"),
        pytest.param({"num_replicas": 9}, CPUS, "cpu", 1.0, 0.0, id="at least one core"),
        pytest.param({"num_gpus": 0}, GPUS, "cpu", 8.0, 0.0, id="no GPU wanted"),
        pytest.param({"num_cpus": 3}, GPUS, "cuda", 3.0, 1.0, id="cores as asked for"),
        pytest.param(
            {"engine": EngineConfig(device="cpu")}, GPUS, "cpu", 8.0, 0.0, id="device given: cpu"
        ),
        pytest.param(
            {"engine": EngineConfig(device="cuda")}, CPUS, "cuda", 1.0, 1.0, id="device given: cuda"
        ),
    ],
)
def test_placed(args, cluster, device, num_cpus, num_gpus):
    config, resources = placed(ServeArgs(**args), cluster)
    assert config.device == device
    assert resources == {"num_cpus": num_cpus, "num_gpus": num_gpus}


def test_the_model_is_served_under_its_name_unless_told_otherwise():
    engine = EngineConfig(model="owner/name")
    assert ServeArgs(engine=engine).settings().served_model_names == ("owner/name",)
    named = ServeArgs(engine=engine, served_model_name=("a", "b"))
    assert named.settings().served_model_names == ("a", "b")


def test_a_config_file_is_checked():
    with pytest.raises(ValidationError, match="max_seqs"):
        ServeArgs.model_validate({"engine": {"max_seqs": 4}})


def test_the_key_is_not_shown():
    assert "sesame" not in repr(ServeArgs(api_key="sesame").settings())
