"""GPUs and the machines that hold them, under the names that cluster files use.

Memory is what CUDA reports as total, which is less than what is on the label, rounded down.
Sources: nvidia-smi on an H100 and an H200; for others NVIDIA's data sheets less what the driver
keeps. Machines: the AWS pages of EC2's P, G and GCP's page of GPU machine types.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU; ``name`` is Ray's ``accelerator_type`` where Ray has one."""

    name: str
    memory_bytes: int


@dataclass(frozen=True)
class Machine:
    """What a machine type holds; no GPU where ``num_gpus`` is 0."""

    gpu: Gpu | None
    num_gpus: int


GPUS: dict[str, Gpu] = {
    name: Gpu(name, int(gib * GIB))
    for name, gib in {
        "T4": 14.5,
        "A10G": 21.9,
        "L4": 21.9,
        "A100-40G": 39.3,
        "L40S": 44.3,
        "A100-80G": 79.1,
        "H100": 79.1,
        "RTX-PRO-6000": 94.9,
        "H200": 139.7,
        "B200": 178.3,
    }.items()
}
"""From the smallest on."""

# An A100 of Ray's may have either size; the smaller one is what can be relied on.
_ALIASES = {"A100": "A100-40G"}

_AWS = {
    "g4dn": ("T4", {"12xlarge": 4, "metal": 8}),
    "g5": ("A10G", {"12xlarge": 4, "24xlarge": 4, "48xlarge": 8}),
    "g6": ("L4", {"12xlarge": 4, "24xlarge": 4, "48xlarge": 8}),
    "g6e": ("L40S", {"12xlarge": 4, "24xlarge": 4, "48xlarge": 8}),
    "g7e": ("RTX-PRO-6000", {"12xlarge": 2, "24xlarge": 4, "48xlarge": 8}),
    "p4d": ("A100-40G", {"24xlarge": 8}),
    "p4de": ("A100-80G", {"24xlarge": 8}),
    "p5": ("H100", {"48xlarge": 8}),
    "p5e": ("H200", {"48xlarge": 8}),
    "p5en": ("H200", {"48xlarge": 8}),
    "p6-b200": ("B200", {"48xlarge": 8}),
}
"""GPU of a family, and how many an instance has where that is not one."""

_GCP = {
    "a2-highgpu": "A100-40G",
    "a2-megagpu": "A100-40G",
    "a2-ultragpu": "A100-80G",
    "a3-edgegpu": "H100",
    "a3-highgpu": "H100",
    "a3-megagpu": "H100",
    "a3-ultragpu": "H200",
    "a4-highgpu": "B200",
}
"""Their names end in the number of GPUs: a3-highgpu-8g."""

_GCP_G2 = {"24": 2, "48": 4, "96": 8}
"""Of g2-standard-N; the others have one L4. g4-standard-N has one RTX PRO 6000 for each 48."""

_GCP_ACCELERATORS = {
    "nvidia-tesla-t4": "T4",
    "nvidia-l4": "L4",
    "nvidia-tesla-a100": "A100-40G",
    "nvidia-a100-80gb": "A100-80G",
    "nvidia-h100-80gb": "H100",
    "nvidia-h100-mega-80gb": "H100",
    "nvidia-h200-141gb": "H200",
    "nvidia-b200": "B200",
    "nvidia-rtx-pro-6000": "RTX-PRO-6000",
}
"""Also the values of GKE's label."""

# What NVIDIA's feature discovery and AWS write, in lower case and without the maker.
_PRODUCTS = {
    "tesla-t4": "T4",
    "a10g": "A10G",
    "a100": "A100-40G",
    "a100-sxm4-40gb": "A100-40G",
    "a100-sxm4-80gb": "A100-80G",
    "a100-80gb-pcie": "A100-80G",
    "h100-80gb-hbm3": "H100",
}

_PRODUCT_LABELS = (
    "nvidia.com/gpu.product",
    "karpenter.k8s.aws/instance-gpu-name",
    "eks.amazonaws.com/instance-gpu-name",
    "ray.io/accelerator-type",
)
_GKE_LABEL = "cloud.google.com/gke-accelerator"
_MACHINE_LABEL = "node.kubernetes.io/instance-type"


def find_gpu(name: str) -> Gpu | None:
    """By Ray's name or by a product's, whatever the case."""
    wanted = name.lower().removeprefix("nvidia-")
    wanted = _PRODUCTS.get(wanted, wanted)
    for known, gpu in GPUS.items():
        if wanted.lower() == known.lower():
            return gpu
    alias = _ALIASES.get(wanted.upper())
    return GPUS[alias] if alias else None


def aws_machine(instance_type: str) -> Machine | None:
    """What an EC2 instance type holds; None of a GPU family that is not in the table."""
    family, _, size = instance_type.partition(".")
    if family not in _AWS:
        return None if family.startswith(("p", "g")) else Machine(None, 0)
    gpu, counts = _AWS[family]
    return Machine(GPUS[gpu], counts.get(size, 1))


def gcp_machine(machine_type: str, accelerators: list[tuple[str, int]]) -> Machine | None:
    """What a GCP machine type with attached accelerators holds; None if one is unknown."""
    if accelerators:
        kind, count = accelerators[0]
        name = _GCP_ACCELERATORS.get(kind.rsplit("/", 1)[-1])
        return Machine(GPUS[name], count) if name else None
    family, _, size = machine_type.rpartition("-")
    if family == "g2-standard":
        return Machine(GPUS["L4"], _GCP_G2.get(size, 1))
    if family == "g4-standard":
        return Machine(GPUS["RTX-PRO-6000"], int(size) // 48)
    if family in _GCP and size.endswith("g"):
        return Machine(GPUS[_GCP[family]], int(size[:-1]))
    return None if machine_type.startswith(("a", "g")) else Machine(None, 0)


def selected_gpu(node_selector: Mapping[str, str]) -> Gpu | None:
    """The GPU of the nodes that a pod asks for; None if no label in the table says."""
    if name := _GCP_ACCELERATORS.get(node_selector.get(_GKE_LABEL, "")):
        return GPUS[name]
    for label in _PRODUCT_LABELS:
        if (value := node_selector.get(label)) and (gpu := find_gpu(value)):
            return gpu
    if instance_type := node_selector.get(_MACHINE_LABEL):
        machine = aws_machine(instance_type)
        if machine is None or machine.gpu is None:
            machine = gcp_machine(instance_type, [])
        return machine.gpu if machine else None
    return None
