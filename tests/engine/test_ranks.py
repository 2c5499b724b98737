"""What rank 0 makes of the others' lives: ranks are threads that follow a script."""

from __future__ import annotations

import threading
import time
from contextlib import suppress

import pytest
import torch

from focus_ray.config import EngineConfig
from focus_ray.engine import ranks as ranks_module
from focus_ray.engine.plan import StepPlan
from focus_ray.engine.rank_link import knock
from focus_ray.engine.rank_process import At, Failed, Ready
from focus_ray.engine.ranks import RankGroup
from focus_ray.errors import EngineDead
from focus_ray.models.parallel import Shards


class Scripted(RankGroup):
    """Every rank is a thread that runs ``scripts[rank](rank)`` on its two connections."""

    def __init__(self, scripts, **config):
        config = {"tensor_parallel_size": len(scripts) + 1, "device": "cpu", **config}
        super().__init__(EngineConfig(**config), "127.0.0.1")
        self.scripts = dict(enumerate(scripts, 1))
        self.killed = set()
        self.ended = {}
        self.threads = {}

    def _start(self, setup):
        def run():
            if self.scripts[setup.rank] is None:
                self.ended[setup.rank] = "exited with status 3"
                return
            with suppress(EOFError, OSError):  # rank 0 has gone
                steps = knock(setup.door, setup.token, setup.rank, "steps")
                life = knock(setup.door, setup.token, setup.rank, "life")
                self.ended[setup.rank] = self.scripts[setup.rank](steps, life)
                steps.close()
                life.close()

        self.threads[setup.rank] = threading.Thread(target=run, daemon=True)
        self.threads[setup.rank].start()

    def _gpu_of(self, rank):
        return 0

    def _end_of(self, rank):
        return self.ended.get(rank)

    def _kill(self, rank):
        self.killed.add(rank)


@pytest.fixture(autouse=True)
def nobody_meets(monkeypatch):
    monkeypatch.setattr(ranks_module, "join", lambda rank, size, **_: Shards())


@pytest.fixture
def started():
    groups = []

    def start(*scripts, **config):
        group = Scripted(scripts, **config)
        groups.append(group)
        group.start(torch.device("cpu"))
        return group

    yield start
    for group in groups:
        group.close()


def good(steps, life):
    """Runs steps until there are no more, and answers whoever asks."""
    life.send(Ready())
    while steps.recv() is not None:
        pass
    return "exited with status 0"


def killed_in_step_two(steps, life):
    life.send(Ready())
    steps.recv(), steps.recv()
    return "was killed by signal 9"


def hangs_in_step_two(steps, life):
    life.send(Ready())
    steps.recv(), steps.recv()
    life.recv()
    life.send(At(begun=2, ended=1))
    time.sleep(10)


def deaf_in_step_two(steps, life):
    life.send(Ready())
    steps.recv(), steps.recv()
    time.sleep(10)


def fails_in_step_two(steps, life):
    life.send(Ready())
    steps.recv(), steps.recv()
    life.send(Failed("OutOfMemoryError: 3 GiB"))
    return "exited with status 1"


def fails_of_another(steps, life):
    """As a rank does whose collective call breaks because another one is gone."""
    life.send(Ready())
    steps.recv(), steps.recv()
    life.send(Failed("RuntimeError: Connection closed by peer"))
    time.sleep(0.1)
    return "exited with status 1"


def run_until_dead(group, steps=200):
    """Send steps, as an engine does; the reason why it ends, and after how many seconds."""
    group.wait_until_ready()
    began = time.monotonic()
    with pytest.raises(EngineDead) as death:
        for _ in range(steps):
            group.send(StepPlan())
            with group.guard():
                wait_in_step(group)
    return str(death.value), time.monotonic() - began


def wait_in_step(group):
    """From the second step on, wait for the other ranks, as in a collective call."""
    if group._num_sent >= 2 and not group._failed.wait(8):
        raise AssertionError("nobody saw that a rank is gone")


