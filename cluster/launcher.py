"""Files of Ray's cluster launcher (``ray up``): Ray's own checks, and which GPUs they ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from focus_ray.cluster.accelerators import GPUS, Machine, aws_machine, find_gpu, gcp_machine
from focus_ray.cluster.fit import NodeGroup
from focus_ray.cluster.strict_yaml import is_unset

PROVIDERS = ("local", "aws", "gcp")


def launcher_groups(config: dict[str, Any]) -> list[NodeGroup]:
    """The machines of a launcher file.

    Raises:
        ValueError: Ray would refuse it; names the field.
    """
    provider = config.get("provider")
    kind = provider.get("type") if isinstance(provider, dict) else None
    if not isinstance(provider, dict) or kind not in PROVIDERS:
        raise ValueError(
            f"provider.type: {kind!r} is not checked here, only {', '.join(PROVIDERS)}; use ray up "
            "by itself for others"
        )
    if kind == "local":
        _require_addresses(config, provider)
    prepared = _prepared(config)
    told = _metadata(config)
    if kind == "local":
        return _local_groups(provider, prepared, told)
    head = prepared["head_node_type"]
    return [
        _group(kind, name, node_type, prepared["max_workers"], is_head=name == head)
        for name, node_type in prepared["available_node_types"].items()
    ]


def _require_addresses(config: Mapping[str, Any], provider: Mapping[str, Any]) -> None:
    """What Ray checks by ending the process."""
    head, workers = provider.get("head_ip"), provider.get("worker_ips")
    if not isinstance(head, str) or not isinstance(workers, list):
        raise ValueError(
            f"provider: head_ip is {head!r} and worker_ips {workers!r}; give an address and a list "
            "of addresses, [] for one machine"
        )
    if head in workers or len(set(workers)) < len(workers):
        raise ValueError(
            f"provider.worker_ips: an address stands twice in head_ip {head} and {workers}; Ray "
            "would start two nodes under one name"
        )
    if config.get("available_node_types"):
        raise ValueError(
            "available_node_types: not for provider type local, whose machines are those of "
            "worker_ips; leave it out"
        )


def _prepared(config: dict[str, Any]) -> dict[str, Any]:
    """With Ray's defaults, as ``ray up`` would check it."""
    import jsonschema  # type: ignore[import-untyped]
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        prepared: dict[str, Any] = prepare_config(config)
        validate_config(prepared)
    except jsonschema.ValidationError as error:
        where = ".".join(map(str, error.absolute_path)) or "the file"
        raise ValueError(f"{where}: {error.message}") from None
    except (ValueError, AssertionError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"Ray's launcher refuses the file: {error}") from None
    return prepared


def _metadata(config: Mapping[str, Any]) -> Machine | None:
    """What the file says of its machines; Ray leaves ``metadata`` to its user."""
    metadata = config.get("metadata") or {}
    if "gpus_per_machine" not in metadata:
        return None
    count, name = metadata["gpus_per_machine"], metadata.get("gpu")
    if type(count) is not int or count < 0:
        raise ValueError(f"metadata.gpus_per_machine: must be a number of GPUs, got {count!r}")
    if not count or is_unset(name):
        return Machine(None, count)
    gpu = find_gpu(str(name))
    if gpu is None:
        raise ValueError(f"metadata.gpu: {name!r} is not known; use one of {', '.join(GPUS)}")
    return Machine(gpu, count)


def _local_groups(
    provider: Mapping[str, Any], prepared: Mapping[str, Any], told: Machine | None
) -> list[NodeGroup]:
    gpu, count = (told.gpu, told.num_gpus) if told else (None, None)
    num_workers = min(len(provider["worker_ips"]), prepared["max_workers"])
    groups = [NodeGroup("head", count, gpu, 1, 1)]
    if num_workers:
        groups.append(NodeGroup("workers", count, gpu, num_workers, num_workers))
    return groups


def _group(
    provider: str, name: str, node_type: Mapping[str, Any], max_workers: int, *, is_head: bool
) -> NodeGroup:
    machine = _machine(provider, name, node_type["node_config"])
    count = node_type["resources"].get("GPU", machine.num_gpus)
    if count > machine.num_gpus:
        raise ValueError(
            f"available_node_types.{name}.resources.GPU: {count} is more than the "
            f"{machine.num_gpus} that such a machine has; leave it out"
        )
    if is_head:
        return NodeGroup(name, count, machine.gpu, 1, 1)
    most = min(node_type.get("max_workers", max_workers), max_workers)
    return NodeGroup(name, count, machine.gpu, node_type.get("min_workers", 0), most)


def _machine(provider: str, name: str, node_config: Mapping[str, Any]) -> Machine:
    if provider == "aws":
        field, machine_type = "InstanceType", str(node_config.get("InstanceType"))
        machine = aws_machine(machine_type)
    else:
        field, machine_type = "machineType", str(node_config.get("machineType"))
        attached = node_config.get("guestAccelerators") or []
        counts = [
            (str(each["acceleratorType"]), int(each["acceleratorCount"])) for each in attached
        ]
        machine = gcp_machine(machine_type, counts)
    if machine is None:
        raise ValueError(
            f"available_node_types.{name}.node_config.{field}: the GPUs of {machine_type} are not "
            "in the table of cluster/accelerators.py; take another machine, or add it there"
        )
    return machine
