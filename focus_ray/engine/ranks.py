"""The other ranks of an engine, as rank 0 sees them: started, told each step, watched, ended."""

from __future__ import annotations

import contextlib
import logging
import pickle
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import TypeVar

import torch

from focus_ray.config import EngineConfig
from focus_ray.engine.plan import StepPlan
from focus_ray.engine.rank_link import Door
from focus_ray.engine.rank_process import At, Failed, RankSetup, Ready, WhereAreYou
from focus_ray.errors import EngineDead
from focus_ray.models.parallel import Shards, join, open_meeting

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

LOOK_EVERY_S = 0.2
ANSWER_S = 1.0
"""How long a rank may take to say where it is; a thread does nothing else."""
SETTLE_S = 0.5
"""When one rank dies, others fail of it; reasons that come in so shortly are weighed together."""
FAREWELL_S = 5.0


class RankGroup(ABC):
    """Ranks 1 and above of one engine. Subclasses say how a process is started and ended.

    Any rank that dies, fails or hangs ends all of them: ``failure`` says why, and whoever waits for
    a rank in a collective call is let go.

    Args:
        config: with a ``tensor_parallel_size`` above 1.
        host: address of this machine under which the ranks reach it.
    """

    def __init__(self, config: EngineConfig, host: str) -> None:
        self.config = config
        self.failure: EngineDead | None = None
        self._host = host
        self._shards: Shards | None = None
        self._steps: dict[int, Connection] = {}
        self._life: dict[int, Connection] = {}
        self._where: dict[int, At] = {}
        self._ready: set[int] = set()
        self._news = threading.Condition()
        self._reasons: list[tuple[bool, str]] = []  # whether it is a death, and how to say it
        self._failed = threading.Event()
        self._closing = threading.Event()
        self._busy_since: float | None = None
        self._num_sent = 0

    # --- what subclasses say --------------------------------------------------------------------

    @abstractmethod
    def _start(self, setup: RankSetup) -> None:
        """Start the process of a rank; do not wait for it."""

    @abstractmethod
    def _gpu_of(self, rank: int) -> int:
        """Which of the GPUs that its process sees a rank takes."""

    @abstractmethod
    def _end_of(self, rank: int) -> str | None:
        """How the process of a rank ended, in words; None while it runs."""

    @abstractmethod
    def _kill(self, rank: int) -> None:
        """End the process of a rank now, if it still runs."""

    # --- start ----------------------------------------------------------------------------------

    @property
    def ranks(self) -> range:
        return range(1, self.config.tensor_parallel_size)

    def start(self, device: torch.device) -> Shards:
        """Start all ranks and meet them; they load their shards from then on.

        Args:
            device: of rank 0.

        Raises:
            EngineDead: a rank failed; says which, and why.
        """
        size = self.config.tensor_parallel_size
        door = Door(self._host)
        try:
            meeting = open_meeting(self._host, size)
            for rank in self.ranks:
                self._start(
                    RankSetup(
                        config=self.config,
                        rank=rank,
                        door=door.address,
                        token=door.token,
                        meeting=(self._host, meeting.port),
                        own_host=self._host,
                        gpu=self._gpu_of(rank),
                    )
                )
            self._let_in(door)
        except BaseException:
            self.close()
            raise
        finally:
            door.close()
        for rank in self.ranks:
            self._thread(self._listen, rank)
        self._thread(self._watch)
        with self.guard():
            self._shards = self._unless_failed(
                lambda: join(0, size, meeting=meeting, own_host=self._host, device=device)
            )
        return self._shards

    def wait_until_ready(self) -> None:
        """Until every rank waits for its first step.

        Raises:
            EngineDead: a rank failed; says which, and why.
        """
        with self._news:
            while len(self._ready) < len(self.ranks):
                self._news.wait(LOOK_EVERY_S)
                self.check()

    def _let_in(self, door: Door) -> None:
        while len(self._steps) + len(self._life) < 2 * len(self.ranks):
            for rank in self.ranks:
                if (end := self._end_of(rank)) is not None:
                    raise EngineDead(f"rank {rank} did not start: its process {end}")
            if (guest := door.accept(LOOK_EVERY_S)) is not None:
                rank, purpose, connection = guest
                (self._steps if purpose == "steps" else self._life)[rank] = connection

    def _unless_failed(self, action: Callable[[], Result]) -> Result:
        """The result of what may wait for a rank, unless one fails meanwhile."""
        results: list[Result] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(action())
            except BaseException as error:
                errors.append(error)

        thread = self._thread(run)
        while thread.is_alive():
            thread.join(LOOK_EVERY_S)
            self.check()
        if errors:
            raise errors[0]
        return results[0]

    # --- steps ----------------------------------------------------------------------------------

    def send(self, plan: StepPlan) -> None:
        """Let every rank launch a step.

        Raises:
            EngineDead: a rank is gone.
        """
        self.check()
        message = pickle.dumps(plan, pickle.HIGHEST_PROTOCOL)
        self._num_sent += 1
        try:
            for connection in self._steps.values():
                connection.send_bytes(message)
        except OSError:
            self._failed.wait(2 * SETTLE_S)
            self.check()
            raise

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Around what waits for the ranks: it is timed, and their failure is what is raised.

        Raises:
            EngineDead: a rank failed; says which, and why.
        """
        self._busy_since = time.monotonic()
        try:
            yield
        except BaseException as error:
            # A rank that is gone breaks the collective call before anybody knows why.
            if not isinstance(error, EngineDead) and self._failed.wait(2 * SETTLE_S):
                self.check()
            raise
        finally:
            self._busy_since = None
        self.check()

    def check(self) -> None:
        """Raise EngineDead if a rank failed."""
        if self.failure is not None:
            raise self.failure

    # --- life and death -------------------------------------------------------------------------

    def _thread(self, target: Callable[..., None], *args: object) -> threading.Thread:
        thread = threading.Thread(target=target, args=args, name="ranks", daemon=True)
        thread.start()
        return thread

    def _listen(self, rank: int) -> None:
        """Take up what a rank says, until it is gone."""
        try:
            while True:
                message = self._life[rank].recv()
                if isinstance(message, Failed):
                    self._fail(f"rank {rank} failed: {message.reason}", death=False)
                    return
                with self._news:
                    if isinstance(message, Ready):
                        self._ready.add(rank)
                    elif isinstance(message, At):
                        self._where[rank] = message
                    self._news.notify_all()
        except (EOFError, OSError):
            if not self._closing.is_set():
                end = self._wait_for_end(rank)
                self._fail(f"rank {rank} died: its process {end}", death=True)

    def _wait_for_end(self, rank: int) -> str:
        """How it ended, once that is known."""
        deadline = time.monotonic() + SETTLE_S / 2
        while (end := self._end_of(rank)) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return end or "closed its connection"

    def _watch(self) -> None:
        """Weigh reasons when there are some, and find out who hangs when a step takes too long."""
        while not self._closing.wait(LOOK_EVERY_S):
            since, timeout_s = self._busy_since, self.config.rank_timeout_s
            if since is not None and self._is_started and time.monotonic() - since > timeout_s:
                self._fail(f"a step did not end within {timeout_s:g} s: {self._who_hangs()}")
                return

    @property
    def _is_started(self) -> bool:
        return len(self._ready) == len(self.ranks)

    def _who_hangs(self) -> str:
        with self._news:
            self._where.clear()
            for connection in self._life.values():
                with contextlib.suppress(OSError):
                    connection.send(WhereAreYou())
            self._news.wait_for(lambda: len(self._where) == len(self.ranks), ANSWER_S)
            where = dict(self._where)
        silent = [rank for rank in self.ranks if rank not in where]
        if silent:
            return f"{_named(silent)} did not answer"
        behind = [rank for rank, at in where.items() if at.ended < self._num_sent]
        if not behind:
            return "rank 0 waits, and all others have run it"
        return f"{_named(behind)} had not run step {self._num_sent}"

    def _fail(self, reason: str, *, death: bool = True) -> None:
        """The first failure ends everything, after a moment in which others may tell more."""
        with self._news:
            self._reasons.append((death, reason))
            if len(self._reasons) > 1:
                return
        self._thread(self._end_with_reason)

    def _end_with_reason(self) -> None:
        time.sleep(SETTLE_S)
        with self._news:
            # A rank that died is the cause, one that lost it in a collective call the effect.
            reasons = sorted(self._reasons, key=lambda reason: not reason[0])
        self.failure = EngineDead(f"tensor parallel: {reasons[0][1]}")
        logger.error("%s", self.failure)
        self._failed.set()
        with self._news:
            self._news.notify_all()
        for rank in self.ranks:
            self._kill(rank)
        if self._shards is not None:
            self._shards.abort()

    def close(self) -> None:
        """End all ranks: those that wait for a step by themselves, others by force."""
        if self._closing.is_set():
            return
        self._closing.set()
        for connection in self._steps.values():
            with contextlib.suppress(OSError):
                connection.send(None)
        expected = self._is_started and self.failure is None
        deadline = time.monotonic() + (FAREWELL_S if expected else 0.0)
        while time.monotonic() < deadline and any(self._end_of(r) is None for r in self.ranks):
            time.sleep(0.01)
        for rank in self.ranks:
            self._kill(rank)
        for connection in (*self._steps.values(), *self._life.values()):
            connection.close()


def _named(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
