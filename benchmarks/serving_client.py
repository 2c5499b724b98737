"""One request to an OpenAI-compatible endpoint, streamed, and what its client saw.

Tokens are counted by the server's own usage chunk. Knows nothing about when requests are sent.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

MAX_ERROR_CHARS = 200


class RequestFailed(Exception):
    """A request that did not bring a whole answer.

    Args:
        kind: by which failures are counted.
        message: the server's words, or ours.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass
class Sent:
    """One request as its client saw it. Times are seconds of the client's clock.

    Args:
        due_s: when it should have been sent: its arrival in an open loop, the moment a place
            became free in a closed one. Latencies count from here.
        sent_s: when it was sent.
        texts_s: when each event with text came.
        finished_s: when the answer was complete, or the failure known.
        error: kind of the failure; None where the answer is complete.
        usage: the server's counts.
    """

    due_s: float
    sent_s: float = 0.0
    texts_s: list[float] = field(default_factory=list)
    finished_s: float = 0.0
    error: str | None = None
    message: str = ""
    text: str = ""
    usage: Mapping[str, Any] = field(default_factory=dict)

    @property
    def output_tokens(self) -> int:
        return int(self.usage.get("completion_tokens", 0))


class Client:
    """Sends requests to one route.

    Args:
        session: without a limit of connections.
        url: of the route.
        headers: of every request.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        headers: Mapping[str, str],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._session = session
        self._url = url
        self._headers = dict(headers)
        self.clock = clock

    async def ask(self, body: Mapping[str, Any], due_s: float) -> Sent:
        """Send a body and read its stream to the end. A failure is an answer, too."""
        sent = Sent(due_s, self.clock())
        try:
            await self._read(body, sent)
        except RequestFailed as error:
            sent.error, sent.message = error.kind, str(error)
        except TimeoutError:
            sent.error = "timeout"
        except (aiohttp.ClientError, OSError) as error:
            sent.error, sent.message = type(error).__name__, str(error)
        sent.finished_s = self.clock()
        return sent

    async def _read(self, body: Mapping[str, Any], sent: Sent) -> None:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        async with self._session.post(
            self._url, json={**body, **options}, headers=self._headers
        ) as response:
            if response.status != 200:
                raise _refusal(response.status, await response.text())
            texts = []
            async for event in _events(response.content):
                if event == b"[DONE]":
                    break
                if text := self._take(_parsed(event), sent):
                    texts.append(text)
            else:
                raise RequestFailed("cut off", "the stream ended before [DONE]")
        sent.text = "".join(texts)
        if not sent.usage:
            raise RequestFailed("no usage", "the server ignores stream_options.include_usage")

    def _take(self, event: dict[str, Any], sent: Sent) -> str:
        """What an event says; its text."""
        if "error" in event:
            raise RequestFailed(*_kind_and_message("in stream", event))
        sent.usage = event.get("usage") or sent.usage
        text = "".join(map(_text_of, event.get("choices", ())))
        if text:
            sent.texts_s.append(self.clock())
        return text


def _text_of(choice: Mapping[str, Any]) -> str:
    """New text of a chat completion's delta, or of a text completion."""
    found = choice["delta"].get("content") if "delta" in choice else choice.get("text")
    return found or ""


def _parsed(event: bytes) -> dict[str, Any]:
    try:
        found = json.loads(event)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        words = event[:MAX_ERROR_CHARS].decode(errors="replace")
        raise RequestFailed("in stream", f"an event is no JSON object: {words}")
    return found


def _refusal(status: int, text: str) -> RequestFailed:
    try:
        reply = json.loads(text)
    except ValueError:
        reply = None
    if not isinstance(reply, dict) or "error" not in reply:
        return RequestFailed(f"HTTP {status}", text[:MAX_ERROR_CHARS])
    return RequestFailed(*_kind_and_message(f"HTTP {status}", reply))


def _kind_and_message(where: str, reply: Mapping[str, Any]) -> tuple[str, str]:
    error = reply["error"]
    if not isinstance(error, dict):
        return where, str(error)[:MAX_ERROR_CHARS]
    code = error.get("code") or error.get("type") or ""
    return f"{where} {code}".strip(), str(error.get("message", ""))[:MAX_ERROR_CHARS]


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """The data of each server-sent event; comments and other fields are left out."""
    rest = b""
    async for piece in content.iter_any():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()
