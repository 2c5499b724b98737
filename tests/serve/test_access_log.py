"""One line for each request, by id, with what operators ask about it and nothing private."""

from __future__ import annotations

import json
import logging

import httpx
import pytest
from ray._common.formatters import JSONFormatter

from focus_ray.config import EngineConfig
from focus_ray.errors import EngineDead
from focus_ray.serve.api_keys import hash_of
from focus_ray.serve.handover import HandoverClient
from focus_ray.serve.ingress import IngressSettings, create_app
from focus_ray.serve.logs import SERVE_LOGGER, log_through_serve, serve_logging
from focus_ray.serve.replica import Replica
from focus_ray.serve.served_models import ServedModel

SECRET = "a secret question "
SETTINGS = IngressSettings(api_key_hashes=(hash_of("sesame"),))
KEY = {"Authorization": "Bearer sesame"}


class OnceDying(Replica):
    """Its first engine dies after the first chunk."""

    has_died = False

    async def generate(self, submission):
        async for chunk in super().generate(submission):
            yield chunk
            if not self.has_died:
                self.has_died = True
                raise EngineDead("gone")


@pytest.fixture
def lines(caplog):
    """Records of the access log so far."""
    caplog.set_level(logging.INFO, "focus_ray")
    return lambda: [record for record in caplog.records if record.name == "focus_ray.access"]


async def ask(replica, path, *, method="POST", **options):
    app = create_app([ServedModel(("fake",), replica)], SETTINGS)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    options.setdefault("headers", KEY)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.request(method, path, **options)


@pytest.fixture
def replica(fake_engine_factory):
    return Replica(EngineConfig(), "fake", engine_factory=fake_engine_factory)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_line_says_what_came_of_a_request(replica, lines, stream):
    body = {"prompt": SECRET, "n": 2, "max_tokens": 5, "stream": stream}
    headers = {**KEY, "X-Request-Id": "order-66"}
    reply = await ask(replica, "/v1/completions", json=body, headers=headers)
    (line,) = lines()
    assert (
        vars(line).items()
        >= {
            "levelname": "INFO",
            "request_id": "order-66",
            "http_method": "POST",
            "endpoint": "/v1/completions",
            "status": 200,
            "model": "fake",
            "finish_reason": "length",
            "prompt_tokens": len(SECRET),
            "completion_tokens": 10,
        }.items()
    )
    assert 0 < line.first_token_s <= line.total_s
    assert line.queue_s == 0
    assert not hasattr(line, "handovers") and not hasattr(line, "error")
    assert '"id":"cmpl-order-66-' in reply.text, "the reply and the engine's lines carry it too"
    assert line.getMessage().startswith("POST /v1/completions status=200 model=fake finish_reason=")


@pytest.mark.parametrize(
    ("prompt", "status", "error"),
    [
        pytest.param("overloaded", 429, "engine_overloaded", id="refused"),
        pytest.param("dead", 503, "engine_dead", id="no engine"),
        pytest.param("bug", 500, "internal_error", id="unforeseen"),
    ],
)
async def test_errors_are_named(replica, lines, prompt, status, error):
    reply = await ask(replica, "/v1/completions", json={"prompt": prompt})
    (line,) = lines()[-1:]
    assert (reply.status_code, line.status, line.error) == (status, status, error)


async def test_an_error_in_midstream_is_named(replica, lines):
    body = {"prompt": "it dies midway", "stream": True}
    await ask(replica, "/v1/completions", json=body)
    (line,) = lines()
    assert (line.status, line.error, line.completion_tokens) == (200, "engine_dead", 8)
    assert not hasattr(line, "finish_reason")


async def test_handovers_are_counted(fake_engine_factory, lines, caplog):
    dying = OnceDying(EngineConfig(), "fake", engine_factory=fake_engine_factory)
    headers = {**KEY, "X-Request-Id": "order-66"}
    body = {"prompt": "abcdefgh"}
    reply = await ask(HandoverClient(dying, 3), "/v1/completions", json=body, headers=headers)
    assert reply.json()["choices"][0]["text"] == "abcdefgh"
    (line,) = lines()
    assert line.handovers == 1
    told = [r.getMessage() for r in caplog.records if r.name.startswith("focus_ray.serve")]
    assert ["handed over" in told[0], "goes on here" in told[1]] == [True, True]
    assert all("cmpl-order-66-" in message for message in told)


async def test_a_client_that_left_is_named(mortal_server, lines):
    """Over a socket: only there clients can leave."""
    with httpx.stream(
        "POST",
        f"{mortal_server.url}/v1/completions",
        json={"prompt": "forever", "max_tokens": 4000, "stream": True},
    ) as response:
        next(response.iter_lines())
    mortal_server.steps_after(lambda: lines())
    (line,) = lines()
    assert (line.status, line.error) == (200, "client_left")


