"""The Serve application: HTTP deployment in front, a deployment of engines for each model behind.

Separate deployments, because they scale differently and must not disturb each other: an engine
process steps, an ingress process parses, streams and waits.
"""

# No ``from __future__ import annotations``: Serve wants a class in ``build``'s signature.

import asyncio
import contextlib
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import ray
from fastapi import FastAPI
from prometheus_client import Metric
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.handle import DeploymentHandle

from focus_ray.batch.storage import Folder
from focus_ray.cluster.engine_start import start_engine
from focus_ray.cluster.placement import placement
from focus_ray.config import EngineConfig
from focus_ray.openai.text_engine import EngineFactory
from focus_ray.serve.args import ServeArgs
from focus_ray.serve.autoscaling import OccupancyPolicy
from focus_ray.serve.batch_runner import BatchRunner
from focus_ray.serve.handover import HandoverClient
from focus_ray.serve.ingress import IngressSettings, create_app
from focus_ray.serve.logs import log_through_serve
from focus_ray.serve.model_args import AutoscalingArgs, ModelArgs
from focus_ray.serve.overload import OverloadGuard
from focus_ray.serve.placing import Placed, place
from focus_ray.serve.ray_client import RayEngineClient, metrics_of
from focus_ray.serve.replica import Replica
from focus_ray.serve.router import router_config
from focus_ray.serve.serve_settings import replica_settings
from focus_ray.serve.served_models import ServedModel, ServedModels

APP_NAME = "focus-ray"
# Calls besides generation that a full engine must still answer: tokenize, models.
SPARE_CALLS = 64
# Requests that an ingress is about to refuse. More of them would wait at Serve's proxy, which knows
# no limit, and with them /health.
MAX_REFUSING = 4096
# The engine answers between two steps, and one step of a large prefill on a CPU takes seconds.
LIVENESS_TIMEOUT_S = 30.0
# Ray's own 10 s would let the autoscaler see occupancies of that age.
PUSH_INTERVAL = {"RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1"}


class EngineDeployment(Replica):
    """``Replica`` with the hooks that Serve calls."""

    def __init__(
        self, config: EngineConfig, model_name: str, engine_factory: EngineFactory
    ) -> None:
        log_through_serve(os.environ)
        replica_name = serve.get_replica_context().replica_id.unique_id
        super().__init__(config, model_name, replica_name, engine_factory)

    async def check_health(self) -> None:
        """Serve replaces this replica when it raises."""
        await self.check_alive(LIVENESS_TIMEOUT_S)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # the engine never started
            self.shutdown()


@serve.ingress()
class IngressDeployment:
    """The routes, with the handles of the engines behind them."""

    def __init__(
        self,
        names: Sequence[tuple[str, ...]],
        engines: Sequence[DeploymentHandle[Any]],
        places_per_engine: Sequence[int],
        settings: IngressSettings,
        batches: DeploymentHandle[Any] | None = None,
    ) -> None:
        log_through_serve(os.environ)
        self._batches = batches
        self._models = list(zip(names, engines, places_per_engine, strict=True))
        self._settings = settings
        self._name = serve.get_replica_context().replica_id.unique_id

    def __serve_build_asgi_app__(self) -> FastAPI:
        more_metrics = () if self._batches is None else (partial(metrics_of, self._batches),)
        models = [self._served(*model) for model in self._models]
        return create_app(models, self._settings, more_metrics)

    def _served(
        self, names: tuple[str, ...], engines: DeploymentHandle[Any], places_per_engine: int
    ) -> ServedModel:
        client = HandoverClient(RayEngineClient(engines), self._settings.max_handovers)
        return ServedModel(names, OverloadGuard(client, places_per_engine, names[0], self._name))


class BatchDeployment:
    """Runs batches, beside the ingress; it holds nothing that is not in storage."""

    def __init__(
        self,
        names: Sequence[tuple[str, ...]],
        engines: Sequence[DeploymentHandle[Any]],
        folder: str,
        places_per_engine: int,
        max_handovers: int,
    ) -> None:
        log_through_serve(os.environ)
        models = [
            ServedModel(each, HandoverClient(RayEngineClient(handle), max_handovers))
            for each, handle in zip(names, engines, strict=True)
        ]
        self._runner = BatchRunner(Folder(folder), ServedModels(models), places_per_engine)
        self._task = asyncio.get_event_loop().create_task(self._runner.run())

    async def metrics(self) -> list[Metric]:
        """Families for Prometheus."""
        return self._runner.metrics()

    async def check_health(self) -> None:
        """Serve replaces this replica when it raises."""
        if self._task.done():
            self._task.result()


