"""Which requests belong together, as routers are told. No sockets, no Ray."""

from __future__ import annotations

import httpx
import pytest

from focus_ray.config import EngineConfig
from focus_ray.serve.ingress import IngressSettings, create_app
from focus_ray.serve.replica import Replica
from focus_ray.serve.served_models import ServedModel

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


class Recording(Replica):
    """Keeps what it is asked."""

    def generate(self, submission):
        self.asked = submission
        return super().generate(submission)


@pytest.mark.parametrize(
    ("path", "body", "headers", "session"),
    [
        pytest.param("chat/completions", CHAT, {}, None, id="nothing said"),
        pytest.param("chat/completions", {**CHAT, "user": "u"}, {}, "u", id="a user"),
        pytest.param(
            "chat/completions",
            {**CHAT, "user": "u", "prompt_cache_key": "k"},
            {},
            "k",
            id="a cache key says more than a user",
        ),
        pytest.param(
            "chat/completions",
            {**CHAT, "user": "u", "prompt_cache_key": "k"},
            {"X-Session-Id": "s"},
            "s",
            id="a session says most",
        ),
        pytest.param(
            "completions", {"prompt": "hi", "user": "u"}, {}, "u", id="a user's completion"
        ),
        pytest.param(
            "completions", {"prompt": "hi"}, {"X-Session-Id": "s"}, "s", id="a session's completion"
        ),
        pytest.param("completions", {"prompt": "hi", "user": ""}, {}, None, id="an empty name"),
    ],
)
async def test_session_of(path, body, headers, session, fake_engine_factory):
    replica = Recording(EngineConfig(), "fake", engine_factory=fake_engine_factory)
    app = create_app([ServedModel(("fake",), replica)], IngressSettings())
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        response = await client.post(f"/v1/{path}", json=body, headers=headers)
    assert response.status_code == 200, response.text
    assert replica.asked.session == session
