"""One rank: the model, its KV pages, the block state, and one forward pass per step.

Letters: N decoding slots, R rows of one block each (decoding first, then prefill), T tokens of
these that are processed, K decoding tokens that are retained, B block length, P pages per row,
H hidden size, Q masked positions that need logits. A token's place is ``row * B + position``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from focus_ray.engine.block_state import BlockState
from focus_ray.engine.decoding import choose_unmasked, quota
from focus_ray.engine.plan import StepPlan, StepResult
from focus_ray.engine.policy import DecodingPolicy, DelayedCache
from focus_ray.engine.sampler import RowParams, choose_tokens
from focus_ray.models.base import BlockDiffusionModel
from focus_ray.models.eviction import Eviction
from focus_ray.models.kv_cache import KVCache
from focus_ray.models.step import StepTensors

LOGITS_BYTES = 512 << 20
"""Logits held at once; a vocabulary of 151936 takes 0.3 MB a row in bfloat16."""


@dataclass
class _Candidates:
    """What the logits of a step say about each retained masked position."""

    token_ids_NB: Tensor
    confidences_NB: Tensor
    logprobs_NB: Tensor
    top_ids_NBK: Tensor | None
    top_logprobs_NBK: Tensor | None


@dataclass
class _Decision:
    """What one forward pass decides: who went to the end, and which masked tokens are decoded."""

    kept_NB: Tensor
    found: _Candidates
    chosen_NB: Tensor
    deltas_NB: Tensor | None


class Runner:
    """Runs the plan of a step on one device.

    Args:
        model: the loaded model, in evaluation mode.
        vocab_size: width of its logits.
        cache: KV pages of all layers.
        state: slots of the running sequences; the runner is its only writer.
        policy: which tokens of a block a step processes and retains.
        diagnose_every: in every so many steps, find what would be decoded without eviction;
            0: never.
    """

    def __init__(
        self,
        model: BlockDiffusionModel,
        vocab_size: int,
        cache: KVCache,
        state: BlockState,
        policy: DecodingPolicy,
        diagnose_every: int = 0,
    ) -> None:
        self.model = model
        self.vocab_size = vocab_size
        self.cache = cache
        self.state = state
        self.policy = policy
        self._diagnose_every = diagnose_every
        self._num_steps = 0
        self._offset_B = torch.arange(state.block_length, device=state.device)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """One forward pass over the decoding blocks and the prefill chunks of ``plan``."""
        state = self.state
        state.start(plan.starts)
        state.update_pages(plan.page_updates)
        slots_N = torch.as_tensor(plan.decode_slots_N, device=state.device)
        decodable_NB = None
        if len(slots_N) and self._diagnose_every and self._num_steps % self._diagnose_every == 0:
            decodable_NB = self._decodable(plan, slots_N)
        self._num_steps += 1

        decoded_NB = state.decoded_MB[slots_N]
        processed_NB = self.policy.processing_set(state, slots_N)
        eviction = None
        if len(slots_N):
            eviction = self.policy.eviction(state, slots_N, processed_NB)
        step = self._step_tensors(plan, slots_N, processed_NB)
        decision = self._decide(plan, slots_N, processed_NB, step, eviction)
        found, chosen_NB = decision.found, decision.chosen_NB
        token_ids_NB = torch.where(chosen_NB, found.token_ids_NB, state.token_ids_MB[slots_N])
        decoded_NB = decoded_NB | chosen_NB
        state.advance(slots_N, token_ids_NB, decoded_NB, decision.kept_NB)
        return StepResult(
            token_ids_NB=token_ids_NB.to("cpu", torch.int32).numpy(),
            decoded_NB=decoded_NB.cpu().numpy(),
            confidences_NB=found.confidences_NB.cpu().numpy(),
            logprobs_NB=found.logprobs_NB.cpu().numpy(),
            processed_NB=processed_NB.cpu().numpy(),
            retained_NB=decision.kept_NB.cpu().numpy(),
            top_ids_NBK=_to_numpy(found.top_ids_NBK),
            top_logprobs_NBK=_to_numpy(found.top_logprobs_NBK),
            deltas_NB=_to_numpy(decision.deltas_NB) if plan.record_deltas else None,
            decodable_NB=_to_numpy(decodable_NB),
        )

    def _decide(
        self,
        plan: StepPlan,
        slots_N: Tensor,
        processed_NB: Tensor,
        step: StepTensors,
        eviction: Eviction | None,
    ) -> _Decision:
        """Run the model and choose, among what it retained, the tokens to decode."""
        state = self.state
        hidden_TH = self.model(step, self.cache, eviction)
        masked_NB = ~state.decoded_MB[slots_N]
        if eviction is None:
            kept_NB, deltas_NB = processed_NB, None
            place_K = kept_NB.flatten().nonzero()[:, 0]
            row_Q = masked_NB.flatten()[place_K].nonzero()[:, 0]
            place_Q = place_K[row_Q]
        else:
            kept_NB, deltas_NB = eviction.kept_NB, eviction.delta_NB
            row_Q, place_Q = eviction.masked_row_Q, eviction.masked_place_Q
        found = self._look(plan, slots_N, hidden_TH, row_Q, place_Q)
        chosen_NB = choose_unmasked(
            found.confidences_NB,
            kept_NB & masked_NB,
            strategy_N=state.strategy_M[slots_N],
            threshold_N=state.threshold_M[slots_N],
            quota_N=quota(
                state.block_length,
                state.denoising_steps_M[slots_N],
                state.denoising_step_M[slots_N],
            ),
        )
        return _Decision(kept_NB, found, chosen_NB, deltas_NB)

    def _decodable(self, plan: StepPlan, slots_N: Tensor) -> Tensor:
        """``[N, B]`` bool: what the step would decode without eviction; leaves no trace in KV."""
        plan = replace(plan, prefill=[], num_top_logprobs=None)
        whole = DelayedCache(self.policy.attend_cached)
        processed_NB = whole.processing_set(self.state, slots_N)
        step = self._step_tensors(plan, slots_N, processed_NB)
        saved = self.cache.read(step.slot_T)
        chosen_NB = self._decide(plan, slots_N, processed_NB, step, None).chosen_NB
        self.cache.write(step.slot_T, saved)
        return chosen_NB

    def _step_tensors(self, plan: StepPlan, slots_N: Tensor, processed_NB: Tensor) -> StepTensors:
        """Every row is one block: blocks that decode, then the blocks of the prefill chunks."""
        state, block_length = self.state, self.state.block_length
        page_size = self.cache.page_size
        slots_R, starts_R = slots_N, state.block_start_M[slots_N]
        ids_RB, processed_RB = state.token_ids_MB[slots_N], processed_NB
        seen_RB = processed_NB
        if self.policy.attend_cached:
            seen_RB = processed_NB | state.decoded_MB[slots_N]
        if plan.prefill:
            blocks = [len(chunk.token_ids) // block_length for chunk in plan.prefill]
            prefill_slots = np.repeat([chunk.slot for chunk in plan.prefill], blocks)
            prefill_starts = np.concatenate(
                [
                    np.arange(chunk.start, chunk.start + len(chunk.token_ids), block_length)
                    for chunk in plan.prefill
                ]
            )
            prefill_ids = np.concatenate([chunk.token_ids for chunk in plan.prefill])
            prefill_ids_RB = self._int64(prefill_ids).view(-1, block_length)
            slots_R = torch.cat([slots_R, self._int64(prefill_slots)])
            starts_R = torch.cat([starts_R, self._int64(prefill_starts)])
            ids_RB = torch.cat([ids_RB, prefill_ids_RB])
            whole_RB = torch.ones_like(prefill_ids_RB, dtype=torch.bool)
            processed_RB = torch.cat([processed_RB, whole_RB])
            seen_RB = torch.cat([seen_RB, whole_RB])

        pages_needed = -(-plan.max_kv_len // page_size)
        page_table_RP = state.page_table_MP[slots_R, :pages_needed]
        page_R = page_table_RP.gather(1, (starts_R // page_size)[:, None])[:, 0].long()
        first_slot_R = page_R * page_size + starts_R % page_size
        rightmost_R = torch.where(seen_RB, self._offset_B, -1).amax(1)
        place_T = processed_RB.flatten().nonzero()[:, 0]
        row_T, position_T = place_T // block_length, place_T % block_length
        row_len_R = processed_RB.sum(1)
        return StepTensors(
            token_ids_T=ids_RB.flatten()[place_T],
            positions_T=starts_R[row_T] + position_T,
            kv_limit_T=(starts_R + rightmost_R + 1).int()[row_T],
            slot_T=first_slot_R[row_T] + position_T,
            page_table_SP=page_table_RP,
            row_offsets_S1=torch.cat([row_len_R.new_zeros(1), row_len_R.cumsum(0)]).int(),
            max_row_len=block_length,
            max_kv_len=plan.max_kv_len,
        )

    def _look(
        self, plan: StepPlan, slots_N: Tensor, hidden_TH: Tensor, row_Q: Tensor, place_Q: Tensor
    ) -> _Candidates:
        """Tokens and confidences of the retained masked positions; no other needs logits.

        Args:
            row_Q: where their hidden states stand in ``hidden_TH``.
            place_Q: where they stand in the blocks.
        """
        state, block_length = self.state, self.state.block_length
        shape = (len(slots_N), block_length)
        num_positions = shape[0] * shape[1]
        num_top = min(plan.num_top_logprobs or 0, self.vocab_size)
        token_T = torch.zeros(num_positions, dtype=torch.int64, device=state.device)
        confidence_T = torch.zeros(num_positions, device=state.device)
        logprob_T = torch.zeros(num_positions, device=state.device)
        top_id_TK = token_T.new_zeros(num_positions, num_top)
        top_logprob_TK = logprob_T.new_zeros(num_positions, num_top)

        at_once = max(1, LOGITS_BYTES // (self.cache.keys.itemsize * self.vocab_size))
        for rows, places in zip(row_Q.split(at_once), place_Q.split(at_once), strict=True):
            logits_QV = self.model.compute_logits(hidden_TH[rows])
            choice = choose_tokens(
                logits_QV,
                self._row_params(plan, slots_N, places),
                mask_token_id=state.mask_token_id,
                any_sampled=plan.any_sampled,
                any_filtered=plan.any_filtered,
            )
            token_T[places] = choice.token_R
            confidence_T[places] = choice.confidence_R
            logprob_T[places] = choice.logprob_R
            if num_top:
                best = logits_QV.log_softmax(1, dtype=torch.float32).topk(num_top, dim=1)
                top_id_TK[places], top_logprob_TK[places] = best.indices, best.values
        return _Candidates(
            token_T.view(shape),
            confidence_T.view(shape),
            logprob_T.view(shape),
            top_id_TK.view(*shape, num_top) if num_top else None,
            top_logprob_TK.view(*shape, num_top) if num_top else None,
        )

    def _row_params(self, plan: StepPlan, slots_N: Tensor, rows_Q: Tensor) -> RowParams:
        state, block_length = self.state, self.state.block_length
        slots_Q = slots_N[rows_Q // block_length]
        position_Q = state.block_start_M[slots_Q] + rows_Q % block_length
        suppressed_QK = None
        if plan.any_suppressed:
            too_early_Q = position_Q < state.suppress_before_M[slots_Q]
            suppressed_QK = state.suppressed_MK[slots_Q]
            suppressed_QK = suppressed_QK.masked_fill(~too_early_Q[:, None], state.mask_token_id)
        return RowParams(
            temperature_R=state.temperature_M[slots_Q],
            top_p_R=state.top_p_M[slots_Q],
            top_k_R=state.top_k_M[slots_Q],
            min_p_R=state.min_p_M[slots_Q],
            seed_R=state.seed_M[slots_Q],
            position_R=position_Q,
            step_R=state.denoising_step_M[slots_Q],
            suppressed_RK=suppressed_QK,
        )

    def _int64(self, values: np.ndarray) -> Tensor:
        return torch.as_tensor(values.astype(np.int64, copy=False)).to(self.state.device)


def _to_numpy(tensor: Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.cpu().numpy()
