"""A flood meets a guard: who has a place is served as ever, the rest hears at once when to come."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import httpx
import openai
import pytest

from focus_ray.config import EngineConfig
from focus_ray.errors import EngineDead, EngineOverloaded, RequestRejected
from focus_ray.openai.messages import Chunk, Submission, TextPrompt
from focus_ray.sampling import SamplingParams
from focus_ray.serve import overload
from focus_ray.serve.handover import HandoverClient
from focus_ray.serve.ingress import IngressSettings, create_app
from focus_ray.serve.overload import OverloadGuard
from focus_ray.serve.replica import Replica
from focus_ray.serve.served_models import ServedModel

PLACES = 3


def guarded(client, places=PLACES):
    return OverloadGuard(client, places, "fake", "ingress-0")


def submission(n=1):
    return Submission("a", TextPrompt("?"), SamplingParams(n=n))


class Held(Replica):
    """Answers when the test lets it."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.may_go_on = asyncio.Event()

    async def generate(self, asked):
        await self.may_go_on.wait()
        async for chunk in super().generate(asked):
            yield chunk


class Engines:
    """As many as a test says; each request ends when the test lets it."""

    def __init__(self, count=1):
        self.count = count
        self.asked = []
        self.may_end = asyncio.Event()

    def num_engines(self):
        return self.count

    async def generate(self, asked):
        self.asked.append(asked)
        yield Chunk(0, "begun", (1,))
        await self.may_end.wait()
        yield Chunk(0, "", (), finish_reason="stop")

    async def metrics(self):
        return []


async def begin(guard, n=1):
    """A request that was let in."""
    stream = guard.generate(submission(n))
    await anext(stream)
    return stream


async def rest(stream):
    return [chunk.finish_reason async for chunk in stream]


async def test_a_flood_leaves_those_alone_who_were_let_in(fake_engine_factory):
    """40 clients, 3 places: 37 hear of it while nobody was served, and no engine hears of them."""
    engine = fake_engine_factory(None)
    replica = Held(EngineConfig(), "fake", engine_factory=lambda config: engine)
    app = create_app([ServedModel(("fake",), guarded(replica))], IngressSettings())
    replies: list[httpx.Response] = []

    async def client(number):
        body = {"prompt": f"question {number}"}
        replies.append(await http.post("/v1/completions", json=body))
        return replies[-1]

    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        flood = [asyncio.create_task(client(number)) for number in range(40)]
        while len(replies) < 37:
            await asyncio.sleep(0.001)
        assert {reply.status_code for reply in replies} == {429}
        replica.may_go_on.set()
        await asyncio.gather(*flood)
        assert (await client(40)).status_code == 200, "places are free again"
    for reply in replies[:37]:
        error = reply.json()["error"]
        assert (error["type"], error["code"]) == ("overloaded_error", "engine_overloaded")
        assert "max_num_waiting" in error["message"]
        assert reply.headers["Retry-After"] == "1", "nothing has ended yet that could tell more"
    assert {reply.json()["choices"][0]["text"] for reply in replies[37:]} == {
        *("question 0", "question 1", "question 2", "question 40")
    }
    assert len(engine.requests) == 4


async def test_the_official_client_understands(fake_engine_factory):
    replica = Replica(EngineConfig(), "fake", engine_factory=fake_engine_factory)
    replica.num_engines = lambda: 0
    app = create_app([ServedModel(("fake",), guarded(replica))], IngressSettings())
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
    client = openai.AsyncOpenAI(
        base_url="http://test/v1", api_key="unused", max_retries=0, http_client=http
    )
    async with client:
        with pytest.raises(openai.InternalServerError, match="no engine is running") as caught:
            await client.completions.create(model="fake", prompt="a", stream=True)
    assert caught.value.status_code == 503
    assert caught.value.response.headers["Retry-After"] == "10"


@pytest.mark.parametrize(
    ("sizes", "next_size", "fits"),
    [
        pytest.param([1, 1], 1, True, id="the last place"),
        pytest.param([1, 1, 1], 1, False, id="none left"),
        pytest.param([2], 2, False, id="completions count each"),
        pytest.param([], 3, True, id="all of them for one"),
        pytest.param([3], 4, True, id="larger than all: the engine says why that cannot be"),
    ],
)
async def test_places_are_counted_in_sequences(sizes, next_size, fits):
    guard = guarded(engines := Engines())
    open_streams = [await begin(guard, size) for size in sizes]
    if fits:
        open_streams.append(await begin(guard, next_size))
    else:
        with pytest.raises(EngineOverloaded):
            await begin(guard, next_size)
    assert len(engines.asked) == len(open_streams)
    engines.may_end.set()
    assert await asyncio.gather(*map(rest, open_streams)) == [["stop"]] * len(open_streams)


