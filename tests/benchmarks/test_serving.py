"""The load generator against a small scripted server: streams, failures, open and closed loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from rich.console import Console

from focus_ray.benchmarks.serving import main, run
from focus_ray.benchmarks.serving_client import COMPLETIONS, Client, Sent
from focus_ray.benchmarks.serving_flags import parse_arguments
from focus_ray.benchmarks.serving_load import send_all
from focus_ray.benchmarks.serving_report import print_figures
from focus_ray.benchmarks.serving_rows import figures_of

USAGE = {
    "prompt_tokens": 5,
    "completion_tokens": 6,
    "denoising_steps": 2,
    "processed_tokens": 12,
    "retained_tokens": 9,
    "decoded_tokens": 6,
}
ROLE = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}], "usage": None}


def text(words: str) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": {"content": words}}], "usage": None}


def completion(words: str) -> dict[str, object]:
    return {"choices": [{"index": 0, "text": words}]}


COUNTS = {"choices": [], "usage": USAGE}


def events(*parts: object) -> bytes:
    """A stream; parts that are no dictionaries are sent as they are."""
    written = (json.dumps(part) if isinstance(part, dict) else str(part) for part in parts)
    return "".join(f"data: {part}\n\n" for part in written).encode()


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def asked(handler: Handler, timeout_s: float = 5.0) -> Sent:
    """One request to a server with this handler."""
    app = web.Application()
    app.router.add_post(COMPLETIONS, handler)
    async with TestServer(app) as server:
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            client = Client(session, str(server.make_url(COMPLETIONS)), {"X-Key": "sesame"})
            return await client.ask({"model": "m"}, client.clock())


def replying(body: bytes, status: int = 200) -> Handler:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(body=body, status=status)

    return handler


@pytest.mark.parametrize(
    "stream",
    [
        pytest.param(events(ROLE, text("one "), text("two"), COUNTS, "[DONE]"), id="chat"),
        pytest.param(
            events(completion("one "), completion("two"), COUNTS, "[DONE]"), id="completions"
        ),
        pytest.param(
            b": ping\nevent: message\n" + events(text("one "), text("two"), COUNTS, "[DONE]"),
            id="comments and other fields",
        ),
        pytest.param(
            events(text("one "), text("two"), COUNTS, "[DONE]").replace(b"\n", b"\r\n"),
            id="lines that end as Windows has them",
        ),
    ],
)
async def test_a_stream_is_read_to_its_end(stream):
    sent = await asked(replying(stream))
    assert (sent.error, sent.text, len(sent.texts_s)) == (None, "one two", 2)
    assert sent.usage == USAGE
    assert sent.due_s <= sent.sent_s <= sent.texts_s[0] <= sent.finished_s


async def test_events_are_put_together_from_pieces_of_any_size():
    stream = events(ROLE, text("größer"), COUNTS, "[DONE]")

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for start in range(0, len(stream), 7):  # cuts lines, and the two bytes of a letter
            await response.write(stream[start : start + 7])
            await asyncio.sleep(0)
        return response

    sent = await asked(handler)
    assert (sent.error, sent.text) == (None, "größer")


async def test_a_request_asks_for_a_stream_with_usage_and_brings_its_headers():
    seen = {}

    async def handler(request: web.Request) -> web.Response:
        seen.update(await request.json(), key=request.headers["X-Key"])
        return web.Response(body=events(COUNTS, "[DONE]"))

    await asked(handler)
    assert seen == {
        "model": "m",
        "stream": True,
        "stream_options": {"include_usage": True},
        "key": "sesame",
    }


OVERLOADED = json.dumps({"error": {"message": "full", "code": "engine_overloaded"}}).encode()


@pytest.mark.parametrize(
    ("handler", "kind", "message"),
    [
        pytest.param(
            replying(OVERLOADED, 429), "HTTP 429 engine_overloaded", "full", id="refused in JSON"
        ),
        pytest.param(replying(b"gateway", 502), "HTTP 502", "gateway", id="refused by a proxy"),
        pytest.param(
            replying(events(text("a"), {"error": {"message": "gone", "code": "engine_dead"}})),
            "in stream engine_dead",
            "gone",
            id="an error as the last event",
        ),
        pytest.param(
            replying(events(text("a"), COUNTS)), "cut off", "the stream ended", id="no [DONE]"
        ),
        pytest.param(
            replying(events(text("a"), "[DONE]")), "no usage", "include_usage", id="no usage"
        ),
        pytest.param(
            replying(events("{half", "[DONE]")), "in stream", "no JSON object: {half", id="no JSON"
        ),
    ],
)
async def test_a_failure_has_a_kind_and_words(handler, kind, message):
    sent = await asked(handler)
    assert sent.error == kind
    assert message in sent.message


async def test_a_request_that_takes_too_long_has_timed_out():
    async def handler(request: web.Request) -> web.Response:
        await asyncio.sleep(5)
        return web.Response()

    assert (await asked(handler, timeout_s=0.05)).error == "timeout"


async def test_a_server_that_is_not_there_is_a_failure_too():
    async with aiohttp.ClientSession() as session:
        client = Client(session, "http://127.0.0.1:9", {})
        assert (await client.ask({}, 0.0)).error == "ClientConnectorError"


class FakeClient:
    """Answers after ``seconds`` of the loop's clock."""

    def __init__(self, seconds: float) -> None:
        self.clock = asyncio.get_running_loop().time
        self._seconds = seconds
        self.in_flight = self.most_in_flight = 0

    async def ask(self, body, due_s) -> Sent:
        sent_s = self.clock()
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        await asyncio.sleep(self._seconds)
        self.in_flight -= 1
        return Sent(due_s, sent_s, finished_s=self.clock(), text=body["name"], usage=USAGE)


