"""The runner of an engine whose model is shared by several ranks: rank 0's own, and the others'."""

from __future__ import annotations

from dataclasses import replace

from focus_ray.engine.plan import StepPlan, StepResult
from focus_ray.engine.ranks import RankGroup
from focus_ray.engine.runner import Runner


class RankedRunner:
    """Sends each plan to all ranks and runs it here; results are those of this rank.

    All ranks find the same, bit for bit, so nothing comes back from the others.

    Args:
        own: rank 0's.
        ranks: the others.
    """

    def __init__(self, own: Runner, ranks: RankGroup) -> None:
        self.own = own
        self._ranks = ranks

    @property
    def waited_s(self) -> float:
        return self.own.waited_s

    def launch(self, plan: StepPlan) -> None:
        """As ``Runner.launch``.

        Raises:
            EngineDead: a rank failed; says which, and why.
        """
        plan = replace(plan, evicts=self.own.decide(plan))  # by times, which each rank has its own
        self._ranks.send(plan)
        with self._ranks.guard():
            self.own.launch(plan)

    def collect(self) -> StepResult:
        """As ``Runner.collect``.

        Raises:
            EngineDead: a rank failed; says which, and why.
        """
        with self._ranks.guard():
            return self.own.collect()
