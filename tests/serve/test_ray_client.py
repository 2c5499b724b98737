"""The engine client over a handle that a test writes. No Ray runs here."""

from __future__ import annotations

import asyncio

import pytest
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from focus_ray.errors import EngineDead, EngineOverloaded
from focus_ray.serve.ray_client import RayEngineClient


class Unreached:
    """A handle, its method and its response: no replica takes the call, and cancelling it repeats
    why, as Serve's responses do.
    """

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.generate = self

    def options(self, stream):
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
    ],
)
def test_calls_that_reach_no_replica_end_in_our_errors(raised, seen):
    client = RayEngineClient(Unreached(raised))
    with pytest.raises(seen):
        asyncio.run(anext(client.generate(None)))
