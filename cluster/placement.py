"""Where Ray puts the ranks of an engine."""

from __future__ import annotations

from typing import Any


def placement(tensor_parallel_size: int, resources: dict[str, float]) -> dict[str, Any]:
    """Options of a Serve deployment whose replicas have so many ranks.

    A replica has one placement group, a bundle for each of its ranks; it sits in the first itself
    and runs rank 0. Ranks on GPUs share a machine, for they exchange tensors twice a layer; a
    replica of one rank needs no group.

    Args:
        resources: ``num_cpus`` and ``num_gpus`` of each rank.
    """
    if tensor_parallel_size == 1:
        return {}
    bundle = {"CPU": resources["num_cpus"], "GPU": resources["num_gpus"]}
    bundle = {name: amount for name, amount in bundle.items() if amount}
    return {
        "placement_group_bundles": [bundle] * tensor_parallel_size,
        "placement_group_strategy": "STRICT_PACK" if resources["num_gpus"] else "PACK",
    }
