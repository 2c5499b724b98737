"""One engine behind a client interface, with what routers and metrics want to know of it."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from prometheus_client import Metric

from focus_ray.cluster.engine_start import start_engine
from focus_ray.cluster.telemetry import GpuTelemetry
from focus_ray.config import EngineConfig
from focus_ray.engine.outputs import GenerationRequest, TokenDelta
from focus_ray.openai.messages import Chunk, Encoded, ModelInfo, Prompt, Submission
from focus_ray.openai.text_engine import EngineFactory, TextEngine
from focus_ray.serve.autoscaling import OCCUPANCY
from focus_ray.serve.gpu_metrics import gpu_families
from focus_ray.serve.metrics import ReplicaMetrics
from focus_ray.serve.replica_load import ReplicaLoad

logger = logging.getLogger(__name__)

# About half of what one ingress passes on, which takes 0.5 ms of a core for each.
MAX_CHUNKS_PER_S = 1000.0


class Replica:
    """An engine with text in and text out.

    Args:
        config: the engine's.
        model_name: label of the metrics.
        replica_name: label of the metrics; tells replicas of one deployment apart.
        engine_factory: loads the model and starts the engine's step thread.
        max_chunks_per_s: of all requests together, and each gets its share of it. So many requests
            that each of them has text in every step get it less often, several steps at once.
    """

    def __init__(
        self,
        config: EngineConfig,
        model_name: str,
        replica_name: str = "0",
        engine_factory: EngineFactory = start_engine,
        max_chunks_per_s: float = MAX_CHUNKS_PER_S,
    ) -> None:
        self._engine = engine_factory(config)
        self._text = TextEngine(self._engine, self._deltas)
        self._chunk_s = 1.0 / max_chunks_per_s
        self._num_streams = 0
        self._metrics = ReplicaMetrics(self._engine.load, model_name, replica_name)
        self._telemetry = GpuTelemetry(os.environ) if config.device != "cpu" else None

    async def generate(self, submission: Submission) -> AsyncGenerator[Chunk, None]:
        """Chunks of all completions, interleaved; closing aborts the engine's request."""
        with self._metrics.count_refusal():
            async with aclosing(self._text.generate(submission)) as chunks:
                async for chunk in chunks:
                    yield chunk

    async def describe(self) -> ModelInfo:
        """What this engine serves."""
        return await self._text.describe()

    async def encode(self, prompt: Prompt, with_texts: bool) -> Encoded:
        """Token ids of a prompt, and each token as text if wanted."""
        return await self._text.encode(prompt, with_texts)

    async def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included."""
        return await self._text.decode(token_ids)

    async def check_alive(self, timeout_s: float) -> None:
        """Raises EngineDead."""
        await self._text.check_alive(timeout_s)

    def num_engines(self) -> int:
        """It is one."""
        return 1

    async def states(self) -> dict[str, int]:
        """It runs, as it answers."""
        return {"RUNNING": 1}

    async def metrics(self) -> list[Metric]:
        """This engine's metric families, and those of its GPUs."""
        families = self._metrics.collect()
        if self._telemetry is not None:
            readings = await asyncio.to_thread(self._telemetry.read)
            families += gpu_families(readings, *self._metrics.labels)
        return families

    def record_routing_stats(self) -> dict[str, float]:
        """This engine's load for routers; Ray Serve asks often and passes it on."""
        return ReplicaLoad.of(self._engine.load()).as_routing_stats()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What Ray Serve hands to the autoscaling policy."""
        return {OCCUPANCY: ReplicaLoad.of(self._engine.load()).occupancy}

    def shutdown(self) -> None:
        """Stop the engine."""
        self._engine.shutdown()

    async def _deltas(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        """The engine's deltas, as often as this request's share of all chunks allows."""
        if request.continued is not None:
            self._metrics.count_taken_over()
            logger.info(
                "request %s goes on here, behind %d tokens",
                request.request_id,
                sum(map(len, request.continued.values())),
            )
        observer = self._metrics.observer()
        self._num_streams += 1
        try:
            generated = self._engine.generate(request, lambda: self._num_streams * self._chunk_s)
            async with aclosing(generated) as deltas:
                async for delta in deltas:
                    observer.take(delta)
                    if delta.finish_reason is not None:
                        logger.debug(
                            "request %s, completion %d ended: %s, %s",
                            request.request_id,
                            delta.index,
                            delta.finish_reason,
                            delta.stats,
                        )
                    yield delta
        finally:
            self._num_streams -= 1
