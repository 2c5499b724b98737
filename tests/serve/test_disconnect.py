"""A client that leaves frees its place in the engine within a denoising step."""

from __future__ import annotations

import asyncio
import json
import socket
from urllib.parse import urlsplit

import pytest

from focus_ray.openai.merging import merge

FOREVER = "an answer that goes on forever, "


def send(server, path, body):
    """Start a request on a bare socket, which can be closed at any moment."""
    address = urlsplit(server.url)
    connection = socket.create_connection((address.hostname, address.port), timeout=10)
    raw = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(raw)}\r\n\r\n"
    )
    connection.sendall(head.encode() + raw)
    return connection


@pytest.mark.parametrize("wait_for_text", [False, True], ids=["at once", "after some text"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    "body",
    [
        {"path": "/v1/chat/completions", "messages": [{"role": "user", "content": FOREVER}]},
        {"path": "/v1/completions", "prompt": [FOREVER, FOREVER], "n": 2, "max_tokens": 4000},
    ],
    ids=["chat", "two prompts"],
)
def test_leaving_aborts(mortal_server, body, stream, wait_for_text):
    engine = mortal_server.engine
    body = {**body, "stream": stream}
    num_requests = len(body.get("prompt", [None]))
    connection = send(mortal_server, body.pop("path"), body)
    mortal_server.steps_after(lambda: len(engine.running) == num_requests)
    if wait_for_text and stream:
        assert b"data: " in connection.recv(65536)
    connection.close()
    steps = engine.steps
    mortal_server.steps_after(lambda: not engine.running)
    assert len(engine.aborted_after) == num_requests
    # Each request takes its own steps here; what is already on the way may still come.
    assert max(engine.aborted_after.values()) - steps <= 3 * num_requests


def test_leaving_harms_nobody_else(mortal_server):
    connection = send(mortal_server, "/v1/completions", {"prompt": FOREVER, "max_tokens": 4000})
    mortal_server.steps_after(lambda: mortal_server.engine.running)
    connection.close()
    assert mortal_server.post("/v1/completions", {"prompt": "ab"}).json()["choices"][0]["text"]


async def test_merged_streams_end_together():
    closed = []

    async def numbers(first, fail):
        try:
            for number in range(first, first + 3):
                yield number
                await asyncio.sleep(0)
            if fail:
                raise ValueError("one of them")
            await asyncio.sleep(60)
        finally:
            closed.append(first)

    seen = []
    with pytest.raises(ValueError, match="one of them"):
        async for item in merge([numbers(0, fail=False), numbers(10, fail=True)]):
            seen.append(item)
    assert sorted(seen) == [(0, 0), (0, 1), (0, 2), (1, 10), (1, 11), (1, 12)]
    assert sorted(closed) == [0, 10]
