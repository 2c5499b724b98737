"""Manifests of KubeRay, as far as they are KubeRay's: field names, node groups, what is run.

Names follow ray.io/v1 of KubeRay 1.6 (``ray-operator/apis/ray/v1`` of ray-project/kuberay); a field
that is not there is refused, as the API server would. Pods are Kubernetes' own: of these only what
is needed here is looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError
from pydantic.alias_generators import to_camel

from focus_ray.cluster.accelerators import selected_gpu
from focus_ray.cluster.fit import NodeGroup

API_VERSION = "ray.io/v1"
GPU_RESOURCE = "nvidia.com/gpu"


class _KubeRay(BaseModel):
    """Named as in the manifest; nothing else may be in it."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel)


class _Kubernetes(BaseModel):
    """The part of Kubernetes' own that is looked at here."""

    model_config = ConfigDict(frozen=True, extra="allow", alias_generator=to_camel)


class Resources(_Kubernetes):
    limits: dict[str, str | int | float] = {}
    requests: dict[str, str | int | float] = {}


class Container(_Kubernetes):
    name: str
    image: str
    resources: Resources = Resources()


class PodSpec(_Kubernetes):
    containers: tuple[Container, ...] = Field(min_length=1)
    node_selector: dict[str, str] = {}


class PodTemplate(_Kubernetes):
    spec: PodSpec

    @property
    def num_gpus(self) -> int:
        """Ray's container is the first one."""
        return int(self.spec.containers[0].resources.limits.get(GPU_RESOURCE, 0))


class HeadGroup(_KubeRay):
    template: PodTemplate
    ray_start_params: dict[str, str]
    head_service: dict[str, Any] | None = None
    enable_ingress: bool | None = None
    service_type: Literal["ClusterIP", "NodePort", "LoadBalancer"] | None = None


class WorkerGroup(_KubeRay):
    group_name: str
    template: PodTemplate
    ray_start_params: dict[str, str]
    replicas: NonNegativeInt = 0
    min_replicas: NonNegativeInt
    max_replicas: NonNegativeInt
    num_of_hosts: PositiveInt = 1
    idle_timeout_seconds: PositiveInt | None = None


class AuthOptions(_KubeRay):
    mode: Literal["token", "disabled"]
    secret_name: str | None = None


class GcsFaultTolerance(_KubeRay):
    redis_address: str
    redis_username: dict[str, Any] | None = None
    redis_password: dict[str, Any] | None = None
    external_storage_namespace: str | None = None


class AutoscalerOptions(_KubeRay):
    version: Literal["v1", "v2"] | None = None
    idle_timeout_seconds: PositiveInt | None = None
    upscaling_mode: Literal["Default", "Aggressive", "Conservative"] | None = None
    resources: Resources | None = None
    env: list[dict[str, Any]] | None = None
    env_from: list[dict[str, Any]] | None = None
    volume_mounts: list[dict[str, Any]] | None = None


class RayClusterSpec(_KubeRay):
    ray_version: str
    head_group_spec: HeadGroup
    worker_group_specs: tuple[WorkerGroup, ...] = ()
    enable_in_tree_autoscaling: bool = False
    autoscaler_options: AutoscalerOptions | None = None
    auth_options: AuthOptions
    gcs_fault_tolerance_options: GcsFaultTolerance | None = None

    def groups(self) -> list[NodeGroup]:
        """The machines that the pods ask for."""
        head = self.head_group_spec.template
        groups = [_group("head", head, 1, 1)]
        for worker in self.worker_group_specs:
            hosts = worker.num_of_hosts
            # Without the autoscaler, replicas is what there will be.
            least = worker.min_replicas if self.enable_in_tree_autoscaling else worker.replicas
            most = worker.max_replicas if self.enable_in_tree_autoscaling else worker.replicas
            groups.append(_group(worker.group_name, worker.template, least * hosts, most * hosts))
        return groups


class UpgradeStrategy(_KubeRay):
    type: Literal["NewCluster", "NewClusterWithIncrementalUpgrade", "None"]


class RayServiceSpec(_KubeRay):
    serve_config_v2: str = Field(alias="serveConfigV2")
    ray_cluster_config: RayClusterSpec
    upgrade_strategy: UpgradeStrategy | None = None
    serve_service: dict[str, Any] | None = None
    exclude_head_pod_from_serve_svc: bool | None = None
    ray_cluster_deletion_delay_seconds: NonNegativeInt | None = None


class SubmitterConfig(_KubeRay):
    backoff_limit: NonNegativeInt


class RayJobSpec(_KubeRay):
    entrypoint: str
    ray_cluster_spec: RayClusterSpec
    submission_mode: Literal["K8sJobMode", "HTTPMode"] = "K8sJobMode"
    submitter_config: SubmitterConfig | None = None
    submitter_pod_template: PodTemplate | None = None
    shutdown_after_job_finishes: bool = False
    ttl_seconds_after_finished: NonNegativeInt = 0
    active_deadline_seconds: PositiveInt | None = None
    backoff_limit: NonNegativeInt = 0
    entrypoint_num_cpus: float | None = None
    entrypoint_num_gpus: float | None = None
    runtime_env_yaml: str | None = Field(None, alias="runtimeEnvYAML")


def read_ray_service(document: Mapping[str, Any]) -> RayServiceSpec:
    """The specification of a ``RayService``.

    Raises:
        ValueError: a field is missing, unknown or wrong.
    """
    return _spec(RayServiceSpec, document)


def read_ray_job(document: Mapping[str, Any]) -> RayJobSpec:
    """The specification of a ``RayJob``.

    Raises:
        ValueError: a field is missing, unknown or wrong.
    """
    return _spec(RayJobSpec, document)


def require_object(document: Mapping[str, Any]) -> None:
    """Refuse what is no Kubernetes object.

    Raises:
        ValueError: names what it lacks.
    """
    metadata = document.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    for field, value in {
        "apiVersion": document.get("apiVersion"),
        "kind": document.get("kind"),
        "metadata.name": name,
    }.items():
        if not isinstance(value, str) or not value:
            raise ValueError(f"{field}: a Kubernetes object has one, got {value!r}")


S = TypeVar("S", RayServiceSpec, RayJobSpec)


def _spec(kind: type[S], document: Mapping[str, Any]) -> S:
    require_object(document)
    if document["apiVersion"] != API_VERSION:
        raise ValueError(f"apiVersion: {document['apiVersion']!r} is not {API_VERSION}; write that")
    try:
        return kind.model_validate(document.get("spec") or {})
    except ValidationError as error:
        raise ValueError("; ".join(map(_in_words, error.errors()))) from None


def _in_words(error: Mapping[str, Any]) -> str:
    path = ".".join(map(str, ("spec", *error["loc"])))
    if error["type"] == "extra_forbidden":
        return f"{path}: KubeRay knows no such field; correct its name or leave it out"
    if error["type"] == "missing":
        return f"{path}: is missing"
    return f"{path}: {error['msg'][:1].lower()}{error['msg'][1:]}, got {error['input']!r}"


def _group(name: str, template: PodTemplate, least: int, most: int) -> NodeGroup:
    count = template.num_gpus
    gpu = selected_gpu(template.spec.node_selector) if count else None
    return NodeGroup(name, count, gpu, least, most)