NAMES = [{"name": str(number)} for number in range(6)]


async def test_an_open_loop_does_not_wait_for_answers():
    client = FakeClient(0.1)
    sent = await send_all(client, NAMES, [0.01 * n for n in range(6)], None)
    assert client.most_in_flight == 6
    assert [each.text for each in sent] == [body["name"] for body in NAMES]
    start_s = sent[0].due_s
    assert [each.due_s - start_s for each in sent] == pytest.approx([0.01 * n for n in range(6)])
    assert all(each.sent_s >= each.due_s for each in sent)


async def test_a_closed_loop_keeps_its_number_in_flight_and_counts_from_a_free_place():
    client = FakeClient(0.02)
    sent = await send_all(client, NAMES, [0.0] * 6, 2)
    assert client.most_in_flight == 2
    # Three rounds of two: nobody's time holds that of the round before.
    assert all(each.finished_s - each.due_s < 0.04 for each in sent)


async def test_waiting_for_a_place_counts_where_there_was_an_arrival():
    """Otherwise a server that stalls would look fast to those who were not let in meanwhile."""
    client = FakeClient(0.05)
    sent = await send_all(client, NAMES[:3], [0.0, 0.001, 0.002], 1)
    assert sent[2].finished_s - sent[2].due_s > 0.14
    assert sent[2].finished_s - sent[2].sent_s < 0.1


def test_figures_are_those_of_complete_answers_from_when_they_were_due():
    whole = Sent(1.0, 1.5, [2.0, 3.0, 4.5], 5.0, usage=USAGE)
    other = Sent(2.0, 2.0, [2.5, 3.0], 3.0, usage={**USAGE, "completion_tokens": 2})
    failed = Sent(0.5, 0.5, [0.6], 6.5, error="timeout", usage=USAGE)
    figures = figures_of([whole, failed, other])
    assert (figures.completed, figures.failed, figures.errors) == (2, 1, {"timeout": 1})
    assert figures.duration_s == 6.0
    assert (figures.output_tokens, figures.output_throughput) == (8, pytest.approx(8 / 6))
    assert figures.total_token_throughput == pytest.approx(18 / 6)
    assert figures.tokens_per_step == 3.0
    assert (figures.processed_per_decoded, figures.retained_per_decoded) == (2.0, 1.5)
    assert figures.ttft.mean == pytest.approx((1.0 + 0.5) / 2)
    assert figures.tpot.mean == pytest.approx((2.5 / 5 + 0.5 / 1) / 2)
    assert figures.itl.median == pytest.approx(1.0)
    assert figures.e2e.p99 == pytest.approx(1.0 + 0.99 * 3.0)


