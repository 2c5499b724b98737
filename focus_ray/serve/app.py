"""The Serve application: an HTTP deployment in front of a deployment of engines.

Two deployments, because they scale differently and must not disturb each other: an engine process
steps, the ingress process parses, streams and waits.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from focus_ray.cluster.placement import placement
from focus_ray.config import EngineConfig
from focus_ray.serve.args import ServeArgs
from focus_ray.serve.handover import HandoverClient
from focus_ray.serve.ingress import IngressSettings, create_app
from focus_ray.serve.logs import log_through_serve
from focus_ray.serve.overload import OverloadGuard
from focus_ray.serve.ray_client import RayEngineClient
from focus_ray.serve.replica import EngineFactory, Replica, start_engine
from focus_ray.serve.router import router_config

APP_NAME = "focus-ray"
ENGINE_DEPLOYMENT = "engine"
# Calls besides generation that a full engine must still answer: tokenize, models.
SPARE_CALLS = 64
# Requests that an ingress is about to refuse. More of them would wait at Serve's proxy, which knows
# no limit, and with them /health.
MAX_REFUSING = 4096
# The engine answers between two steps, and one step of a large prefill on a CPU takes seconds.
LIVENESS_TIMEOUT_S = 30.0


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
    """The routes, with the handle of the engines behind them."""

    def __init__(
        self, engines: DeploymentHandle[Any], settings: IngressSettings, places_per_engine: int
    ) -> None:
        log_through_serve(os.environ)
        self._engines = engines
        self._settings = settings
        self._places_per_engine = places_per_engine
        self._name = serve.get_replica_context().replica_id.unique_id

    def __serve_build_asgi_app__(self) -> FastAPI:
        settings = self._settings
        client = HandoverClient(RayEngineClient(self._engines), settings.max_handovers)
        model_name = settings.served_model_names[0]
        guard = OverloadGuard(client, self._places_per_engine, model_name, self._name)
        return create_app(guard, settings)


def build(args: ServeArgs) -> serve.Application:
    """The application. Runs where Ray is connected: it asks for the cluster's resources."""
    return build_with(args, start_engine)


def build_with(args: ServeArgs, engine_factory: EngineFactory) -> serve.Application:
    """``build`` with another engine."""
    config, resources = placed(args, ray.cluster_resources())  # type: ignore[no-untyped-call]
    # The engine's own queue decides who waits and who is refused, so Serve's must be longer.
    places = config.max_num_seqs + config.max_num_waiting
    capacity = places + SPARE_CALLS
    settings = args.settings()
    engines = serve.deployment(
        name=ENGINE_DEPLOYMENT,
        num_replicas=args.num_replicas,
        max_ongoing_requests=capacity,
        max_queued_requests=capacity,
        request_router_config=router_config(args.router),
        max_constructor_retry_count=args.max_start_attempts,
        ray_actor_options=resources,
        **placement(config.tensor_parallel_size, resources),
        health_check_period_s=1.0,
        health_check_timeout_s=LIVENESS_TIMEOUT_S + 5.0,
    )(EngineDeployment).bind(config, settings.served_model_names[0], engine_factory)
    ingress = serve.deployment(
        name="ingress",
        max_ongoing_requests=capacity * args.num_replicas + MAX_REFUSING,
        ray_actor_options={"num_cpus": 0},
    )(IngressDeployment)
    return ingress.bind(engines, settings, places)


def placed(args: ServeArgs, cluster: dict[str, float]) -> tuple[EngineConfig, dict[str, float]]:
    """The engine's device, decided, and the resources to reserve for each of its ranks.

    Ray gives a process as many OpenMP threads as it reserves cores, and one if it reserves none.

    Args:
        cluster: Ray's resources by name.
    """
    device = args.engine.device
    if device == "auto":
        wants_gpu = bool(cluster.get("GPU")) if args.num_gpus is None else args.num_gpus > 0
        device = "cuda" if wants_gpu else "cpu"
    num_gpus = args.num_gpus
    if num_gpus is None:
        num_gpus = 1.0 if device == "cuda" else 0.0
    num_cpus = args.num_cpus
    if num_cpus is None:
        num_ranks = args.num_replicas * args.engine.tensor_parallel_size
        share = int(cluster.get("CPU", 1.0)) // num_ranks
        num_cpus = 1.0 if device == "cuda" else float(max(1, share))
    config = args.engine.model_copy(update={"device": device})
    return config, {"num_cpus": num_cpus, "num_gpus": num_gpus}
