"""Engines that do not start, in a real Ray: what the engine said is the reason that users read."""

from __future__ import annotations

import pytest

from focus_ray.cluster.local_ray import StartFailed
from focus_ray.errors import CheckpointError
from focus_ray.serve.args import ServeArgs


@pytest.mark.timeout(180)
def test_the_engines_own_words_are_the_reason(ray_here) -> None:
    def broken(config):  # goes to Ray's process by value
        raise CheckpointError("no weights: a, b")

    server = ray_here.server(ServeArgs(max_start_attempts=1, batch_storage=None), broken)
    with pytest.raises(StartFailed, match="no weights: a, b"), server:
        raise AssertionError("it started")