def build(args: ServeArgs) -> serve.Application:
    """The application. Runs where Ray is connected: it asks for the cluster's resources."""
    return build_with(args, start_engine)


def build_with(args: ServeArgs, engine_factory: EngineFactory) -> serve.Application:
    """``build`` with another engine."""
    cluster = ray.cluster_resources()  # type: ignore[no-untyped-call]
    engines = [
        _engines(name, placed, engine_factory)
        for name, placed in zip(args.deployments, place(args.served, cluster), strict=True)
    ]
    ingress = serve.deployment(
        name="ingress",
        num_replicas=args.num_ingresses,
        max_ongoing_requests=MAX_REFUSING
        + sum(_capacity(each) * each.max_engines for each in args.served),
        ray_actor_options=_actor_options({"num_cpus": 0}),
        # It takes no room to speak of, so new ones serve before old ones finish and go.
        max_surge_percent=100,
        graceful_shutdown_timeout_s=args.ingress_drain_timeout_s,
    )(IngressDeployment)
    names = [model.names for model in args.served]
    places = [_places(model) for model in args.served]
    settings = args.settings(os.environ)
    if args.batch_storage is None:
        return ingress.bind(names, engines, places, settings)
    batches = serve.deployment(
        name="batches",
        num_replicas=1,
        ray_actor_options=_actor_options({"num_cpus": 0}),
        max_surge_percent=0,
    )(BatchDeployment)
    share = max(1, int(args.batch_share * min(each.engine.max_num_seqs for each in args.served)))
    runner = batches.bind(names, engines, args.batch_storage, share, args.max_handovers)
    return ingress.bind(names, engines, places, settings, runner)


def _engines(name: str, placed: Placed, engine_factory: EngineFactory) -> serve.Application:
    model, resources = placed.model, placed.resources
    capacity = _capacity(model)
    if model.autoscaling is None:
        replicas: dict[str, Any] = {"num_replicas": model.num_replicas}
        actor_options = _actor_options(resources)
    else:
        replicas = {"autoscaling_config": _autoscaling(model.autoscaling)}
        actor_options = _actor_options(resources, PUSH_INTERVAL)
    deployment = serve.deployment(
        name=name,
        max_ongoing_requests=capacity,
        max_queued_requests=capacity,
        request_router_config=router_config(model.router),
        max_constructor_retry_count=model.max_start_attempts,
        ray_actor_options=actor_options,
        max_surge_percent=model.max_surge_percent,
        graceful_shutdown_timeout_s=model.drain_timeout_s,
        health_check_period_s=1.0,
        health_check_timeout_s=LIVENESS_TIMEOUT_S + 5.0,
        **replicas,
        **placement(placed.config.tensor_parallel_size, resources),
    )(EngineDeployment)
    return deployment.bind(placed.config, model.names[0], engine_factory)


def _actor_options(
    resources: Mapping[str, float], environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Of a deployment's processes: what Ray reserves for each, and what Serve is told in it."""
    variables = {**replica_settings(os.environ), **(environment or {})}
    return {**resources, "runtime_env": {"env_vars": variables}} if variables else {**resources}


def _capacity(model: ModelArgs) -> int:
    """Calls to one engine. Its own queue decides who waits and who is refused, so Serve's must be
    longer.
    """
    return _places(model) + SPARE_CALLS


def _places(model: ModelArgs) -> int:
    """Sequences that run or wait at one engine."""
    return model.engine.max_num_seqs + model.engine.max_num_waiting


def _autoscaling(args: AutoscalingArgs) -> AutoscalingConfig:
    return AutoscalingConfig(
        min_replicas=args.min_replicas,
        max_replicas=args.max_replicas,
        upscale_delay_s=args.upscale_delay_s,
        downscale_delay_s=args.downscale_delay_s,
        look_back_period_s=args.look_back_s,
        policy=AutoscalingPolicy(  # type: ignore[no-untyped-call]
            policy_function=f"{OccupancyPolicy.__module__}:{OccupancyPolicy.__name__}",
            policy_kwargs={"target_occupancy": args.target_occupancy},
        ),
    )
