"""An engine client around another one: what it does not change, it passes on."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import Metric

from focus_ray.openai.messages import Encoded, ModelInfo, Prompt
from focus_ray.serve.client import EngineClient


class ClientWrapper:
    """Everything of ``EngineClient`` but ``generate``, which those that wrap are about.

    Args:
        client: the one inside.
    """

    def __init__(self, client: EngineClient) -> None:
        self._client = client

    async def describe(self) -> ModelInfo:
        return await self._client.describe()

    async def encode(self, prompt: Prompt, with_texts: bool) -> Encoded:
        return await self._client.encode(prompt, with_texts)

    async def decode(self, token_ids: Sequence[int]) -> str:
        return await self._client.decode(token_ids)

    async def check_alive(self, timeout_s: float) -> None:
        await self._client.check_alive(timeout_s)

    def num_engines(self) -> int:
        return self._client.num_engines()

    async def states(self) -> dict[str, int]:
        return await self._client.states()

    async def metrics(self) -> list[Metric]:
        return await self._client.metrics()
