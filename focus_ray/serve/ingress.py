"""The routes. Knows HTTP and the client interface of engines; knows neither Ray nor tensors."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, Metric
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt

from focus_ray import __version__
from focus_ray.batch.storage import Folder
from focus_ray.openai.error_kinds import NoBatchApi, Unauthorized
from focus_ray.openai.protocol import (
    BatchCreateRequest,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from focus_ray.openai.replies import (
    ChatCompletion,
    Completion,
    DetokenizeReply,
    Model,
    ModelList,
    TokenizeReply,
    VersionReply,
    now,
)
from focus_ray.openai.strict import StrictModel
from focus_ray.openai.tasks import chat_task, completion_task
from focus_ray.serve import http_errors
from focus_ray.serve.answering import answer
from focus_ray.serve.api_keys import hash_of, is_accepted
from focus_ray.serve.batches import BatchRoutes
from focus_ray.serve.bodies import add_schemas, describe_body, describe_errors, read_body
from focus_ray.serve.cluster_view import ClusterView, ModelView, view_of
from focus_ray.serve.metrics import as_text, merge_families
from focus_ray.serve.request_record import AccessLog, new_id
from focus_ray.serve.served_models import ServedModel, ServedModels

AsksMetrics = Callable[[], Awaitable[list[Metric]]]
# Requests that bring the same one belong together.
SESSION_HEADER = "X-Session-Id"
CHAT_EXAMPLE = {"messages": [{"role": "user", "content": "What is 17 + 25?"}], "max_tokens": 128}
COMPLETION_EXAMPLE = {"prompt": "17 + 25 =", "max_tokens": 32}
BATCH_EXAMPLE = {
    "input_file_id": "file-0123456789abcdef01234567",
    "endpoint": "/v1/chat/completions",
    "completion_window": "24h",
}
# What a route says to OpenAPI about a form that it reads by itself.
UPLOAD: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["batch"]},
                    },
                }
            }
        },
    }
}


class IngressSettings(BaseModel):
    """What the HTTP side needs to know besides its models."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    api_key_hashes: tuple[str, ...] = Field(
        (), description="SHA-256 of the keys of which requests must bring one; none: open to all."
    )
    max_body_bytes: PositiveInt = Field(16 * 2**20, description="Longest request body.")
    max_handovers: NonNegativeInt = Field(
        3,
        description="How often a request whose engine dies is continued by another one; 0: never.",
    )
    health_timeout_s: PositiveFloat = Field(10.0, description="Wait for an engine's answer.")
    batch_storage: str | None = Field(
        None, description="Folder or URL of batches; None: no batches."
    )
    max_batch_file_bytes: PositiveInt = Field(200 * 2**20, description="Longest uploaded file.")


