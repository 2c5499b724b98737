"""Which error is what to a client: one table, and the OpenAI error body around it."""

from __future__ import annotations

from dataclasses import dataclass

from focus_ray.errors import EngineDead, EngineOverloaded, RequestRejected
from focus_ray.openai.replies import ErrorBody, ErrorReply
from focus_ray.openai.strict import shortened


class ModelNotFound(RequestRejected):
    """The request names a model that is not served here."""

    def __init__(self, name: str, served: tuple[str, ...]) -> None:
        super().__init__(
            f"The model {shortened(name)!r} does not exist; this server has {', '.join(served)}",
            "model",
        )


class NoSuchObject(RequestRejected):
    """There is no file or batch of this id, or it belongs to somebody else."""

    def __init__(self, kind: str, object_id: str) -> None:
        super().__init__(f"No such {kind}: {shortened(object_id)!r}", "id")


class NoBatchApi(RequestRejected):
    """This server keeps no files and runs no batches."""

    def __init__(self) -> None:
        super().__init__(
            "This server has no Batch API; its batch_storage turns it on: an URL, or a folder that "
            "all of its machines see"
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
    NoSuchObject: ErrorKind(404, "invalid_request_error", "not_found"),
    NoBatchApi: ErrorKind(404, "invalid_request_error", "no_batch_api"),
    BodyTooLarge: ErrorKind(413, "invalid_request_error", "body_too_large"),
    UnsupportedMediaType: ErrorKind(415, "invalid_request_error", "unsupported_media_type"),
    Unauthorized: ErrorKind(401, "authentication_error", "invalid_api_key"),
    RequestRejected: ErrorKind(400, "invalid_request_error", "invalid_value"),
    EngineOverloaded: ErrorKind(429, "overloaded_error", "engine_overloaded"),
    EngineDead: ErrorKind(503, "server_error", "engine_dead"),
    Exception: ErrorKind(500, "server_error", "internal_error"),
}


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
