"""Engines that do not start, in a real Ray: what the engine said is the reason that users read."""

from __future__ import annotations

import pytest

from focus_ray.cluster.local_ray import StartFailed
from focus_ray.config import EngineConfig
from focus_ray.serve.args import ServeArgs


@pytest.mark.timeout(180)
def test_the_engines_own_words_are_the_reason(ray_here) -> None:
    args = ServeArgs(
        engine=EngineConfig(device="cpu", max_model_len=99_999_999),
        max_start_attempts=1,
        batch_storage=None,
    )
    server = ray_here.server(args)
    with pytest.raises(StartFailed, match="max_model_len 99999999 is above"), server:
        raise AssertionError("it started")
