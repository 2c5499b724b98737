"""The router inside a real Ray Serve, over replicas that publish what a test tells them to."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import pytest

from focus_ray.config import EngineConfig
from focus_ray.openai.messages import Submission, TokenPrompt
from focus_ray.sampling import SamplingParams
from focus_ray.serve.args import ServeArgs

pytestmark = pytest.mark.timeout(180)


def scripted_replica():
    """The class by value: Ray's processes cannot import this file."""

    class Scripted:
        """Publishes what it was told to, and answers with its own name."""

        def __init__(self):
            from ray import serve

            self.name = serve.get_replica_context().replica_id.unique_id
            self.tokens = None
            self.epoch = 0

        def tell(self, tokens):
            self.tokens = tokens.get(self.name) if tokens else None
            return self.name

        def record_routing_stats(self):
            if self.tokens is None:
                return {}
            self.epoch += 1
            return {
                "epoch": self.epoch,
                "next_step_tokens": self.tokens,
                "waiting_tokens": 0.0,
                "saturation_tokens": 1000.0,
                "tokens_per_sequence": 10.0,
                "remaining_tokens": 64 * self.tokens,
                "num_running": 0,  # or there would seem to be other routers
                "num_waiting": 0,
                "free_pages": 1000,
                "total_pages": 2000,
                "page_size": 64,
                "step_s": 0.02,
            }

        async def generate(self, submission):
            await asyncio.sleep(submission.prompt.token_ids[0] / 1000)
            yield self.name

        async def describe(self):
            return self.name

    return Scripted


@pytest.fixture(scope="module")
def handle(ray_here):
    from ray import serve

    from focus_ray.serve.router import router_config

    deployment = serve.deployment(
        num_replicas=3,
        max_ongoing_requests=20,
        ray_actor_options={"num_cpus": 0},
        request_router_config=router_config("occupancy"),
    )(scripted_replica())
    found = serve.run(deployment.bind(), name="scripted", route_prefix=None)
    found._init(_run_router_in_separate_loop=True)  # the tests are in no event loop
    yield found
    serve.delete("scripted")


@pytest.fixture(scope="module")
def names(handle):
    return sorted(handle.broadcast("tell", None).results())


def publish(handle, tokens):
    """Returns when the routers know."""
    handle.broadcast("tell", tokens).results()
    time.sleep(1.0)


def burst(handle, number, milliseconds=50):
    """Where so many requests went that came at once, from one router; an answer takes so long."""
    streaming = handle.options(stream=True)
    prompt = TokenPrompt((milliseconds,))
    submissions = [Submission(f"{place}", prompt, SamplingParams()) for place in range(number)]
    responses = [streaming.generate.remote(each) for each in submissions]
    return Counter(next(iter(each)) for each in responses)


def test_a_burst_is_spread_by_what_was_sent(handle, names):
    publish(handle, dict.fromkeys(names, 500.0))
    assert sorted(burst(handle, 30).values()) == pytest.approx([10, 10, 10], abs=2)


def test_a_replica_that_is_fuller_gets_less(handle, names):
    a, b, c = names
    publish(handle, {a: 900.0, b: 500.0, c: 560.0})
    counts = burst(handle, 20)
    assert counts[a] == 0
    # Six requests make up for the difference.
    assert counts[b] == pytest.approx(13, abs=3)
    assert counts[c] == 20 - counts[b]


def test_what_the_emptiest_has_no_place_for_goes_elsewhere(handle, names):
    """Its numbers are far lower, but Serve lets it have 20 requests."""
    a, b, c = names
    publish(handle, {a: 0.0, b: 9000.0, c: 9500.0})
    counts = burst(handle, 30, milliseconds=3000)  # none ends while others are still being sent
    assert 15 <= counts[a] <= 20
    assert sum(counts.values()) == 30


def test_calls_that_generate_nothing_find_a_replica_too(handle, names):
    assert handle.describe.remote().result() in names


def test_without_numbers_all_are_used(handle, names):
    publish(handle, None)
    time.sleep(2.0)  # until the last ones are old
    assert set(burst(handle, 40)) == set(names)


def test_the_router_is_a_choice():
    from focus_ray.serve.router import OccupancyRouter, router_config

    assert ServeArgs(engine=EngineConfig()).router == "power_of_two"
    assert router_config("occupancy").get_request_router_class() is OccupancyRouter
    assert router_config("power_of_two").get_request_router_class() is not OccupancyRouter
