import asyncio

import pytest

from focus_ray.config import EngineConfig
from focus_ray.engine import async_engine
from focus_ray.engine.async_engine import AsyncEngine
from focus_ray.engine.engine import Engine
from focus_ray.engine.outputs import GenerationRequest, TokenDelta, TokenLogprob, joined
from focus_ray.errors import EngineDead, RequestRejected
from focus_ray.sampling import SamplingParams


def make_engine(model):
    config = EngineConfig(
        model=model.path,
        device=model.device,
        dtype="float32",
        block_length=16,
        page_size=16,
        num_pages=400,
        max_num_seqs=8,
        max_num_batched_tokens=64,  # few sizes to record on a GPU
        focus_adaptive=False,  # tokens that do not depend on who else runs
    )
    return Engine(config)


@pytest.fixture
def engine(golden_sdar):
    started = AsyncEngine(make_engine(golden_sdar), "tiny")
    yield started
    started.shutdown()


def request(name, prompt=(5, 6, 7), **params):
    settings = {"max_tokens": 40, "ignore_eos": True, "temperature": 0.0}
    return GenerationRequest(name, tuple(prompt), SamplingParams(**{**settings, **params}))


async def collect(engine, item):
    return [delta async for delta in engine.generate(item)]


async def settled(engine, condition, timeout_s=10.0):
    """Wait until the snapshot of the engine's load fulfils ``condition``."""
    async with asyncio.timeout(timeout_s):
        while not condition(engine.load()):
            await asyncio.sleep(0.005)


def tokens(deltas, index=0):
    return [t for delta in deltas if delta.index == index for t in delta.token_ids]


async def test_streams_equal_the_synchronous_engine(engine, golden_sdar):
    reference = make_engine(golden_sdar)
    expected = {}
    for i in range(12):
        reference.add(request(str(i), [5 + i, 9]))
    while reference.has_unfinished():
        for delta in reference.step():
            expected.setdefault(delta.request_id, []).extend(delta.token_ids)
    streams = await asyncio.gather(
        *(collect(engine, request(str(i), [5 + i, 9])) for i in range(12))
    )
    assert {str(i): tokens(stream) for i, stream in enumerate(streams)} == expected
    assert all(stream[-1].finish_reason == "length" for stream in streams)


async def test_a_stream_of_n_ends_after_all(engine):
    deltas = await collect(engine, request("a", n=3, temperature=1.0, seed=1))
    assert sorted(d.index for d in deltas if d.finish_reason) == [0, 1, 2]
    assert [len(tokens(deltas, i)) for i in range(3)] == [40, 40, 40]


async def test_a_rejected_request_raises_before_its_first_delta_and_harms_nobody(engine):
    running = asyncio.create_task(collect(engine, request("good", max_tokens=100)))
    with pytest.raises(RequestRejected, match="empty"):
        await collect(engine, request("bad", ()))
    assert len(tokens(await running)) == 100


async def test_leaving_a_stream_aborts_it(engine):
    stream = engine.generate(request("a", max_tokens=900))
    await anext(stream)
    await stream.aclose()
    await settled(engine, lambda load: load.num_running == 0)
    load = engine.load()
    assert load.free_pages == load.total_pages
    assert load.finished["abort"] == 1
    assert load.emitted_tokens < 900


