"""The table of GPUs, by the names that files use."""

from __future__ import annotations

import pytest
from ray.util.accelerators import accelerators as rays

from focus_ray.cluster.accelerators import (
    GPUS,
    aws_machine,
    find_gpu,
    gcp_machine,
    selected_gpu,
)


def test_names_are_rays():
    known = {value for name, value in vars(rays).items() if name.startswith("NVIDIA")}
    assert set(GPUS) <= known


def test_smaller_ones_come_first():
    sizes = [gpu.memory_bytes for gpu in GPUS.values()]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        pytest.param("h100", "H100", id="any case"),
        pytest.param("A100", "A100-40G", id="of two sizes the smaller one"),
        pytest.param("NVIDIA-A100-SXM4-80GB", "A100-80G", id="a product"),
        pytest.param("l40s", "L40S", id="as AWS writes it"),
        pytest.param("GTX", None, id="unknown"),
    ],
)
def test_by_name(name, found):
    gpu = find_gpu(name)
    assert (gpu.name if gpu else None) == found


@pytest.mark.parametrize(
    ("machine", "found"),
    [
        pytest.param(aws_machine("p5.48xlarge"), ("H100", 8), id="p5"),
        pytest.param(aws_machine("p5.4xlarge"), ("H100", 1), id="a small p5"),
        pytest.param(aws_machine("g6e.12xlarge"), ("L40S", 4), id="g6e"),
        pytest.param(aws_machine("m7i.xlarge"), (None, 0), id="AWS, none"),
        pytest.param(aws_machine("p9.48xlarge"), None, id="AWS, unknown"),
        pytest.param(gcp_machine("a3-highgpu-8g", []), ("H100", 8), id="a3"),
        pytest.param(gcp_machine("g2-standard-24", []), ("L4", 2), id="g2"),
        pytest.param(gcp_machine("g4-standard-96", []), ("RTX-PRO-6000", 2), id="g4"),
        pytest.param(
            gcp_machine("n1-standard-8", [("zones/z/acceleratorTypes/nvidia-tesla-t4", 2)]),
            ("T4", 2),
            id="attached",
        ),
        pytest.param(gcp_machine("n2-standard-4", []), (None, 0), id="GCP, none"),
        pytest.param(gcp_machine("a9-highgpu-8g", []), None, id="GCP, unknown"),
    ],
)
def test_by_machine(machine, found):
    assert (machine and (machine.gpu and machine.gpu.name, machine.num_gpus)) == found


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        pytest.param({"cloud.google.com/gke-accelerator": "nvidia-l4"}, "L4", id="GKE"),
        pytest.param({"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}, "H100", id="NVIDIA"),
        pytest.param({"karpenter.k8s.aws/instance-gpu-name": "h200"}, "H200", id="Karpenter"),
        pytest.param({"node.kubernetes.io/instance-type": "p4de.24xlarge"}, "A100-80G", id="EKS"),
        pytest.param(
            {"node.kubernetes.io/instance-type": "a2-ultragpu-1g"}, "A100-80G", id="GKE's machine"
        ),
        pytest.param({"disk": "fast"}, None, id="says nothing of GPUs"),
    ],
)
def test_by_node_selector(labels, found):
    gpu = selected_gpu(labels)
    assert (gpu.name if gpu else None) == found
