"""Errors as HTTP replies."""

from __future__ import annotations

import math

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from focus_ray.errors import EngineDead, EngineOverloaded, RequestRejected
from focus_ray.openai.error_kinds import TABLE, Unauthorized, body_of, kind_of
from focus_ray.openai.replies import ErrorBody, ErrorReply
from focus_ray.openai.strict import shortened
from focus_ray.serve.request_record import CLIENT_CLOSED_REQUEST, record_of

# How long clients wait for an engine that died: about what a replica's replacement takes.
RESTART_RETRY_AFTER_S = 10.0


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

    async def on_bad_query(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        name = str(first["loc"][-1])
        message = f"{name}: {first['msg'].lower()}, got {shortened(repr(first['input']))}"
        return await on_error(request, RequestRejected(message, name))

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
    app.add_exception_handler(RequestValidationError, on_bad_query)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(ClientDisconnect, on_disconnect)
