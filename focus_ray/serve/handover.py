"""Requests outlive their engine: what one replica does not finish, another one goes on with.

A replica may die, lose its engine, or be stopped while it still answers. What it has sent until
then is known here, as token ids; the next one is given the prompt and these, decodes the block that
was interrupted once more, and sends what comes after them. Nothing is sent twice, and the client
sees no more than a pause. Knows neither Ray nor HTTP.

That tokens are the same wherever they are decoded is the engine's business (a draw depends on seed,
position and step alone), and so is text that was held back: it follows from the token ids.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from focus_ray.errors import EngineDead, EngineOverloaded
from focus_ray.openai.messages import Chunk, Submission
from focus_ray.serve.client import EngineClient
from focus_ray.serve.client_wrapper import ClientWrapper

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.2
"""Before the first hand-over; each further one waits four times as long, up to the longest.

A replica whose process has ended is out of the way at once, one whose engine has stopped only when
it is next looked after, once a second, several times over.
"""
LONGEST_PAUSE_S = 4.0
PATIENCE_S = 60.0
"""How long a request that has begun waits for a place among those who are full."""


class HandoverClient(ClientWrapper):
    """An engine client whose generations go on when an engine dies.

    Args:
        client: reaches several replicas, of which it chooses one for each generation.
        max_handovers: how often one request may be handed over; 0: never. A limit, since the
            request may be what the engines die of.
    """

    def __init__(self, client: EngineClient, max_handovers: int) -> None:
        super().__init__(client)
        self._max_handovers = max_handovers

    async def generate(self, submission: Submission) -> AsyncGenerator[Chunk, None]:
        """Chunks of all completions, as from one engine.

        Raises:
            EngineDead: the engine died, and so did ``max_handovers`` others.
            EngineOverloaded: the first engine is full, or no other one has had a place for what an
                engine left behind in ``PATIENCE_S``.
        """
        journal = Journal(with_seed(submission) if self._max_handovers else submission)
        num_handovers, full_since = 0, None
        clock = asyncio.get_running_loop().time
        while True:
            try:
                async with aclosing(self._client.generate(journal.rest(num_handovers))) as chunks:
                    async for chunk in chunks:
                        full_since = None
                        journal.take(chunk)
                        yield (
                            replace(chunk, num_handovers=num_handovers) if num_handovers else chunk
                        )
                return
            except EngineDead as error:
                if journal.is_complete:
                    return
                if num_handovers == self._max_handovers:
                    raise
                pause_s = min(FIRST_PAUSE_S * 4**num_handovers, LONGEST_PAUSE_S)
                num_handovers += 1
                logger.warning(
                    "request %s is handed over, %d of at most %d times, with %d tokens sent: %s",
                    submission.request_id,
                    num_handovers,
                    self._max_handovers,
                    journal.num_tokens,
                    error,
                )
            except EngineOverloaded as error:
                full_since = clock() if full_since is None else full_since
                if not num_handovers or clock() - full_since > PATIENCE_S:
                    raise
                pause_s = error.retry_after_s
            await asyncio.sleep(pause_s)


class Journal:
    """What has been sent of a submission: the tokens of each completion that has not ended."""

    def __init__(self, submission: Submission) -> None:
        self._submission = submission
        self._sent: dict[int, list[int]] = {index: [] for index in range(submission.params.n)}

    @property
    def is_complete(self) -> bool:
        return not self._sent

    @property
    def num_tokens(self) -> int:
        """Sent of what has not ended."""
        return sum(map(len, self._sent.values()))

    def take(self, chunk: Chunk) -> None:
        """Note what is sent."""
        if chunk.finish_reason is None:
            self._sent[chunk.index] += chunk.token_ids
        else:
            del self._sent[chunk.index]

    def rest(self, num_handovers: int) -> Submission:
        """What is still to be generated; as a request of its own, since an engine that has lost
        sight of the former one may still run it.
        """
        if not num_handovers:
            return self._submission
        return replace(
            self._submission,
            request_id=f"{self._submission.request_id}-handover-{num_handovers}",
            continued={index: tuple(token_ids) for index, token_ids in self._sent.items()},
        )


def with_seed(submission: Submission) -> Submission:
    """The submission, with a seed that every engine draws by, if the client sent none."""
    if submission.params.seed is not None:
        return submission
    seed = random.getrandbits(63)
    return replace(submission, params=submission.params.model_copy(update={"seed": seed}))
