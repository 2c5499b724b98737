"""What every rank but the first does: run the steps that rank 0 sends, with its own shard."""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection

from focus_ray.config import EngineConfig
from focus_ray.engine.rank_link import knock

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankSetup:
    """All that a rank is told when its process starts.

    Args:
        config: the engine's.
        rank: 1 to ``tensor_parallel_size - 1``.
        door: where rank 0 waits.
        token: to be let in.
        meeting: host and port at which all ranks meet for collective calls.
        own_host: under which the other ranks reach this process.
        gpu: which of the GPUs that the process sees.
    """

    config: EngineConfig
    rank: int
    door: tuple[str, int]
    token: bytes
    meeting: tuple[str, int]
    own_host: str
    gpu: int


@dataclass(frozen=True)
class Ready:
    """The rank waits for its first step."""


@dataclass(frozen=True)
class Failed:
    """The rank cannot go on."""

    reason: str


@dataclass(frozen=True)
class WhereAreYou:
    """Rank 0 wonders."""


@dataclass(frozen=True)
class At:
    """The answer: steps that the rank has begun, and ended."""

    begun: int
    ended: int


class Life:
    """Signs of life of one rank, answered on a thread of their own, whatever the rank waits for.

    If rank 0 goes, so does this process, at once.
    """

    def __init__(self, connection: Connection) -> None:
        self.begun = self.ended = 0
        self._connection = connection
        self._lock = threading.Lock()
        threading.Thread(target=self._answer, name="life", daemon=True).start()

    def send(self, message: Ready | Failed | At) -> None:
        with self._lock:
            self._connection.send(message)

    def _answer(self) -> None:
        try:
            while True:
                self._connection.recv()
                self.send(At(self.begun, self.ended))
        except (EOFError, OSError):
            os._exit(1)  # the main thread may wait for ever in a collective call


def run_rank(setup: RankSetup) -> None:
    """Start, tell rank 0, and run its steps until it says that there are no more.

    Raises:
        BaseException: whatever ended it early; rank 0 has been told.
    """
    steps = knock(setup.door, setup.token, setup.rank, "steps")
    life = Life(knock(setup.door, setup.token, setup.rank, "life"))
    try:
        _follow(setup, steps, life)
    except BaseException as error:
        logger.exception("rank %d failed", setup.rank)
        life.send(Failed(f"{type(error).__name__}: {error}"))
        raise


def _follow(setup: RankSetup, steps: Connection, life: Life) -> None:
    from focus_ray.engine.rank import choose_device, make_rank
    from focus_ray.models.parallel import find_meeting, join

    config, size = setup.config, setup.config.tensor_parallel_size
    device = choose_device(config, setup.gpu)
    shards = join(
        setup.rank,
        size,
        meeting=find_meeting(*setup.meeting, size),
        own_host=setup.own_host,
        device=device,
    )
    runner = make_rank(config, device, shards).runner
    life.send(Ready())
    while (plan := steps.recv()) is not None:
        life.begun += 1
        runner.launch(plan)
        while runner.num_in_flight > 1:  # as rank 0: one step is taken up behind the next
            runner.collect()
        life.ended += 1
