"""What the ingress knows of an HTTP request at its end, and the one line of the log that says it.

Never in it: prompts, answers, keys. The line is one record of the logger ``focus_ray.access``; in
JSON its facts are fields of their own.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
import uuid
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from focus_ray.openai.messages import Chunk

logger = logging.getLogger("focus_ray.access")

REQUEST_ID_HEADER = "x-request-id"
MAX_ID_CHARS = 128
# Asked again and again by probes and scrapers; what they do is no news.
PROBES = frozenset({"/health", "/metrics", "/cluster", "/version"})
# nginx's status for a client that left before its answer; nobody reads it.
CLIENT_CLOSED_REQUEST = 499
_KEY = "focus_ray.record"


@dataclass
class RequestRecord:
    """One request.

    Args:
        request_id: the client's ``X-Request-Id``, or one that was made up.
        started_s: when it came, by the monotonic clock.
    """

    request_id: str
    method: str
    path: str
    started_s: float
    status: int = CLIENT_CLOSED_REQUEST
    model: str | None = None
    error: str | None = None
    finish_reasons: list[str] = field(default_factory=list)
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    queue_s: float | None = None
    first_token_s: float | None = None
    num_handovers: int = 0

    def take(self, chunk: Chunk, now_s: float) -> None:
        """The next chunk of one of its completions."""
        if self.first_token_s is None and chunk.token_ids:
            self.first_token_s = now_s - self.started_s
        if chunk.finish_reason is not None:
            self.finish_reasons.append(chunk.finish_reason)
        if chunk.stats is not None:
            self.queue_s = max(self.queue_s or 0.0, chunk.stats.queue_s)
        self.num_handovers = max(self.num_handovers, chunk.num_handovers)

    def facts(self, now_s: float) -> dict[str, object]:
        """By name, what is known; times are seconds."""
        known = {
            "status": self.status,
            "model": self.model,
            "error": self.error,
            "finish_reason": ",".join(sorted(set(self.finish_reasons))) or None,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "queue_s": self.queue_s,
            "first_token_s": self.first_token_s,
            "total_s": now_s - self.started_s,
            "handovers": self.num_handovers or None,
        }
        return {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in known.items()
            if value is not None
        }


def record_of(request: Request) -> RequestRecord:
    """The record of a request that came through ``AccessLog``."""
    record: RequestRecord = request.scope[_KEY]
    return record


def new_id(request: Request) -> str:
    """An id for what the request asks of engines.

    Its client may give two requests one id, engines may not have two requests of one.
    """
    return f"{record_of(request).request_id}-{secrets.token_hex(4)}"


class AccessLog:
    """ASGI middleware that keeps a record of each HTTP request and logs it at its end."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(
            _request_id(Headers(scope=scope)), scope["method"], scope["path"], time.monotonic()
        )
        scope[_KEY] = record
        is_whole = False

        async def note(message: Message) -> None:
            nonlocal is_whole
            if message["type"] == "http.response.start":
                record.status = message["status"]
            await send(message)
            is_whole = message["type"] == "http.response.body" and not message.get("more_body")

        try:
            await self._app(scope, receive, note)
        except Exception:
            # The layer outside of this one answers, and the server logs the traceback.
            record.status, record.error, is_whole = 500, "internal_error", True
            raise
        finally:
            if not is_whole:
                record.error = record.error or "client_left"
            _log(record)


def _request_id(headers: Headers) -> str:
    """What the client calls its request, printable and short; Ray Serve sends it back as it is."""
    sent = headers.get(REQUEST_ID_HEADER)
    return re.sub(r"[^!-~]", "?", sent)[:MAX_ID_CHARS] if sent else str(uuid.uuid4())


def _log(record: RequestRecord) -> None:
    facts = record.facts(time.monotonic())
    words = " ".join(f"{name}={value}" for name, value in facts.items())
    logger.log(
        logging.DEBUG if record.path in PROBES else logging.INFO,
        "%s %s %s",
        record.method,
        record.path,
        words,
        extra={
            "request_id": record.request_id,
            "http_method": record.method,
            "endpoint": record.path,
            **facts,
        },
    )
