"""One rank: the model, its KV pages, the slots of the running sequences, and a step at a time.

The host launches a step and reads its results after it has launched the next one. Within a step it
waits for two small counts: how many tokens there are to process, and how many are retained; the
device has other work meanwhile. M slots, B block length, S rows.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from focus_ray.engine.adaptive import EvictionChooser
from focus_ray.engine.block_state import BlockState
from focus_ray.engine.host_copies import HostCopies, HostCopy
from focus_ray.engine.plan import StepPlan, StepResult, StepTrace
from focus_ray.engine.policy import DecodingPolicy
from focus_ray.engine.rank_check import RankCheck
from focus_ray.engine.step_parts import StepParts
from focus_ray.engine.step_work import StepWork
from focus_ray.kernels.plan_rows import plan_rows
from focus_ray.kernels.rows import Rows
from focus_ray.kernels.slot_words import COUNTS
from focus_ray.kernels.unmasking import choose_unmasked, quota
from focus_ray.models.kv_cache import KVCache

DECODED_TOKENS = COUNTS.index("decoded_tokens")


@dataclass(frozen=True)
class StepCounts:
    """What ``plan_rows`` counted; tokens of the step's prefill are in ``num_tokens`` too."""

    num_tokens: int = 0
    num_open: int = 0
    num_rows: int = 0
    num_slots: int = 0
    num_prefill: int = 0


@dataclass(frozen=True)
class _Launched:
    """A step on its way, and what it takes to understand what it leaves behind."""

    words: HostCopy
    started: list[int]
    size: StepCounts
    evicts: bool
    num_retained: int
    num_logit_rows: int
    top: dict[str, HostCopy]
    trace: dict[str, HostCopy]