class Ingress:
    """Route handlers over the served models.

    Args:
        models: at least one, with names of its own.
        settings: the HTTP side's own.
        more_metrics: what has metric families besides the models.
    """

    def __init__(
        self,
        models: Sequence[ServedModel],
        settings: IngressSettings,
        more_metrics: Sequence[AsksMetrics],
    ) -> None:
        self._models = ServedModels(models)
        self._settings = settings
        self._more_metrics = more_metrics
        self._started = now()

    async def chat_completions(self, request: Request) -> Response:
        """Answer a conversation."""
        body = await read_body(request, ChatCompletionRequest, self._settings.max_body_bytes)
        name, model = self._models.find(body.model)
        task = chat_task(body, new_id(request), name, request.headers.get(SESSION_HEADER))
        return await answer(request, model.client, task)

    async def completions(self, request: Request) -> Response:
        """Continue one or more prompts."""
        body = await read_body(request, CompletionRequest, self._settings.max_body_bytes)
        name, model = self._models.find(body.model)
        task = completion_task(body, new_id(request), name, request.headers.get(SESSION_HEADER))
        return await answer(request, model.client, task)

    async def tokenize(self, request: Request) -> TokenizeReply:
        """Token ids of a text or a conversation."""
        body = await read_body(request, TokenizeRequest, self._settings.max_body_bytes)
        _, model = self._models.find(body.model)
        encoded = await model.client.encode(body.to_prompt(), bool(body.return_token_strs))
        return TokenizeReply(
            count=len(encoded.token_ids),
            max_model_len=(await model.describe()).max_model_len,
            tokens=list(encoded.token_ids),
            token_strs=None if encoded.texts is None else list(encoded.texts),
        )

    async def detokenize(self, request: Request) -> DetokenizeReply:
        """Text of token ids."""
        body = await read_body(request, DetokenizeRequest, self._settings.max_body_bytes)
        _, model = self._models.find(body.model)
        return DetokenizeReply(prompt=await model.client.decode(body.tokens))

    async def models(self) -> ModelList:
        """The served models, under each of their names; those that do not answer are left out."""
        models = await self._models.answering(self._settings.health_timeout_s)
        return ModelList(
            object="list",
            data=[await self._model(name, model) for model in models for name in model.names],
        )

    async def model(self, model_id: str) -> Model:
        """One served model."""
        return await self._model(*self._models.find(model_id))

    async def health(self) -> Response:
        """200 if an engine of any model answers; it is really asked."""
        await self._models.check_alive(self._settings.health_timeout_s)
        return Response()

    async def metrics(self) -> Response:
        """Prometheus metrics of all engines, and of what else there is."""
        timeout_s = self._settings.health_timeout_s
        asked = asyncio.gather(
            *(model.client.metrics() for model in self._models),
            *(ask() for ask in self._more_metrics),
        )
        families = merge_families(await asyncio.wait_for(asked, timeout_s))
        return Response(as_text(families), media_type=CONTENT_TYPE_LATEST)

    async def cluster(self) -> ClusterView:
        """Each model's replicas, what they hold and what their GPUs do."""
        asked = asyncio.gather(*map(self._view, self._models))
        return ClusterView(models=await asyncio.wait_for(asked, self._settings.health_timeout_s))

    async def version(self) -> VersionReply:
        """Version of this server."""
        return VersionReply(version=__version__)

    async def check_key(
        self,
        sent: Annotated[
            HTTPAuthorizationCredentials | None, Security(HTTPBearer(auto_error=False))
        ],
    ) -> None:
        """Refuse requests without a key, where there are any."""
        hashes = self._settings.api_key_hashes
        if hashes and not is_accepted(sent.credentials if sent else "", hashes):
            raise Unauthorized("send one of the server's API keys: 'Authorization: Bearer KEY'")

    async def _view(self, model: ServedModel) -> ModelView:
        states, families = await asyncio.gather(model.client.states(), model.client.metrics())
        return view_of(model.names[0], states, families)

    async def _model(self, name: str, model: ServedModel) -> Model:
        return Model(
            id=name,
            object="model",
            created=self._started,
            owned_by="focus-ray",
            max_model_len=(await model.describe()).max_model_len,
        )

    def owner_of(self, request: Request) -> str | None:
        """Whose files and batches a request may see: those of its key, where there are keys."""
        if not self._settings.api_key_hashes:
            return None
        return hash_of(request.headers.get("authorization", "").partition(" ")[2])


def create_app(
    models: Sequence[ServedModel],
    settings: IngressSettings,
    more_metrics: Sequence[AsksMetrics] = (),
) -> FastAPI:
    """The ASGI application over the served models; arguments as of ``Ingress``."""
    ingress = Ingress(models, settings, more_metrics)
    app = FastAPI(title="focus-ray", version=__version__)
    app.add_middleware(AccessLog)
    http_errors.install(app)
    app.include_router(_guarded(ingress))
    app.include_router(_open(ingress))
    bodies: list[type[StrictModel]] = [
        ChatCompletionRequest,
        CompletionRequest,
        TokenizeRequest,
        DetokenizeRequest,
    ]
    if settings.batch_storage is not None:
        batches = BatchRoutes(
            Folder(settings.batch_storage),
            ingress.owner_of,
            settings.max_batch_file_bytes,
            settings.max_body_bytes,
        )
        app.include_router(_batches(ingress, batches))
        bodies.append(BatchCreateRequest)
    else:
        app.include_router(_no_batches(ingress))
    add_schemas(app, *bodies)
    return app


