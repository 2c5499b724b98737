"""Several models behind one endpoint: which is asked, and what is said of those that fail."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from focus_ray.config import EngineConfig
from focus_ray.errors import EngineDead
from focus_ray.serve.api_keys import hash_of
from focus_ray.serve.ingress import IngressSettings, create_app
from focus_ray.serve.replica import Replica
from focus_ray.serve.served_models import ServedModel

HEALTH_TIMEOUT_S = 0.2


class Loading:
    """A model whose engines have not come up: calls wait."""

    async def describe(self):
        await asyncio.Event().wait()

    async def check_alive(self, timeout_s):
        await asyncio.sleep(timeout_s)
        raise EngineDead("no engine of loading answered")


@pytest.fixture
def engines(fake_engine):
    return {name: fake_engine() for name in ("small", "large")}


@pytest.fixture
def fake_engine(server):
    """The class of scripted engines, which this file cannot import."""
    return type(server.engine)


def endpoint(clients, **settings):
    models = [ServedModel((name, f"{name}-alias"), client) for name, client in clients.items()]
    app = create_app(models, IngressSettings(health_timeout_s=HEALTH_TIMEOUT_S, **settings))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


def replicas(engines):
    return {
        name: Replica(EngineConfig(), name, engine_factory=lambda config, engine=engine: engine)
        for name, engine in engines.items()
    }


@pytest.mark.parametrize("model", ["small", "large", "large-alias"])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        pytest.param("/v1/completions", {"prompt": "abc"}, id="completions"),
        pytest.param(
            "/v1/chat/completions", {"messages": [{"role": "user", "content": "abc"}]}, id="chat"
        ),
    ],
)
async def test_the_named_model_answers(engines, model, path, body):
    async with endpoint(replicas(engines)) as client:
        reply = await client.post(path, json={"model": model, **body})
    assert reply.status_code == 200
    assert reply.json()["model"] == model
    asked = {name for name, engine in engines.items() if engine.requests}
    assert asked == {model.removesuffix("-alias")}


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
async def test_one_of_several_must_be_named(engines, path):
    async with endpoint(replicas(engines)) as client:
        unnamed = await client.post(path, json={"prompt": "abc"})
        unknown = await client.post(path, json={"prompt": "abc", "model": "huge"})
    assert unnamed.status_code == 400
    assert unnamed.json()["error"]["param"] == "model"
    assert "name one of small, small-alias, large" in unnamed.json()["error"]["message"]
    assert unknown.status_code == 404


async def test_tokens_are_those_of_the_named_model(engines):
    engines["large"].max_model_len = 77
    async with endpoint(replicas(engines)) as client:
        reply = await client.post("/tokenize", json={"model": "large", "prompt": "abc"})
        text = await client.post("/detokenize", json={"model": "small", "tokens": [97]})
    assert reply.json()["max_model_len"] == 77
    assert text.json()["prompt"] == "a"


async def test_all_are_listed(engines):
    engines["large"].max_model_len = 77
    async with endpoint(replicas(engines)) as client:
        listed = (await client.get("/v1/models")).json()["data"]
        one = (await client.get("/v1/models/large-alias")).json()
    assert {model["id"]: model["max_model_len"] for model in listed} == {
        "small": 4096,
        "small-alias": 4096,
        "large": 77,
        "large-alias": 77,
    }
    assert one["max_model_len"] == 77


async def test_metrics_tell_models_apart(engines):
    async with endpoint(replicas(engines)) as client:
        text = (await client.get("/metrics")).text
    assert text.count("# TYPE focus_ray:num_requests_running gauge") == 1
    for name in engines:
        assert f'focus_ray:num_requests_running{{model_name="{name}"' in text


async def test_a_model_that_fails_leaves_the_others_alone(engines):
    engines["small"].dead = True
    clients = {**replicas(engines), "loading": Loading()}
    async with endpoint(clients) as client:
        health = await client.get("/health")
        listed = (await client.get("/v1/models")).json()["data"]
        dead = await client.post("/v1/completions", json={"model": "small", "prompt": "abc"})
        alive = await client.post("/v1/completions", json={"model": "large", "prompt": "abc"})
    assert health.status_code == 200
    assert not any("loading" in model["id"] for model in listed)
    assert dead.status_code == 503
    assert alive.status_code == 200


async def test_an_endpoint_without_any_model_up_is_unhealthy(engines):
    async with endpoint({"loading": Loading()}) as client:
        for path in ("/health", "/v1/models"):
            reply = await client.get(path)
            assert reply.status_code == 503
            assert "no engine of loading answered" in reply.json()["error"]["message"]


async def test_each_of_several_keys_opens(engines):
    hashes = (hash_of("one"), hash_of("two"))
    async with endpoint(replicas(engines), api_key_hashes=hashes) as client:
        statuses = {
            key: (await client.get("/v1/models", headers=headers)).status_code
            for key, headers in {
                "one": {"Authorization": "Bearer one"},
                "two": {"Authorization": "Bearer two"},
                "three": {"Authorization": "Bearer three"},
                "basic": {"Authorization": "Basic one"},
                "none": {},
            }.items()
        }
        refused = await client.get("/v1/models")
    assert statuses == {"one": 200, "two": 200, "three": 401, "basic": 401, "none": 401}
    assert refused.json()["error"]["code"] == "invalid_api_key"
    assert refused.headers["WWW-Authenticate"] == "Bearer"
