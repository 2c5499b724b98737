"""Request bodies: read within a limit, parsed strictly, described to OpenAPI."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.requests import Request

from focus_ray import __version__
from focus_ray.openai.error_kinds import BodyTooLarge, UnsupportedMediaType
from focus_ray.openai.replies import ErrorReply
from focus_ray.openai.strict import Body, StrictModel, parse_body

REF_TEMPLATE = "#/components/schemas/{model}"


async def read_body(request: Request, model: type[Body], max_bytes: int) -> Body:
    """Read and check the JSON body of a request.

    Raises:
        RequestRejected: it is too long, not declared as JSON, or not what ``model`` says.
    """
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    # A page in a browser can send other types to localhost without being asked for permission.
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise UnsupportedMediaType(
            f"Content-Type is {media_type or 'missing'!r}; send 'Content-Type: application/json'"
        )
    raw, length = bytearray(), 0
    async for piece in request.stream():
        length += len(piece)
        if length <= max_bytes:
            raw += piece
        elif length > 2 * max_bytes:  # so far a client may finish sending, and read our answer
            break
    if length > max_bytes:
        raise BodyTooLarge(
            f"The request body has more than {max_bytes} bytes, which is all this server reads; "
            "send less, or raise max_body_bytes"
        )
    return parse_body(model, bytes(raw))


def describe_body(model: type[StrictModel], example: dict[str, Any]) -> dict[str, Any]:
    """What a route says to OpenAPI about a body that it reads by itself."""
    content = {
        "schema": {"$ref": REF_TEMPLATE.format(model=model.__name__)},
        "example": example,
    }
    return {"requestBody": {"required": True, "content": {"application/json": content}}}


def describe_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The ``responses`` of a route that may fail."""
    return {status: {"model": ErrorReply, "description": "OpenAI error"} for status in statuses}


def add_schemas(app: FastAPI, *models: type[StrictModel]) -> None:
    """Put the request bodies' schemas into the app's OpenAPI document."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(
                title="focus-ray",
                version=__version__,
                summary="Block-diffusion language models behind an OpenAI-compatible API",
                routes=app.routes,
            )
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            for model in models:
                schema = model.model_json_schema(ref_template=REF_TEMPLATE)
                schemas.update(schema.pop("$defs", {}))
                schemas[model.__name__] = schema
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way