def test_plans_reach_every_rank_in_order(started):
    taken = {1: [], 2: []}

    def script(rank):
        def run(steps, life):
            life.send(Ready())
            while (plan := steps.recv()) is not None:
                taken[rank].append(plan.stops)
            return "exited with status 0"

        return run

    group = started(script(1), script(2))
    group.wait_until_ready()
    for i in range(20):
        group.send(StepPlan(stops=[i]))
        with group.guard():
            pass
    group.close()
    assert taken == {1: [[i] for i in range(20)], 2: [[i] for i in range(20)]}
    assert group.failure is None


def test_a_rank_that_dies_is_named_and_takes_all_with_it(started):
    group = started(good, killed_in_step_two)
    reason, seconds = run_until_dead(group)
    assert reason == "tensor parallel: rank 2 died: its process was killed by signal 9"
    assert seconds < 3
    assert group.killed == {1, 2}
    with pytest.raises(EngineDead, match="rank 2"):
        group.check()
    with pytest.raises(EngineDead, match="rank 2"):
        group.send(StepPlan())


def test_who_fails_because_another_died_is_not_blamed(started):
    group = started(fails_of_another, killed_in_step_two)
    reason, _ = run_until_dead(group)
    assert reason == "tensor parallel: rank 2 died: its process was killed by signal 9"


def test_a_rank_that_fails_says_why(started):
    reason, _ = run_until_dead(started(good, fails_in_step_two))
    assert reason == "tensor parallel: rank 2 failed: OutOfMemoryError: 3 GiB"


@pytest.mark.parametrize(
    ("script", "who"),
    [
        pytest.param(hangs_in_step_two, "rank 1 had not run step 2", id="it knows where it is"),
        pytest.param(deaf_in_step_two, "rank 1 did not answer", id="it says nothing at all"),
    ],
)
def test_a_rank_that_hangs_is_named_when_the_step_takes_too_long(started, script, who):
    group = started(script, rank_timeout_s=0.5)
    reason, seconds = run_until_dead(group)
    assert reason == f"tensor parallel: a step did not end within 0.5 s: {who}"
    assert seconds < 4
    assert group.killed == {1}


def test_a_step_of_rank_0_itself_that_fails_is_its_own_error(started):
    group = started(good)
    group.wait_until_ready()
    with pytest.raises(MemoryError, match="rank 0 alone"), group.guard():
        raise MemoryError("rank 0 alone")
    assert group.failure is None


def test_a_broken_collective_call_is_told_by_its_cause(started):
    """The error comes before anybody knows of the death."""
    group = started(killed_in_step_two)
    group.wait_until_ready()
    group.send(StepPlan())
    group.send(StepPlan())
    with pytest.raises(EngineDead, match="rank 1 died"), group.guard():
        raise RuntimeError("Connection closed by peer")


def test_a_process_that_never_comes_in_is_named():
    group = Scripted([good, None])
    with pytest.raises(EngineDead, match="rank 2 did not start: its process exited with status 3"):
        group.start(torch.device("cpu"))
    assert group.killed == {1, 2}


def test_a_rank_that_cannot_load_is_named(started):
    def cannot_load(steps, life):
        life.send(Failed("CheckpointError: no weights"))
        return "exited with status 1"

    with pytest.raises(EngineDead, match="rank 2 failed: CheckpointError: no weights"):
        started(good, cannot_load).wait_until_ready()  # whichever of the two learns of it


def test_ranks_that_do_not_go_by_themselves_are_ended(started, monkeypatch):
    monkeypatch.setattr(ranks_module, "FAREWELL_S", 0.2)

    def stays(steps, life):
        life.send(Ready())
        time.sleep(10)

    group = started(good, stays)
    group.wait_until_ready()
    group.close()
    group.close()  # twice does no harm
    assert group.killed == {1, 2}
    assert group.ended == {1: "exited with status 0"}
    assert group.failure is None
