"""Where ``chat`` and ``generate`` get their text: an engine in this process, or a server."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPException
from typing import TYPE_CHECKING, Any, Protocol, Self
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from focus_ray.config import EngineConfig
from focus_ray.errors import FocusRayError
from focus_ray.sampling import SamplingParams

if TYPE_CHECKING:
    from http.client import HTTPResponse

    from focus_ray.openai.messages import Chunk
    from focus_ray.openai.text_engine import EngineFactory

Conversation = list[dict[str, str]]


class ServerError(FocusRayError):
    """A server refused, failed or could not be reached."""


@dataclass(frozen=True)
class Piece:
    """New text; the last piece of an answer says how it ended and what it took."""

    text: str
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None


Pieces = Generator[Piece, None, None]


class Backend(Protocol):
    """Answers prompts. Closing an iterator early aborts its request."""

    def answer(self, prompt: str | Conversation, params: SamplingParams) -> Pieces:
        """Answer a conversation, or continue a text."""
        ...


class EngineBackend:
    """An engine in this process; a context manager that stops it.

    Args:
        config: the engine's.
        engine_factory: another engine than the real one.

    Raises:
        CheckpointError: the model cannot be loaded.
        ValueError: the configuration does not fit the model or the machine.
    """

    def __init__(self, config: EngineConfig, engine_factory: EngineFactory | None = None) -> None:
        from focus_ray.cluster.engine_start import start_engine
        from focus_ray.openai.text_engine import TextEngine

        self._engine = (engine_factory or start_engine)(config)
        self._text = TextEngine(self._engine)
        self._runner = asyncio.Runner()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.close()
        self._engine.shutdown()

    def answer(
        self, prompt: str | Conversation, params: SamplingParams
    ) -> Generator[Piece, None, None]:
        from focus_ray.openai.messages import ChatPrompt, Submission, TextPrompt

        asked = TextPrompt(prompt) if isinstance(prompt, str) else ChatPrompt(tuple(prompt))
        chunks = self._text.generate(Submission(uuid.uuid4().hex, asked, params))
        tokens = 0
        try:
            while (chunk := self._runner.run(_next(chunks))) is not None:
                tokens += len(chunk.token_ids)
                yield Piece(chunk.text, chunk.finish_reason, _usage(chunk, tokens))
        finally:
            self._runner.run(chunks.aclose())


class HttpBackend:
    """A server with an OpenAI-compatible API.

    Args:
        url: with or without the final ``/v1``.
        model: name to ask for; None: the server's only one.
        api_key: bearer token.
    """

    def __init__(self, url: str, model: str | None, api_key: str | None) -> None:
        self._url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._model = model
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def answer(
        self, prompt: str | Conversation, params: SamplingParams
    ) -> Generator[Piece, None, None]:
        is_text = isinstance(prompt, str)
        body = params.model_dump(mode="json", exclude_unset=True, exclude_none=True)
        if is_text:
            body |= {"prompt": prompt, "max_tokens": params.max_tokens}
        else:
            body["messages"] = prompt
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        if self._model:
            body["model"] = self._model
        finish_reason = None
        with closing(self._post("/completions" if is_text else "/chat/completions", body)) as reply:
            for event in _events(reply):
                if "error" in event:
                    raise ServerError(event["error"]["message"])
                for choice in event.get("choices", ()):
                    part = choice if is_text else choice.get("delta", {})
                    text = part.get("text" if is_text else "content")
                    finish_reason = choice.get("finish_reason") or finish_reason
                    yield Piece(text or "")
                if event.get("usage"):
                    yield Piece("", finish_reason, event["usage"])

    def _post(self, path: str, body: dict[str, Any]) -> HTTPResponse:
        request = Request(self._url + path, json.dumps(body).encode(), self._headers)
        try:
            reply: HTTPResponse = urlopen(request)
        except HTTPError as error:
            raise ServerError(f"{self._url + path}: {_reason(error)}") from None
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise ServerError(f"cannot reach {self._url}: {reason}") from None
        return reply


async def _next(chunks: AsyncGenerator[Chunk, None]) -> Chunk | None:
    return await anext(chunks, None)


def _usage(chunk: Chunk, tokens: int) -> dict[str, Any] | None:
    if (stats := chunk.stats) is None:
        return None
    return {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": tokens,
        "denoising_steps": stats.denoising_steps,
    }


def _events(reply: HTTPResponse) -> Iterator[dict[str, Any]]:
    """The events of a stream, up to its last one.

    Raises:
        ServerError: the stream ends without that one, or is none.
    """
    try:
        for line in reply:
            name, _, data = line.partition(b":")
            if name != b"data":  # the line between two events, or a comment
                continue
            if data.strip() == b"[DONE]":
                return
            yield _event(data)
    except (OSError, HTTPException) as error:
        raise ServerError(f"the connection was lost in the middle of the answer: {error}") from None
    raise ServerError("the server's answer ends in the middle; ask again")


def _event(data: bytes) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except ValueError:
        event = None
    if not isinstance(event, dict):
        raise ServerError(f"the server sent an event that is no JSON object: {data[:80]!r}")
    return event


def _reason(error: HTTPError) -> str:
    try:
        message: str = json.loads(error.read())["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"{error.code} {error.reason}"
    return message