def test_a_run_in_which_all_fails_has_figures_and_says_why(capsys):
    figures = figures_of([Sent(0.0, 0.0, [], 1.0, error="HTTP 429", message="[full]")])
    print_figures(Console(), figures, is_limited=False)
    shown = capsys.readouterr().out
    assert "1 x HTTP 429: [full]" in shown
    assert (figures.ttft, figures.tokens_per_step) == (None, None)


def test_a_client_at_its_limit_says_so(capsys):
    figures = figures_of([Sent(0.0, 0.5, [0.6], 1.0, usage=USAGE)])
    print_figures(Console(width=200), figures, is_limited=False)
    assert "sent late, by 500 ms" in capsys.readouterr().out


@pytest.fixture
async def endpoint() -> AsyncIterator[tuple[str, list[dict[str, object]]]]:
    """A server of one model, and the bodies that it got."""
    bodies: list[dict[str, object]] = []

    async def models(request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == "Bearer sesame"
        return web.json_response({"data": [{"id": "sdar-tiny", "max_model_len": 600}]})

    async def answer(request: web.Request) -> web.Response:
        bodies.append(await request.json())
        return web.Response(body=events(text("one"), COUNTS, "[DONE]"))

    app = web.Application()
    app.router.add_get("/v1/models", models)
    app.router.add_post("/v1/chat/completions", answer)
    app.router.add_post("/v1/completions", answer)
    async with TestServer(app) as server:
        yield str(server.make_url("")).rstrip("/"), bodies


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        pytest.param([], "messages", id="bundled questions as a chat"),
        pytest.param(["--endpoint", COMPLETIONS], "prompt", id="bundled questions as token ids"),
        pytest.param(["--dataset-name", "random"], "prompt", id="random token ids"),
    ],
)
async def test_a_whole_run(endpoint, flags, field):
    url, bodies = endpoint
    common = ["--base-url", f"{url}/v1", "--api-key", "sesame", "--num-prompts", "5"]
    lengths = ["--input-len", "60", "--output-len", "20", "--output-range-ratio", "0.5"]
    args = parse_arguments([*common, *lengths, "--request-rate", "500", *flags], None)
    sent, model = await run(args, Console(quiet=True))
    assert (model, [each.error for each in sent]) == ("sdar-tiny", [None] * 5)
    assert len(bodies) == 6, "one request warms up"
    assert all(body[field] and body["temperature"] == 0.0 for body in bodies)
    assert all(10 <= body["max_tokens"] <= 30 for body in bodies)
    assert len({body["max_tokens"] for body in bodies}) > 1


def test_a_result_has_the_command_without_the_key(tmp_path, monkeypatch):
    async def fake_run(args, console):
        return [Sent(0.0, 0.0, [0.5], 1.0, usage=USAGE)], "m"

    monkeypatch.setattr("focus_ray.benchmarks.serving.run", fake_run)
    path = tmp_path / "new" / "result.json"
    main(["--api-key", "sesame", "--save-result", str(path)])
    result = json.loads(path.read_text())
    assert "sesame" not in path.read_text()
    assert (result["model"], result["request_rate"], result["output_tokens"]) == ("m", None, 6)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        pytest.param(["--request-rate", "0"], "--request-rate must be above 0", id="no rate"),
        pytest.param(["--num-prompts", "0"], "--num-prompts must be at least 1", id="nothing"),
        pytest.param(
            ["--dataset-name", "random", "--endpoint", "/v1/chat/completions"],
            "random prompts are token ids",
            id="token ids are no conversation",
        ),
        pytest.param(["--dataset-name", "file"], "--dataset-path goes with", id="no file"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, words, capsys):
    with pytest.raises(SystemExit) as error:
        parse_arguments(flags, None)
    assert error.value.code == 2
    assert words in capsys.readouterr().err


def test_a_server_that_is_not_there_is_said_in_words():
    with pytest.raises(SystemExit, match="start 'focus-ray serve', or give --base-url"):
        main(["--base-url", "http://127.0.0.1:9"])
