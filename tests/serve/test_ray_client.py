"""The engine client over a handle that a test writes. No Ray runs here."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from focus_ray.errors import EngineDead, EngineOverloaded
from focus_ray.serve.ray_client import RayEngineClient, own_errors


class Unreached:
    """A handle, its method and its response: no replica takes the call, and cancelling it repeats
    why, as Serve's responses do.
    """

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.generate = self

    def options(self, **how):
        return self

    def remote(self, submission):
        return self

    def __aiter__(self):
        return self

    async def __anext__(self):
        raise self.error

    def cancel(self):
        raise self.error


@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        pytest.param(BackPressureError(8, 8), EngineOverloaded, id="Serve's queue is full"),
        pytest.param(
            DeploymentUnavailableError(DeploymentID("engine")), EngineDead, id="nothing to call"
        ),
        pytest.param(grpc.RpcError("reset"), EngineDead, id="the connection broke"),
    ],
)
def test_calls_that_reach_no_replica_end_in_our_errors(raised, seen):
    client = RayEngineClient(Unreached(raised))
    with pytest.raises(seen):
        asyncio.run(anext(client.generate(None)))


async def test_a_replica_that_is_cancelled_is_an_engine_that_is_gone():
    """By gRPC its error comes as it is: like a cancellation of whoever waits for it."""
    with pytest.raises(EngineDead), own_errors():
        raise asyncio.CancelledError


async def test_our_own_cancellation_stays_one():
    """Otherwise a request whose client has left would be handed over to another engine."""

    async def wait():
        with own_errors():
            await asyncio.sleep(60)

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
