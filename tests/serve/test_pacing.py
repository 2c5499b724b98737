"""How often a replica sends: requests share its chunks per second, and lose no text by it."""

from __future__ import annotations

import asyncio

import pytest

from focus_ray.benchmarks.stepped_engine import stepped_factory
from focus_ray.config import EngineConfig
from focus_ray.openai.messages import Submission, TokenPrompt
from focus_ray.sampling import SamplingParams
from focus_ray.serve.replica import Replica

STEPS = 60


def submission(name):
    params = SamplingParams(max_tokens=STEPS)
    return Submission(name, TokenPrompt((1, 2, 3)), params, False)


async def answers(num_requests, max_chunks_per_s):
    """Chunks of each request, to an engine that decodes a token in each of its steps of 2 ms."""
    factory = stepped_factory(0.002, 1.0, num_requests)
    replica = Replica(EngineConfig(), "m", "0", factory, max_chunks_per_s)

    async def one(name):
        return [chunk async for chunk in replica.generate(submission(name))]

    found = await asyncio.gather(*(one(f"{n}") for n in range(num_requests)))
    replica.shutdown()
    return found


@pytest.mark.parametrize(
    ("num_requests", "max_chunks_per_s"),
    [
        pytest.param(1, 25.0, id="one request has all of it"),
        pytest.param(4, 100.0, id="four have a quarter each"),
    ],
)
async def test_text_comes_as_often_as_the_share_allows_and_all_of_it(
    num_requests, max_chunks_per_s
):
    for chunks in await answers(num_requests, max_chunks_per_s):
        # 60 steps take 0.12 s at least: the first chunk, one for every 0.04 s, the last.
        assert 2 <= len(chunks) <= 6
        assert len(chunks[0].token_ids) == 1, "the first text is not held back"
        assert "".join(chunk.text for chunk in chunks) == " word" * STEPS
        assert sum(len(chunk.token_ids) for chunk in chunks) == STEPS
        assert [chunk.finish_reason for chunk in chunks[-2:]] == [None, "length"]


async def test_a_request_that_is_alone_has_text_in_nearly_every_step():
    (chunks,) = await answers(1, 1e6)
    assert len(chunks) > STEPS / 2


async def test_the_end_of_an_answer_is_not_kept_waiting():
    (chunks,) = await asyncio.wait_for(answers(1, 0.1), 5.0)  # a chunk in ten seconds
    assert [len(chunk.token_ids) for chunk in chunks] == [1, STEPS - 1]