@pytest.mark.parametrize("end", ["it ends", "the client leaves", "it is rejected"])
async def test_a_place_is_free_again(end):
    guard = guarded(engines := Engines(), places=1)
    if end == "it is rejected":

        async def generate(asked):
            raise RequestRejected("no")
            yield

        engines.generate, kept = generate, engines.generate
        with pytest.raises(RequestRejected):
            await begin(guard)
        engines.generate = kept
    else:
        stream = await begin(guard)
        with pytest.raises(EngineOverloaded):
            await begin(guard)
        if end == "it ends":
            engines.may_end.set()
            await rest(stream)
        await stream.aclose()
    await (await begin(guard)).aclose()


async def test_places_go_and_come_with_engines():
    guard = guarded(engines := Engines(count=2), places=1)
    first, second = await begin(guard), await begin(guard)
    engines.count = 1
    await second.aclose()
    with pytest.raises(EngineOverloaded):
        await begin(guard)
    engines.count = 2
    await (await begin(guard)).aclose()
    await first.aclose()


async def test_who_was_let_in_keeps_the_place_while_engines_are_away(monkeypatch):
    """Its engine dies, no other runs: newcomers are told so, and it goes on when one is back."""

    async def sleep(seconds):
        with pytest.raises(EngineDead, match="no engine"):
            await begin(guard)

    monkeypatch.setattr(
        "focus_ray.serve.handover.asyncio",
        SimpleNamespace(sleep=sleep, get_running_loop=asyncio.get_running_loop),
    )
    engines = Engines()

    async def dies(asked):
        engines.generate, engines.count = kept, 0
        yield Chunk(0, "first", (7,))
        raise EngineDead("gone")

    engines.generate, kept = dies, engines.generate
    guard = guarded(HandoverClient(engines, 3), places=1)
    engines.num_engines = lambda: engines.count
    stream = await begin(guard)
    assert (await anext(stream)).text == "begun"
    engines.may_end.set()
    assert await rest(stream) == ["stop"]


async def test_the_refused_are_told_times_one_after_the_other(monkeypatch):
    """Stays of 8 s at 4 places: one leaves every 2 s."""
    now = 100.0
    monkeypatch.setattr(overload, "time", SimpleNamespace(monotonic=lambda: now))
    guard = guarded(engines := Engines(), places=4)
    streams = [await begin(guard) for _ in range(4)]
    now += 8.0
    engines.may_end.set()
    await asyncio.gather(*map(rest, streams))
    engines.may_end.clear()
    streams = [await begin(guard) for _ in range(4)]

    async def told():
        with pytest.raises(EngineOverloaded) as caught:
            await begin(guard)
        return caught.value.retry_after_s

    assert [await told() for _ in range(6)] == [2, 4, 6, 8, 8, 8], "at most one stay"
    for stream in streams[:3]:
        await stream.aclose()  # early ends: places free, but 8 s are still what others stay
    streams = [streams[3], *[await begin(guard) for _ in range(3)]]
    assert await told() == 8, "six were told to come, three places became free"
    for stream in streams:
        await stream.aclose()
    streams = [await begin(guard) for _ in range(4)]
    assert await told() == 2, "nobody is ahead any more"
    for stream in streams:
        await stream.aclose()


async def test_what_was_refused_is_counted():
    guard = guarded(engines := Engines(), places=1)
    stream = await begin(guard)
    for count, error in ((1, EngineOverloaded), (1, EngineOverloaded), (0, EngineDead)):
        engines.count = count
        with pytest.raises(error):
            await begin(guard)
    found = {
        (sample.name, sample.labels.get("reason")): sample
        for family in await guard.metrics()
        for sample in family.samples
    }
    turned_away = "focus_ray:requests_turned_away_total"
    assert found["focus_ray:num_sequences_open", None].value == 1
    assert found[turned_away, "overloaded"].value == 2
    assert found[turned_away, "no_engine"].value == 1
    labels = {"model_name": "fake", "ingress": "ingress-0", "reason": "no_engine"}
    assert found[turned_away, "no_engine"].labels == labels
    await stream.aclose()
