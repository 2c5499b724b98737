"""An engine over the small random SDAR, for tests of what an engine decides."""

from __future__ import annotations

from typing import Protocol

from focus_ray.config import EngineConfig
from focus_ray.engine.engine import Engine


class Placed(Protocol):
    """A checkpoint and the device to run it on."""

    @property
    def path(self) -> str: ...
    @property
    def device(self) -> str: ...


def small_engine(model: Placed, **overrides: object) -> Engine:
    """With room for what tests ask, and answers that depend on nothing else that runs."""
    settings: dict[str, object] = {
        "model": model.path,
        "device": model.device,
        "dtype": "float32",
        "focus_adaptive": False,  # evict in every step, on a GPU too
        "enforce_eager": True,  # test_step_loop.py has recorded steps
        "block_length": 16,
        "page_size": 16,
        "num_pages": 400,
        "max_num_seqs": 64,
        "confidence_threshold": 0.5,
    }
    return Engine(EngineConfig.model_validate({**settings, **overrides}))
