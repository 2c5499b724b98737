"""What the ingress asks of engines, wherever they run.

``replica.Replica`` is one in the same process, ``ray_client.RayEngineClient`` reaches those behind
a Serve handle, ``handover.HandoverClient`` around it lets requests outlive them, and
``overload.OverloadGuard`` around that lets in no more than they have places for.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from prometheus_client import Metric

from focus_ray.openai.messages import Chunk, Encoded, ModelInfo, Prompt, Submission


class EngineClient(Protocol):
    """Every method raises the errors of ``focus_ray.errors`` and no others on purpose."""

    def generate(self, submission: Submission) -> AsyncGenerator[Chunk, None]:
        """Chunks of all completions, interleaved. Closing the generator aborts the request."""
        ...

    async def describe(self) -> ModelInfo: ...

    async def encode(self, prompt: Prompt, with_texts: bool) -> Encoded: ...

    async def decode(self, token_ids: Sequence[int]) -> str: ...

    async def check_alive(self, timeout_s: float) -> None:
        """Ask the engine itself; EngineDead if it does not answer within ``timeout_s``."""
        ...

    def num_engines(self) -> int:
        """Engines that take requests now, as far as it is known here; costs nothing."""
        ...

    async def states(self) -> dict[str, int]:
        """Number of replicas by state, those that are about to start included."""
        ...

    async def metrics(self) -> list[Metric]:
        """Metric families of every engine, each family once."""
        ...
