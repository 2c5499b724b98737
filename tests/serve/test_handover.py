"""Requests that outlive their engines, over scripted ones. No Ray, no HTTP, no model."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from focus_ray.config import EngineConfig
from focus_ray.engine.outputs import RequestStats
from focus_ray.errors import EngineDead, EngineOverloaded, RequestRejected
from focus_ray.openai.messages import Chunk, Submission, TextPrompt
from focus_ray.sampling import SamplingParams
from focus_ray.serve import handover
from focus_ray.serve.handover import HandoverClient
from focus_ray.serve.metrics import as_text
from focus_ray.serve.replica import Replica

ANSWER = "the quick brown fox"
FULL = EngineOverloaded("full", 0.5)
DEAD = EngineDead("gone")


@dataclass
class Engines:
    """One engine after the other, three characters a chunk; completion 1 says it in capitals.

    Args:
        ends: how each ends: after so many chunks it dies of an error; None: it does not.
    """

    ends: list[tuple[int, Exception] | None]
    asked: list[Submission] = field(default_factory=list)
    closed: int = 0

    async def generate(self, submission):
        self.asked.append(submission)
        num_left, error = self.ends[len(self.asked) - 1] or (1000, None)
        try:
            sent = dict.fromkeys(range(submission.params.n), ())
            for chunk in self.rest_of(submission.continued or sent):
                if not num_left:
                    raise error
                num_left -= 1
                yield chunk
            if not num_left:
                raise error
        finally:
            self.closed += 1

    def rest_of(self, sent):
        for start in range(0, len(ANSWER), 3):
            for index, before in sent.items():
                answer = ANSWER.upper() if index else ANSWER
                text = answer[start + len(before) :][:3]
                is_last = start + len(before) + 3 >= len(answer)
                if text:
                    reason, stats = ("stop", RequestStats()) if is_last else (None, None)
                    yield Chunk(index, text, tuple(map(ord, text)), None, reason, stats=stats)


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """Lengths of the pauses, which take no time; the clock of the loop goes on by them."""
    taken = []
    loop_time = asyncio.BaseEventLoop.time

    async def sleep(seconds):
        taken.append(seconds)

    # Not asyncio's own: loops of other tests' servers, in their threads, sleep by that.
    own = SimpleNamespace(sleep=sleep, get_running_loop=asyncio.get_running_loop)
    monkeypatch.setattr(handover, "asyncio", own)
    monkeypatch.setattr(asyncio.BaseEventLoop, "time", lambda loop: loop_time(loop) + sum(taken))
    return taken


def submission(**params):
    return Submission("a", TextPrompt("?"), SamplingParams(**params))


async def collect(engines, max_handovers=3, **params):
    """The chunks, and the error that they ended in."""
    chunks = []
    try:
        async for chunk in HandoverClient(engines, max_handovers).generate(submission(**params)):
            chunks.append(chunk)
    except (EngineDead, EngineOverloaded, RequestRejected) as error:
        return chunks, error
    finally:
        assert engines.closed == len(engines.asked), "an engine was left running"
    return chunks, None


def text_of(chunks, index=0):
    return "".join(chunk.text for chunk in chunks if chunk.index == index)


@pytest.mark.parametrize("num_chunks", range(8))
async def test_a_death_anywhere_is_no_more_than_a_pause(num_chunks):
    """After the last chunk, too, where nothing is left to hand over."""
    engines = Engines([(num_chunks, DEAD), None])
    chunks, error = await collect(engines)
    assert (text_of(chunks), error) == (ANSWER, None)
    assert [chunk.finish_reason for chunk in chunks][-1] == "stop"
    if num_chunks < 7:
        first, second = engines.asked
        assert first.continued is None
        sent = tuple(map(ord, ANSWER[: 3 * num_chunks]))
        assert second.continued == {0: sent}
        assert second.request_id != first.request_id
        assert (second.prompt, second.params) == (first.prompt, first.params)
    else:
        assert len(engines.asked) == 1


@pytest.mark.parametrize("num_chunks", [0, 1, 6, 12, 13])
async def test_completions_are_handed_over_each_with_its_own_tokens(num_chunks):
    """13 of 14 chunks: the first completion has ended, and is not asked for again."""
    engines = Engines([(num_chunks, DEAD), None])
    chunks, error = await collect(engines, n=2)
    assert (text_of(chunks, 0), text_of(chunks, 1)) == (ANSWER, ANSWER.upper())
    assert error is None
    assert engines.asked[1].continued.keys() == ({1} if num_chunks == 13 else {0, 1})


async def test_engines_may_die_one_after_the_other(pauses):
    engines = Engines([(1, DEAD), (0, DEAD), (3, DEAD), None])
    chunks, error = await collect(engines)
    assert (text_of(chunks), error) == (ANSWER, None)
    assert pauses == sorted(set(pauses)), "each pause is longer than the one before"


async def test_the_last_failure_is_seen_as_it_is():
    engines = Engines([(1, DEAD)] * 4)
    chunks, error = await collect(engines, max_handovers=3)
    assert text_of(chunks) == ANSWER[:12]
    assert error is DEAD
    assert len({each.request_id for each in engines.asked}) == 4


async def test_off_means_off():
    engines = Engines([(2, DEAD)])
    chunks, error = await collect(engines, max_handovers=0)
    assert (text_of(chunks), error) == (ANSWER[:6], DEAD)
    assert engines.asked == [submission()]


@pytest.mark.parametrize("seed", [None, 0, 7])
async def test_every_engine_draws_by_the_same_seed(seed):
    engines = Engines([(1, DEAD), (1, DEAD), None])
    await collect(engines, seed=seed)
    (found,) = {each.params.seed for each in engines.asked}
    assert found is not None and seed in (None, found)


async def test_two_requests_without_a_seed_have_two():
    engines = Engines([None, None])
    await collect(engines)
    await collect(engines)
    assert engines.asked[0].params.seed != engines.asked[1].params.seed


async def test_who_has_begun_waits_for_a_place(pauses):
    engines = Engines([(2, DEAD), (0, FULL), (0, FULL), None])
    chunks, error = await collect(engines, max_handovers=1)
    assert (text_of(chunks), error) == (ANSWER, None)
    assert pauses[1:] == [0.5, 0.5]


async def test_but_not_for_ever(pauses):
    engines = Engines([(2, DEAD)] + [(0, FULL)] * 1000)
    chunks, error = await collect(engines)
    assert (text_of(chunks), error) == (ANSWER[:6], FULL)
    assert handover.PATIENCE_S < sum(pauses) < handover.PATIENCE_S + 2


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(FULL, id="all are full: the client is told to come later"),
        pytest.param(RequestRejected("no"), id="no engine will take it"),
    ],
)
async def test_other_errors_pass(error):
    engines = Engines([(0, error)])
    assert await collect(engines) == ([], error)


async def test_closing_it_ends_the_engines_request():
    engines = Engines([(1, DEAD), None])
    stream = HandoverClient(engines, 3).generate(submission())
    await anext(stream)
    await anext(stream)
    await stream.aclose()
    assert engines.closed == 2


async def test_a_replica_goes_on_behind_what_was_sent(fake_engine_factory):
    """And tells the prompt's ids to those alone who have not heard them."""
    replica = Replica(EngineConfig(device="cpu"), "fake", engine_factory=fake_engine_factory)
    continued = {0: tuple(map(ord, "abcde")), 2: ()}
    params, prompt = SamplingParams(n=3), TextPrompt("abcdefghi")
    stream = replica.generate(Submission("a", prompt, params, True, continued=continued))
    chunks = [chunk async for chunk in stream]
    assert (text_of(chunks, 0), text_of(chunks, 2)) == ("fghi", "abcdefghi")
    assert {chunk.index for chunk in chunks} == {0, 2}
    assert [chunk.index for chunk in chunks if chunk.prompt_token_ids] == [2]
    assert b'taken_over_total{model_name="fake",replica="0"} 1.0' in as_text(
        await replica.metrics()
    )
