"""Files of Ray's launcher: what Ray refuses, what they say of GPUs, which commands run."""

from __future__ import annotations

from typing import Any

import pytest

from focus_ray.cluster.accelerators import GPUS
from focus_ray.cluster.fit import NodeGroup
from focus_ray.cluster.launcher import launcher_groups
from focus_ray.cluster.launcher_commands import down_commands, up_commands

L40S = GPUS["L40S"]


def local(workers=("10.0.0.2", "10.0.0.3"), **fields) -> dict[str, Any]:
    provider = {"type": "local", "head_ip": "10.0.0.1", "worker_ips": list(workers)}
    return {
        "cluster_name": "c",
        "provider": provider,
        "auth": {"ssh_user": "me", "ssh_private_key": "~/.ssh/key"},
        **fields,
    }


def aws(**gpu_type) -> dict[str, Any]:
    gpu = {"min_workers": 1, "max_workers": 3, "resources": {}, "node_config": {}, **gpu_type}
    gpu["node_config"] = {"InstanceType": "g6e.12xlarge", **gpu["node_config"]}
    head = {"max_workers": 0, "resources": {}, "node_config": {"InstanceType": "m7i.large"}}
    return {
        "cluster_name": "c",
        "max_workers": 4,
        "provider": {"type": "aws", "region": "us-west-2"},
        "auth": {"ssh_user": "ubuntu"},
        "available_node_types": {"head": head, "gpu": gpu},
        "head_node_type": "head",
    }


def test_machines_by_address():
    config = local(metadata={"gpu": "L40S", "gpus_per_machine": 2})
    assert launcher_groups(config) == [
        NodeGroup("head", 2, L40S, 1, 1),
        NodeGroup("workers", 2, L40S, 2, 2),
    ]


@pytest.mark.parametrize(
    ("fields", "num_gpus"),
    [
        pytest.param({}, None, id="nothing said"),
        pytest.param({"metadata": {"gpus_per_machine": 0}}, 0, id="none"),
        pytest.param({"metadata": {"gpus_per_machine": 8, "gpu": "<GPU>"}}, 8, id="kind not set"),
    ],
)
def test_the_kind_of_gpu_may_be_open(fields, num_gpus):
    [head] = launcher_groups(local((), **fields))
    assert (head.num_gpus, head.gpu) == (num_gpus, None)


def test_machines_of_a_cloud():
    assert launcher_groups(aws()) == [
        NodeGroup("head", 0, None, 1, 1),
        NodeGroup("gpu", 4, L40S, 1, 3),
    ]


def test_the_cluster_bounds_its_parts():
    config = aws(max_workers=100, min_workers=0) | {"max_workers": 2}
    assert launcher_groups(config)[1].max_nodes == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        pytest.param({"provider": {"type": "azure"}}, "provider.type: 'azure'", id="provider"),
        pytest.param(local() | {"cluster": 1}, "'cluster' was unexpected", id="unknown field"),
        pytest.param(
            local() | {"upscaling_speed": "fast"},
            "upscaling_speed: 'fast' is not of type 'number'",
            id="wrong type",
        ),
        pytest.param(
            {"cluster_name": "c", "provider": {"type": "local", "head_ip": "10.0.0.1"}},
            "worker_ips None",
            id="no addresses",
        ),
        pytest.param(local(("10.0.0.1",)), "an address stands twice", id="head as worker"),
        pytest.param(
            local(available_node_types={"a": {}}), "available_node_types: not for", id="types"
        ),
        pytest.param(
            local(metadata={"gpu": "GTX", "gpus_per_machine": 1}), "metadata.gpu: 'GTX'", id="GPU"
        ),
        pytest.param(
            local(metadata={"gpus_per_machine": "8"}), "must be a number of GPUs", id="count"
        ),
        pytest.param(aws(min_workers=9), "max_workers` is smaller", id="more than there may be"),
        pytest.param(
            aws(node_config={"InstanceType": "p9.48xlarge"}),
            r"available_node_types.gpu.node_config.InstanceType: the GPUs of p9",
            id="unknown machine",
        ),
        pytest.param(aws(resources={"GPU": 5}), "5 is more than the 4", id="more GPUs than it has"),
        pytest.param(
            aws() | {"docker": {"image": "i"}}, "refuses the file: .*container", id="half a docker"
        ),
    ],
)
def test_what_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        launcher_groups(config)


def test_up_and_down_of_machines_by_address():
    """Both go beyond Ray's own: see ``launcher_commands``."""
    [up] = up_commands(local(), "c.yaml", None, yes=False)
    assert up == ["env", "RAY_UP_enable_autoscaler_v2=0", "ray", "up", "c.yaml"]
    stop, down = down_commands(local(), "c.yaml")
    assert stop[:3] == ["ray", "exec", "c.yaml"]
    first, *others = stop[3].split("; ssh ")
    assert first == "ray stop"  # the head's autoscaler would start the others again
    assert [other.split()[5] for other in others] == ["me@10.0.0.2", "me@10.0.0.3"]
    assert all("-i ray_bootstrap_key.pem" in other and "ray stop" in other for other in others)
    assert down == ["ray", "down", "--yes", "c.yaml"]


def test_up_and_down_of_a_cloud_are_rays_own():
    assert list(up_commands(aws(), "c.yaml", "s.yaml", yes=True)) == [
        ["ray", "up", "--yes", "c.yaml"],
        ["ray", "rsync-up", "c.yaml", "s.yaml", "~/focus-ray-serve.yaml"],
        ["ray", "exec", "c.yaml", "serve deploy ~/focus-ray-serve.yaml"],
    ]
    assert list(down_commands(aws(), "c.yaml")) == [["ray", "down", "--yes", "c.yaml"]]
    assert list(down_commands(local(()), "c.yaml")) == [["ray", "down", "--yes", "c.yaml"]]