async def test_cancelling_a_waiting_request_removes_it(engine):
    blockers = [
        asyncio.create_task(collect(engine, request(f"b{i}", max_tokens=300))) for i in range(8)
    ]
    await settled(engine, lambda load: load.num_running == 8)
    waiting = asyncio.create_task(collect(engine, request("late")))
    await settled(engine, lambda load: load.num_waiting == 1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await settled(engine, lambda load: load.num_waiting == 0)
    await asyncio.gather(*blockers)
    assert engine.load().free_pages == engine.load().total_pages


async def test_cancelling_at_once_leaves_nothing_behind(engine):
    for i in range(20):
        task = asyncio.create_task(collect(engine, request(str(i), max_tokens=500)))
        for _ in range(i % 4):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await engine.check_alive(10)
    await settled(engine, lambda load: load.num_running == load.num_waiting == 0)
    assert engine.load().free_pages == engine.load().total_pages


async def test_the_load_counts_what_has_been_delivered(engine):
    seen = 0
    async for delta in engine.generate(request("a", max_tokens=200)):
        seen += len(delta.token_ids)
        assert engine.load().emitted_tokens >= seen


async def test_abort_by_id_ends_the_stream_with_its_reason(engine):
    stream = engine.generate(request("a", max_tokens=900))
    await anext(stream)
    engine.abort("a")
    rest = [delta async for delta in stream]
    assert rest[-1].finish_reason == "abort"


async def test_a_loop_that_is_gone_keeps_nothing_from_the_others():
    async def made_elsewhere():
        return async_engine._Stream(1)

    gone = await asyncio.to_thread(asyncio.run, made_elsewhere())
    here = async_engine._Stream(1)
    await asyncio.to_thread(async_engine._send, [(gone, []), (here, [])])
    assert await here.get() == []


def delta(text, index=0, **others):
    return TokenDelta("a", index, text, tuple(map(ord, text)), **others)


async def test_a_reader_that_is_behind_gets_several_steps_at_once():
    stream = async_engine._Stream(2)
    for step in ([delta("a"), delta("x", 1)], [delta("bc")], [delta("", finish_reason="stop")]):
        stream.deltas.put_nowait(step)
    assert await stream.get() == [delta("abc", finish_reason="stop"), delta("x", 1)]
    stream.deltas.put_nowait([delta("y", 1)])
    assert await stream.get() == [delta("y", 1)], "nothing comes twice"


async def test_what_came_before_an_engine_died_is_read_before_its_death():
    stream = async_engine._Stream(1)
    for news in ([delta("a")], [delta("b")], EngineDead("gone")):
        stream.deltas.put_nowait(news)
    assert await stream.get() == [delta("ab")]
    with pytest.raises(EngineDead, match="gone"):
        await stream.get()


def test_joined_deltas_keep_the_log_probabilities_of_all_their_tokens():
    likely, unlikely = TokenLogprob(97, -0.1), TokenLogprob(98, -3.0)
    both = joined([delta("a", logprobs=(likely,)), delta("b", logprobs=(unlikely,)), delta("")])
    assert both == delta("ab", logprobs=(likely, unlikely))
    assert joined([delta("a"), delta("b")]).logprobs is None


async def test_an_id_can_be_used_again(engine):
    first = await collect(engine, request("a"))
    assert tokens(await collect(engine, request("a"))) == tokens(first)


@pytest.mark.parametrize("method", ["launch", "collect"])
async def test_an_internal_error_reaches_every_stream_and_health(engine, method):
    streams = [engine.generate(request(str(i), max_tokens=900)) for i in range(3)]
    for stream in streams:
        await anext(stream)

    def broken(*_):
        raise RuntimeError("the device fell over")

    setattr(engine._engine._runner, method, broken)
    for stream in streams:
        with pytest.raises(EngineDead, match="the device fell over"):
            async for _ in stream:
                pass
    with pytest.raises(EngineDead):
        engine.raise_if_dead()
    with pytest.raises(EngineDead):
        await engine.check_alive(5)
    with pytest.raises(EngineDead):
        await collect(engine, request("late"))


async def test_aborting_in_a_dead_engine_is_harmless(engine):
    def broken(request_id):
        raise AssertionError("asked a dead engine")

    stream = engine.generate(request("a", max_tokens=900))
    await anext(stream)
    engine._engine.abort = broken
    engine.shutdown()
    engine.abort("a")
    with pytest.raises(EngineDead, match="shut down"):  # runs the commands that nobody else runs
        await engine.check_alive(5)
    with pytest.raises(EngineDead, match="shut down"):
        await anext(stream)


async def test_shutdown_ends_streams_and_is_idempotent(engine):
    stream = engine.generate(request("a", max_tokens=900))
    await anext(stream)
    engine.shutdown()
    engine.shutdown()
    with pytest.raises(EngineDead, match="shut down"):
        async for _ in stream:
            pass


async def test_an_idle_engine_still_tells_its_load_anew(engine, monkeypatch):
    monkeypatch.setattr(async_engine, "IDLE_WAIT_S", 0.01)
    await collect(engine, request("a", max_tokens=3))  # wakes it from its first sleep
    seen = engine.load().epoch
    await settled(engine, lambda load: load.epoch > seen + 2)
    assert engine.load().num_running == 0


async def test_alive_engine_answers_while_working(engine):
    task = asyncio.create_task(collect(engine, request("a", max_tokens=300)))
    await engine.check_alive(10)
    engine.raise_if_dead()
    await task