class Runner:
    """Runs the plans of steps on one device, in order.

    Args:
        rows: written by the planning of each step, read by its parts.
        policy: what steps leave out.
        chooser: decides per step whether it leaves out anything; None: it does.
        diagnose_every: in every so many steps, find what would be decoded without eviction;
            0: never.
        rank_check: compares what ranks hold; None: nobody does.

    Attributes:
        work: what the steps collected so far had to do.
    """

    def __init__(
        self,
        state: BlockState,
        cache: KVCache,
        rows: Rows,
        parts: StepParts,
        policy: DecodingPolicy,
        *,
        chooser: EvictionChooser | None = None,
        diagnose_every: int = 0,
        rank_check: RankCheck | None = None,
    ) -> None:
        self.state = state
        self.rows = rows
        self.parts = parts
        self.policy = policy
        self.chooser = chooser
        self.work = StepWork()
        self._cache = cache
        self._diagnose_every = diagnose_every
        self._rank_check = rank_check
        self._num_launched = 0
        self._copies = HostCopies(state.device)
        self._launched: deque[_Launched] = deque()
        self._last_size = StepCounts()
        self._counts_MC = np.zeros((state.num_slots, len(COUNTS)), np.int32)

    @property
    def vocab_size(self) -> int:
        """Ids that a token may have."""
        return self.parts.choosing.vocab_size

    @property
    def num_in_flight(self) -> int:
        """Steps that were launched and not collected."""
        return len(self._launched)

    @property
    def waited_s(self) -> float:
        """Seconds that the host has waited for the device, in total."""
        return self._copies.waited_s

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> None:
        """Queue one pass over everything that decodes and what the plan prefills.

        Waits until the device has nothing else to do, and then until it knows what is retained.
        """
        self.state.take(plan)
        decodable_MB = None
        if self._diagnose_every and self._num_launched % self._diagnose_every == 0:
            decodable_MB = self._decodable(plan)
        evicts = self.decide(plan) if plan.evicts is None else plan.evicts
        policy = self.policy if evicts else self.policy.keeping_all()
        size = self.plan_rows(policy, plan.num_prefill_tokens)
        self._num_launched += 1  # only now: where not all fit, a diagnosis looks at the same slots
        self._last_size = size
        num_retained = num_open = 0
        top: dict[str, HostCopy] = {}
        trace: dict[str, HostCopy] = {}
        if size.num_tokens:
            num_retained, num_open = self._forward(size, policy.by_importance)
            if plan.record_trace:
                trace = self._copy_trace(policy.by_importance)
            found = self.parts.choose(plan, num_open, decodable_MB)
            if plan.record_trace:
                trace["confidences_MB"] = self._copies.start(self.parts.choosing.confidence_MB)
            if self._rank_check is not None:
                self._rank_check.compare(self._num_launched, self._held(size.num_tokens))
            if found is not None:
                top = dict(zip(("ids", "logprobs"), map(self._copies.start, found), strict=True))
        self._launched.append(
            _Launched(
                words=self._copies.start(self.state.words.words_MW),
                started=[start.slot for start in plan.starts],
                size=size,
                evicts=policy.evicts,
                num_retained=num_retained,
                num_logit_rows=num_open,
                top=top,
                trace=trace,
            )
        )

    def collect(self) -> StepResult:
        """Results of the oldest step that was launched and not collected.

        Raises:
            IndexError: there is none.
        """
        launched = self._launched.popleft()
        layout = self.state.layout
        words_MW = self._copies.wait(launched.words).numpy()
        floats_MW = words_MW.view(np.float32)
        self._learn(launched, words_MW)
        top = {name: self._copies.wait(copy).numpy() for name, copy in launched.top.items()}
        trace = {name: self._copies.wait(copy).numpy() for name, copy in launched.trace.items()}
        return StepResult(
            active_M=words_MW[:, layout.word("active")] != 0,
            block_start_M=words_MW[:, layout.word("block_start")],
            token_ids_MB=words_MW[:, layout.array("token_ids")],
            decoded_MB=words_MW[:, layout.array("decoded")] != 0,
            logprobs_MB=floats_MW[:, layout.array("logprobs")],
            closed_ids_MB=words_MW[:, layout.array("closed_ids")],
            closed_logprobs_MB=floats_MW[:, layout.array("closed_logprobs")],
            denoising_step_M=words_MW[:, layout.word("denoising_step")],
            post_steps_M=words_MW[:, layout.word("post_steps")],
            counts_MC=words_MW[:, layout.counts],
            num_tokens=launched.size.num_tokens,
            top_ids_MBK=top.get("ids"),
            top_logprobs_MBK=top.get("logprobs"),
            trace=StepTrace(**trace) if trace else None,
        )

    @torch.inference_mode()
    def rehearse_passes(self) -> None:
        """Run both parts of the pass at their largest size, on nobody's tokens."""
        self.plan_rows(self.policy, 0)
        size = self.parts.size(len(self.rows.token_ids_C), len(self.rows.row_slot_S))
        for by_importance in sorted({False, self.policy.by_importance}):
            self.parts.head(size, by_importance)
        self.parts.tail(size)

    @torch.inference_mode()
    def rehearse_choice(self, plan: StepPlan) -> None:
        """Look at as many open tokens as there can be, with the wishes of ``plan``."""
        self.plan_rows(self.policy, 0)
        self.state.words.scalar("temperature").fill_(1.0)  # so that nobody is greedy
        self.parts.look(plan, self.parts.choosing.num_places)

    @torch.inference_mode()
    def record(self, plain_too: bool) -> None:
        """Record all parts as CUDA graphs, on nobody's tokens.

        Args:
            plain_too: also steps that evict nothing, whatever the policy.
        """
        self.plan_rows(self.policy, 0)
        self.parts.record(sorted({self.policy.by_importance, *([False] if plain_too else [])}))

    def decide(self, plan: StepPlan) -> bool:
        """Whether the step of a plan may evict: always, or where that decodes faster."""
        if self.chooser is None:
            return True
        last, num_prefill = self._last_size, plan.num_prefill_tokens
        num_slots = last.num_slots or len(plan.starts)
        decoding = last.num_tokens - last.num_prefill
        if not last.num_slots:
            decoding = num_slots * self.state.block_length * 2 // 3  # about what a block still has
        return self.chooser.choose(
            num_processed=decoding + num_prefill, num_prefill=num_prefill, num_slots=num_slots
        )

    def plan_rows(self, policy: DecodingPolicy, num_prefill: int) -> StepCounts:
        """Write the rows of the next step; how many tokens it has."""
        state = self.state
        plan_rows(
            state.words,
            state.page_table_MP,
            state.prefill_slot_F,
            state.prefill_start_F,
            state.prefill_ids_FB,
            state.num_prefill_1,
            policy.rule,
            page_size=self._cache.page_size,
            trash_slot=self._cache.trash_slot,
            first_slot=self._num_launched % state.num_slots,
            out=self.rows,
        )
        counts = self._copies.wait(self._copies.start(self.rows.counts_4)).tolist()
        num_tokens, num_open, num_rows, num_slots = counts
        return StepCounts(num_tokens, num_open, num_rows, num_slots, num_prefill)

    def _forward(self, size: StepCounts, by_importance: bool) -> tuple[int, int]:
        """All layers; how many tokens were retained, and how many of these are open."""
        parts, passes = self.parts, self.parts.passes
        step_size = parts.size(size.num_tokens, size.num_rows)
        parts.head(step_size, by_importance)
        if not by_importance:
            parts.tail(step_size)
            return size.num_tokens, size.num_open
        copy = self._copies.start(passes.retained.counts_2)
        passes.compact(step_size)  # while the counts are on their way
        num_retained, num_open = self._copies.wait(copy).tolist()
        parts.tail(parts.size(num_retained, size.num_rows))
        return num_retained, num_open

    def _decodable(self, plan: StepPlan) -> Tensor | None:
        """``[M, B]`` bool: what the step would decode without eviction; leaves no trace in KV."""
        size = self.plan_rows(self.policy.keeping_all(), plan.num_prefill_tokens)
        if not size.num_tokens:
            return None
        written_T = self.rows.slot_C[: size.num_tokens].clone()
        saved = self._cache.read(written_T)
        _, num_open = self._forward(size, by_importance=False)
        self.parts.look(replace(plan, num_top_logprobs=None), num_open)
        words = self.state.words
        step_M = words.scalar("denoising_step")
        chosen_MB = choose_unmasked(
            self.parts.choosing.confidence_MB,
            self._by_slot(self.rows.masked_SB),
            strategy_N=words.scalar("strategy"),
            threshold_N=words.scalar("threshold"),
            quota_N=quota(self.state.block_length, words.scalar("num_steps").clamp_min(1), step_M),
        )
        self._cache.write(written_T, saved)
        return chosen_MB

    def _held(self, num_tokens: int) -> dict[str, Tensor]:
        """What all ranks must agree on after a step."""
        rows = self.rows
        taken_2T = torch.stack((rows.positions_C[:num_tokens], rows.slot_C[:num_tokens]))
        return {
            "processing sets": taken_2T,
            "retained tokens": self._by_slot(self.parts.passes.kept_SB),
            "blocks": self.state.words.words_MW,
        }

    def _by_slot(self, rows_SB: Tensor) -> Tensor:
        """What stands in the rows of the current blocks, ``[M, B]``; 0 where one takes no part."""
        row_M = self.rows.row_of_slot_M
        return rows_SB[row_M.clamp_min(0).long()] * (row_M >= 0)[:, None]

    def _copy_trace(self, by_importance: bool) -> dict[str, HostCopy]:
        """Before the blocks move on."""
        rows, passes = self.rows, self.parts.passes
        took_part_M = rows.row_of_slot_M >= 0
        found = {
            "took_part_M": took_part_M,
            "processed_MB": self._by_slot(rows.processed_SB),
            "retained_MB": self._by_slot(passes.kept_SB),
            "leftover_MB": (self.state.words.array("leftover") != 0) & took_part_M[:, None],
        }
        if by_importance:
            found["deltas_MB"] = self._by_slot(passes.retained.delta_NB)
        return {name: self._copies.start(tensor) for name, tensor in found.items()}

    def _learn(self, launched: _Launched, words_MW: NDArray[np.int32]) -> None:
        """Take up what a step did, for the numbers and for the decisions to come."""
        layout = self.state.layout
        counts_MC = words_MW[:, layout.counts].copy()
        self._counts_MC[launched.started] = 0
        num_decoded = int((counts_MC - self._counts_MC)[:, DECODED_TOKENS].sum())
        self._counts_MC = counts_MC
        size, work = launched.size, self.work
        if not size.num_tokens:
            return
        work.evicting_steps += launched.evicts
        work.layer_tokens += launched.num_retained
        work.padded_tokens += self.parts.size(launched.num_retained, size.num_rows).num_tokens
        work.logit_rows += launched.num_logit_rows
        end_M = words_MW[:, layout.word("block_start")] + layout.block_length
        work.kv_positions += int((end_M * words_MW[:, layout.word("active")]).sum())
        if self.chooser is not None:
            self.chooser.observe(
                evicted=launched.evicts,
                num_slots=size.num_slots,
                num_processed=size.num_tokens,
                num_retained=launched.num_retained,
                num_prefill=size.num_prefill,
                num_decoded=num_decoded,
            )
