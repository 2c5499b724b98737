"""Serving of block-diffusion language models. Names are loaded when they are first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from focus_ray.config import EngineConfig as EngineConfig
    from focus_ray.engine.async_engine import AsyncEngine as AsyncEngine
    from focus_ray.engine.outputs import CompletionOutput as CompletionOutput
    from focus_ray.engine.outputs import RequestOutput as RequestOutput
    from focus_ray.llm import LLM as LLM
    from focus_ray.sampling import RepetitionDetection as RepetitionDetection
    from focus_ray.sampling import SamplingParams as SamplingParams

__version__ = "0.1.0"

_HOME_OF = {
    "LLM": "focus_ray.llm",
    "AsyncEngine": "focus_ray.engine.async_engine",
    "CompletionOutput": "focus_ray.engine.outputs",
    "EngineConfig": "focus_ray.config",
    "RepetitionDetection": "focus_ray.sampling",
    "RequestOutput": "focus_ray.engine.outputs",
    "SamplingParams": "focus_ray.sampling",
}


def __getattr__(name: str) -> object:
    """Import the module that holds a public name, once it is asked for."""
    try:
        home = _HOME_OF[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    value: object = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
