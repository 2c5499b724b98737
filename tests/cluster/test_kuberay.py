"""Manifests of KubeRay, and the command lines of its jobs."""

from __future__ import annotations

from typing import Any

import pytest

from focus_ray.cluster.accelerators import GPUS
from focus_ray.cluster.fit import NodeGroup
from focus_ray.cluster.job_command import job_demand
from focus_ray.cluster.kuberay import read_ray_job, read_ray_service, require_object


def pod(gpus=0, **selector) -> dict[str, Any]:
    limits = {"nvidia.com/gpu": gpus} if gpus else {}
    container = {"name": "ray", "image": "i", "resources": {"limits": limits}}
    return {"spec": {"containers": [container], "nodeSelector": selector}}


def cluster(**fields) -> dict[str, Any]:
    worker = {
        "groupName": "gpu",
        "replicas": 2,
        "minReplicas": 1,
        "maxReplicas": 4,
        "rayStartParams": {},
        "template": pod(8, **{"nvidia.com/gpu.product": "NVIDIA-H200"}),
    }
    return {
        "rayVersion": "2.60.0",
        "authOptions": {"mode": "token"},
        "headGroupSpec": {"rayStartParams": {}, "template": pod()},
        "workerGroupSpecs": [worker],
        **fields,
    }


def service(**fields) -> dict[str, Any]:
    spec = {"serveConfigV2": "applications: []", "rayClusterConfig": cluster(), **fields}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": "s"},
        "spec": spec,
    }


@pytest.mark.parametrize(
    ("fields", "bounds"),
    [
        pytest.param({}, (2, 2), id="as many as replicas says"),
        pytest.param({"enableInTreeAutoscaling": True}, (1, 4), id="as the autoscaler decides"),
    ],
)
def test_machines(fields, bounds):
    spec = read_ray_service(service(rayClusterConfig=cluster(**fields)))
    assert spec.ray_cluster_config.groups() == [
        NodeGroup("head", 0, None, 1, 1),
        NodeGroup("gpu", 8, GPUS["H200"], *bounds),
    ]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        pytest.param(
            service(serveConfig="x"),
            "spec.serveConfig: KubeRay knows no such field; correct its name",
            id="unknown field",
        ),
        pytest.param(
            service(rayClusterConfig=cluster(authOptions={"mode": "none"})),
            "spec.rayClusterConfig.authOptions.mode: input should be 'token' or 'disabled', got",
            id="unknown value",
        ),
        pytest.param(
            service(rayClusterConfig={k: v for k, v in cluster().items() if k != "authOptions"}),
            "spec.rayClusterConfig.authOptions: is missing",
            id="authentication left open",
        ),
        pytest.param(
            service(rayClusterConfig=cluster(headGroupSpec={"template": pod()})),
            "spec.rayClusterConfig.headGroupSpec.rayStartParams: is missing",
            id="missing",
        ),
        pytest.param(
            service() | {"apiVersion": "ray.io/v1alpha1"}, "is not ray.io/v1", id="old version"
        ),
        pytest.param(service() | {"metadata": {}}, "metadata.name: .* got None", id="no name"),
    ],
)
def test_what_is_refused(document, message):
    with pytest.raises(ValueError, match=message):
        read_ray_service(document)


def test_a_job():
    document = service() | {
        "kind": "RayJob",
        "spec": {"entrypoint": "focus-ray batch run", "rayClusterSpec": cluster()},
    }
    assert read_ray_job(document).ray_cluster_spec.groups()[1].max_nodes == 2


def test_what_stands_beside_needs_a_name():
    require_object({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}})
    with pytest.raises(ValueError, match="kind: a Kubernetes object has one"):
        require_object({"apiVersion": "v1", "metadata": {"name": "s"}})


@pytest.mark.parametrize(
    ("flags", "on_gpus", "num_gpus", "engines"),
    [
        pytest.param("--model a/b --num-replicas 4", True, 1.0, 4, id="on GPUs"),
        pytest.param("--model a/b --num-replicas=4", False, 0.0, 4, id="there are none"),
        pytest.param("--model a/b", True, 1.0, 1, id="as many as there are GPUs"),
        pytest.param("--model a/b --device cpu", True, 0.0, 1, id="on CPUs"),
        pytest.param("--model a/b --longest-first --device cuda", False, 1.0, 1, id="no value"),
    ],
)
def test_the_engines_of_a_job(flags, on_gpus, num_gpus, engines):
    command = f"focus-ray batch run --input x --output y {flags} --max-num-seqs 64 --enforce-eager"
    found = job_demand(command, "spec.entrypoint", on_gpus)
    assert (found.name, found.num_gpus, found.max_engines) == ("a/b", num_gpus, engines)
    assert found.config.max_num_seqs == 64
    assert found.config.enforce_eager


@pytest.mark.parametrize(
    ("command", "message"),
    [
        pytest.param("python run.py", "is no focus-ray batch run", id="another command"),
        pytest.param("focus-ray batch run --max-num-seqs 0", "--max-num-seqs .* greater", id="bad"),
        pytest.param("focus-ray batch run --num-replicas x", "neither a number nor auto", id="x"),
    ],
)
def test_a_command_that_is_refused(command, message):
    with pytest.raises(ValueError, match=message):
        job_demand(command, "spec.entrypoint", True)