@pytest.mark.parametrize(
    ("headers", "status"),
    [pytest.param(KEY, 400, id="a bad field"), pytest.param({}, 401, id="no key")],
)
async def test_nothing_private_is_logged(replica, caplog, headers, status):
    caplog.set_level(logging.DEBUG, "focus_ray")
    body = {"prompt": SECRET, "max_tokens": -1}
    assert (await ask(replica, "/v1/completions", json=body, headers=headers)).status_code == status
    assert (await ask(replica, "/v1/completions", json={"prompt": SECRET})).status_code == 200
    everything = "\n".join(str(vars(record)) for record in caplog.records)
    assert "focus_ray.access" in everything
    assert SECRET not in everything and "sesame" not in everything


@pytest.mark.parametrize(
    ("sent", "seen"),
    [
        pytest.param("a" * 1000, "a" * 128, id="too long"),
        pytest.param("a b\tc\xe9", "a?b?c?", id="not printable"),
    ],
)
async def test_a_strange_id_is_made_harmless(replica, lines, sent, seen):
    headers = {**KEY, "X-Request-Id": sent.encode("latin-1")}
    await ask(replica, "/tokenize", json={"prompt": "a"}, headers=headers)
    (line,) = lines()
    assert line.request_id == seen


async def test_requests_without_an_id_get_two(replica, lines):
    for _ in range(2):
        await ask(replica, "/tokenize", json={"prompt": "a"})
    first, second = lines()
    assert first.request_id != second.request_id


async def test_probes_are_no_news(replica, lines, caplog):
    for path in ("/health", "/metrics"):
        await ask(replica, path, method="GET")
    assert not lines()
    caplog.set_level(logging.DEBUG, "focus_ray")
    await ask(replica, "/health", method="GET")
    assert [line.endpoint for line in lines()] == ["/health"]


@pytest.fixture
def serve_lines():
    """What Serve's logger is handed, where it is quiet itself; all loggers are as before after."""
    serve, own = logging.getLogger(SERVE_LOGGER), logging.getLogger("focus_ray")
    before = [(x, x.level, x.handlers, x.propagate) for x in (serve, own)]
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    serve.handlers = [handler]
    serve.setLevel("WARNING")
    yield records
    for logger, level, handlers, propagate in before:
        logger.setLevel(level)
        logger.handlers, logger.propagate = handlers, propagate


@pytest.mark.parametrize(
    ("environment", "levels"),
    [
        pytest.param({}, ["INFO", "ERROR"], id="unset"),
        pytest.param({"FOCUS_RAY_LOGGING_LEVEL": "debug"}, ["DEBUG", "INFO", "ERROR"], id="more"),
        pytest.param({"FOCUS_RAY_LOGGING_LEVEL": "WARNING"}, ["ERROR"], id="less"),
    ],
)
def test_lines_go_to_serves_logger_at_our_level(serve_lines, environment, levels):
    log_through_serve(environment)
    log_through_serve(environment)  # a process may hold two deployments
    logger = logging.getLogger("focus_ray.serve.anything")
    for level in (logging.DEBUG, logging.INFO, logging.ERROR):
        logger.log(level, "a line")
    assert [record.levelname for record in serve_lines] == levels


@pytest.mark.parametrize(
    ("read", "environment", "words"),
    [
        pytest.param(
            log_through_serve,
            {"FOCUS_RAY_LOGGING_LEVEL": "loud"},
            "FOCUS_RAY_LOGGING_LEVEL is 'LOUD'.*DEBUG",
            id="level",
        ),
        pytest.param(
            serve_logging,
            {"RAY_SERVE_LOG_ENCODING": "xml"},
            "RAY_SERVE_LOG_ENCODING is 'XML'.*TEXT, JSON",
            id="encoding",
        ),
    ],
)
def test_what_there_is_not_is_refused(read, environment, words):
    with pytest.raises(ValueError, match=words):
        read(environment)


@pytest.mark.parametrize("encoding", ["TEXT", "JSON"])
def test_serve_is_told_the_encoding(encoding):
    told = serve_logging({"RAY_SERVE_LOG_ENCODING": encoding.lower()})
    assert (told.encoding, told.log_level) == (encoding, "WARNING")


async def test_facts_are_fields_in_serves_json(replica, serve_lines):
    log_through_serve({})
    await ask(replica, "/v1/completions", json={"prompt": SECRET})
    (record,) = serve_lines
    told = json.loads(JSONFormatter().format(record))
    assert (told["status"], told["model"], told["prompt_tokens"]) == (200, "fake", len(SECRET))
    assert (told["endpoint"], told["request_id"]) == ("/v1/completions", record.request_id)
