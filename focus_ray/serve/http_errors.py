"""Which error becomes which HTTP reply: one table, and the OpenAI error body around it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from focus_ray.errors import EngineDead, EngineOverloaded, RequestRejected
from focus_ray.serve.replies import ErrorBody, ErrorReply
from focus_ray.serve.request_record import CLIENT_CLOSED_REQUEST, record_of
from focus_ray.serve.strict import shortened


class ModelNotFound(RequestRejected):
    """The request names a model that is not served here."""

    def __init__(self, name: str, served: tuple[str, ...]) -> None:
        super().__init__(
            f"The model {shortened(name)!r} does not exist; this server has {', '.join(served)}",
            "model",
        )


class BodyTooLarge(RequestRejected):
    """The request body is longer than this server reads."""


class UnsupportedMediaType(RequestRejected):
    """The request body is not declared as JSON."""


class Unauthorized(RequestRejected):
    """The bearer token is missing or wrong."""


@dataclass(frozen=True)
class ErrorKind:
    """How one kind of error looks to a client."""

    status: int
    type: str
    code: str | None


# The first class an error is an instance of decides.
TABLE: dict[type[Exception], ErrorKind] = {
    ModelNotFound: ErrorKind(404, "invalid_request_error", "model_not_found"),
    BodyTooLarge: ErrorKind(413, "invalid_request_error", "body_too_large"),
    UnsupportedMediaType: ErrorKind(415, "invalid_request_error", "unsupported_media_type"),
    Unauthorized: ErrorKind(401, "authentication_error", "invalid_api_key"),
    RequestRejected: ErrorKind(400, "invalid_request_error", "invalid_value"),
    EngineOverloaded: ErrorKind(429, "overloaded_error", "engine_overloaded"),
    EngineDead: ErrorKind(503, "server_error", "engine_dead"),
    Exception: ErrorKind(500, "server_error", "internal_error"),
}
# How long clients wait for an engine that died: about what a replica's replacement takes.
RESTART_RETRY_AFTER_S = 10.0


def kind_of(error: Exception) -> ErrorKind:
    """The table's answer."""
    return next(kind for cls, kind in TABLE.items() if isinstance(error, cls))


def body_of(error: Exception) -> ErrorReply:
    """The OpenAI error body; says nothing about the inside of an unforeseen error."""
    kind = kind_of(error)
    foreseen = kind.status != 500
    return ErrorReply(
        error=ErrorBody(
            message=str(error) if foreseen else "internal error; the server's log has the details",
            type=kind.type,
            param=getattr(error, "param", None),
            code=kind.code,
        )
    )


def response_of(error: Exception) -> Response:
    """The whole reply: status, headers, body."""
    headers = {}
    if isinstance(error, EngineOverloaded):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    elif isinstance(error, EngineDead):
        headers["Retry-After"] = str(math.ceil(RESTART_RETRY_AFTER_S))
    elif isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body_of(error).model_dump(), kind_of(error).status, headers)


def install(app: FastAPI) -> None:
    """Make every route of ``app``, known or not, answer errors in OpenAI's shape."""

    async def on_error(request: Request, error: Exception) -> Response:
        record_of(request).error = kind_of(error).code
        return response_of(error)

    async def on_disconnect(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)  # nobody reads it

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = f"{request.method} {request.url.path}"
        messages = {
            404: f"{what}: no such route; /docs lists them",
            405: f"{what}: this route has another method; /docs lists them",
        }
        reply = ErrorReply(
            error=ErrorBody(
                message=messages.get(error.status_code, str(error.detail)),
                type="invalid_request_error",
                param=None,
                code={404: "not_found", 405: "method_not_allowed"}.get(error.status_code),
            )
        )
        return JSONResponse(reply.model_dump(), error.status_code, error.headers)

    for kind in TABLE:
        app.add_exception_handler(kind, on_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(ClientDisconnect, on_disconnect)