def _guarded(ingress: Ingress) -> APIRouter:
    router = APIRouter(dependencies=[Depends(ingress.check_key)])
    refusals = describe_errors(400, 401, 404, 413, 415)
    events: dict[str, Any] = {"content": {"text/event-stream": {}}}
    generation: dict[str, Any] = {
        "methods": ["POST"],
        "responses": {200: events, **refusals, **describe_errors(429, 503)},
    }
    router.add_api_route(
        "/v1/chat/completions",
        ingress.chat_completions,
        response_model=ChatCompletion,
        openapi_extra=describe_body(ChatCompletionRequest, CHAT_EXAMPLE),
        **generation,
    )
    router.add_api_route(
        "/v1/completions",
        ingress.completions,
        response_model=Completion,
        openapi_extra=describe_body(CompletionRequest, COMPLETION_EXAMPLE),
        **generation,
    )
    router.add_api_route(
        "/tokenize",
        ingress.tokenize,
        methods=["POST"],
        responses=refusals,
        openapi_extra=describe_body(TokenizeRequest, {"prompt": "17 + 25 ="}),
    )
    router.add_api_route(
        "/detokenize",
        ingress.detokenize,
        methods=["POST"],
        responses=refusals,
        openapi_extra=describe_body(DetokenizeRequest, {"tokens": [1, 2, 3]}),
    )
    router.add_api_route("/v1/models", ingress.models, responses=describe_errors(401, 503))
    router.add_api_route(
        "/v1/models/{model_id:path}", ingress.model, responses=describe_errors(401, 404, 503)
    )
    return router


def _batches(ingress: Ingress, batches: BatchRoutes) -> APIRouter:
    refusals = describe_errors(400, 401, 404, 413)
    router = APIRouter(dependencies=[Depends(ingress.check_key)])
    for method, path, handler, extra in (
        ("POST", "/v1/files", batches.upload, UPLOAD),
        ("GET", "/v1/files", batches.files, None),
        ("GET", "/v1/files/{file_id}", batches.file, None),
        ("DELETE", "/v1/files/{file_id}", batches.delete, None),
        ("GET", "/v1/files/{file_id}/content", batches.content, None),
        ("POST", "/v1/batches", batches.create, describe_body(BatchCreateRequest, BATCH_EXAMPLE)),
        ("GET", "/v1/batches", batches.batches, None),
        ("GET", "/v1/batches/{batch_id}", batches.batch, None),
        ("POST", "/v1/batches/{batch_id}/cancel", batches.cancel, None),
    ):
        router.add_api_route(
            path, handler, methods=[method], responses=refusals, openapi_extra=extra
        )
    return router


def _no_batches(ingress: Ingress) -> APIRouter:
    """Says so, where clients would look for a mistake in their path."""

    async def refuse() -> None:
        raise NoBatchApi

    router = APIRouter(dependencies=[Depends(ingress.check_key)], include_in_schema=False)
    for path in ("/v1/files", "/v1/batches"):
        for each in (path, f"{path}/{{rest:path}}"):
            router.add_api_route(each, refuse, methods=["GET", "POST", "DELETE"])
    return router


def _open(ingress: Ingress) -> APIRouter:
    """What probes and scrapers ask, which seldom hold a key."""
    router = APIRouter()
    router.add_api_route("/health", ingress.health, responses=describe_errors(503))
    router.add_api_route("/metrics", ingress.metrics)
    router.add_api_route("/cluster", ingress.cluster, responses=describe_errors(503))
    router.add_api_route("/version", ingress.version)
    return router
