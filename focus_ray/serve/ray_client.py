"""The engine client over a Serve handle. Everything alpha about handles stands in this file."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

import grpc  # type: ignore[import-untyped]  # has no stubs of its own
from prometheus_client import Metric
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
    RequestCancelledError,
)
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from focus_ray.errors import EngineDead, EngineOverloaded, FocusRayError
from focus_ray.openai.messages import Chunk, Encoded, ModelInfo, Prompt, Submission
from focus_ray.serve.metrics import merge_families

# A replica's own answer, "my engine does not answer", should come before we give up on it.
REPLICA_GRACE_S = 1.0
# The replica died, is being stopped, or never came up.
GONE = (
    grpc.RpcError,
    RayActorError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
    RequestCancelledError,
)
REPLICA_ENDED = "the engine's process ended; a new one is started, try again soon"


class RayEngineClient:
    """Reaches the engines behind a Serve deployment of ``Replica``.

    Args:
        handle: of that deployment.
    """

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle
        # From the replica's socket, not as objects of Ray's, which take thrice the CPU time.
        self._streaming = handle.options(
            stream=True,
            _by_reference=False,
            request_serialization="pickle",
            response_serialization="pickle",
        )

    async def generate(self, submission: Submission) -> AsyncGenerator[Chunk, None]:
        """Chunks of all completions; closing aborts the engine's request."""
        response = cast(
            "DeploymentResponseGenerator[Chunk]", self._streaming.generate.remote(submission)
        )
        try:
            with own_errors():
                async for chunk in response:
                    yield chunk
        finally:
            # Merely dropping the response would let the engine run to the end. A response that
            # never reached a replica raises here once more what kept it from there.
            with suppress(BackPressureError, *GONE):
                response.cancel()  # type: ignore[no-untyped-call]

    async def describe(self) -> ModelInfo:
        """What the engines serve."""
        with own_errors():
            return cast(ModelInfo, await self._handle.describe.remote())

    async def encode(self, prompt: Prompt, with_texts: bool) -> Encoded:
        """Token ids of a prompt."""
        with own_errors():
            return cast(Encoded, await self._handle.encode.remote(prompt, with_texts))

    async def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids."""
        with own_errors():
            return cast(str, await self._handle.decode.remote(token_ids))

    async def check_alive(self, timeout_s: float) -> None:
        """EngineDead if no replica's engine answers."""
        answers = await _ask_all(self._handle, "check_alive", timeout_s, timeout_s)
        errors = [answer for answer in answers if isinstance(answer, BaseException)]
        if len(errors) < len(answers):
            return
        if not errors:
            raise EngineDead("no engine is running yet, or any more")
        with own_errors():
            raise errors[0]

    def num_engines(self) -> int:
        """Replicas that Serve's router would send to; one until it was told of any or none.

        Serve lets calls wait where there is none, and has no public way to ask before. The router
        belongs to another thread, but the number of its replicas can be read from any.
        """
        router: Any = self._handle._router
        told = router and router._asyncio_router._request_router
        return len(told.curr_replicas) if told else 1

    async def states(self) -> dict[str, int]:
        """Number of replicas by state, as Serve's controller has it."""
        with own_errors():
            status = await asyncio.to_thread(serve.status)
        application = status.applications[self._handle.app_name]
        found = application.deployments[self._handle.deployment_name].replica_states
        return {
            str(getattr(state, "value", state)): count for state, count in found.items() if count
        }

    async def metrics(self) -> list[Metric]:
        """Metric families of all replicas; one that does not answer is left out."""
        return await metrics_of(self._handle)


async def metrics_of(handle: DeploymentHandle[Any]) -> list[Metric]:
    """Of all replicas of a deployment that have ``metrics``; what does not answer is left out."""
    answers = await _ask_all(handle, "metrics", REPLICA_GRACE_S)
    return merge_families(a for a in answers if not isinstance(a, BaseException))


async def _ask_all(
    handle: DeploymentHandle[Any], method: str, timeout_s: float, *args: object
) -> list[Any]:
    response = handle.broadcast(method, *args)
    try:
        results = response.results_async(return_exceptions=True)
        return cast("list[Any]", await asyncio.wait_for(results, timeout_s + REPLICA_GRACE_S))
    except TimeoutError:
        return [EngineDead(f"no engine answered within {timeout_s} s")]


@contextmanager
def own_errors() -> Iterator[None]:
    """Turn what Ray raises back into what the replica raised, or into what it means to us."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, FocusRayError):
            raise error.cause from None
        raise
    except BackPressureError as error:
        raise EngineOverloaded(str(error), error.retry_after_s or 1.0) from error
    except GONE as error:
        raise EngineDead(REPLICA_ENDED) from error
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        # Nobody here cancels: the replica is being stopped, and tells by the error it met itself.
        raise EngineDead(REPLICA_ENDED) from error
