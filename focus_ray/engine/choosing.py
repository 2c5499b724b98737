"""From hidden states to decoded tokens: logits, confidences, and the blocks that move on.

M slots, B block length, Q retained open tokens, V the rank's part of the vocabulary, K
alternatives. A token's place is ``slot * B + position``; one place more takes what belongs to
nobody.
"""

from __future__ import annotations

import torch
from torch import Tensor

from focus_ray.engine.block_state import BlockState
from focus_ray.engine.plan import StepPlan
from focus_ray.engine.sampler import RowParams, choose_tokens
from focus_ray.engine.shared_logits import best_alternatives
from focus_ray.kernels.advance_blocks import advance_blocks
from focus_ray.kernels.rows import Rows
from focus_ray.models.base import BlockDiffusionModel

LOGITS_BYTES = 512 << 20
"""Logits held at once; a vocabulary of 151936 takes 0.3 MB a row in bfloat16."""


class Choosing:
    """Looks at the open tokens that went through all layers; no other token needs logits.

    Args:
        vocab_size: width of the logits, those of all ranks together.

    Attributes:
        vocab_size: as given.
        token_MB, confidence_MB, logprob_MB: int64 and float32, what each retained open position
            would take; any value elsewhere.
        chosen_MB: bool, what the step decoded.
    """

    def __init__(
        self, model: BlockDiffusionModel, vocab_size: int, state: BlockState, rows: Rows
    ) -> None:
        self._model = model
        self._state = state
        self._rows = rows
        self.vocab_size = vocab_size
        shape = (state.num_slots, state.block_length)
        self.num_places = shape[0] * shape[1]

        def places(dtype: torch.dtype) -> Tensor:
            return torch.zeros(self.num_places + 1, dtype=dtype, device=state.device)

        self._token_P = places(torch.int64)
        self._confidence_P, self._logprob_P = places(torch.float32), places(torch.float32)
        self.token_MB = self._token_P[:-1].view(shape)
        self.confidence_MB = self._confidence_P[:-1].view(shape)
        self.logprob_MB = self._logprob_P[:-1].view(shape)
        self.chosen_MB = torch.zeros(shape, dtype=torch.bool, device=state.device)

    def look(
        self, hidden_RD: Tensor, row_Q: Tensor, place_Q: Tensor, plan: StepPlan
    ) -> tuple[Tensor, Tensor] | None:
        """Find the token and the confidence of every open position that is left.

        Args:
            row_Q: where their hidden states stand in ``hidden_RD``.
            place_Q: their places.

        Returns:
            Ids and log probabilities of the best alternatives, ``[M, B, K]``, when asked for.
        """
        num_top = min(plan.num_top_logprobs or 0, self.vocab_size)
        shape = (len(self._token_P), num_top)
        top_id_PK = self._token_P.new_zeros(shape) if num_top else None
        top_logprob_PK = self._logprob_P.new_zeros(shape) if num_top else None
        at_once = max(1, LOGITS_BYTES // (hidden_RD.itemsize * self.vocab_size))
        for rows, places in zip(row_Q.split(at_once), place_Q.split(at_once), strict=True):
            logits_QV = self._model.compute_logits(hidden_RD[rows])
            choice = choose_tokens(
                logits_QV,
                self._row_params(plan, places),
                mask_token_id=self._state.mask_token_id,
                any_sampled=plan.any_sampled,
                any_filtered=plan.any_filtered,
                shards=self._model.shards,
            )
            self._token_P[places] = choice.token_R
            self._confidence_P[places] = choice.confidence_R
            self._logprob_P[places] = choice.logprob_R
            if top_id_PK is not None and top_logprob_PK is not None:
                best = best_alternatives(logits_QV, num_top, self._model.shards)
                top_id_PK[places], top_logprob_PK[places] = best
        if top_id_PK is None or top_logprob_PK is None:
            return None
        shape_MBK = (*self.token_MB.shape, num_top)
        return top_id_PK[:-1].view(shape_MBK), top_logprob_PK[:-1].view(shape_MBK)

    def advance(self, kept_SB: Tensor, whole_blocks: bool, decodable_MB: Tensor | None) -> None:
        """Decode what deserves it, and move the blocks on."""
        advance_blocks(
            self._state.words,
            self._rows,
            kept_SB,
            self.token_MB,
            self.confidence_MB,
            self.logprob_MB,
            mask_token_id=self._state.mask_token_id,
            whole_blocks=whole_blocks,
            chosen_MB=self.chosen_MB,
            decodable_MB=decodable_MB,
        )

    def _row_params(self, plan: StepPlan, place_Q: Tensor) -> RowParams | None:
        if not (plan.any_sampled or plan.any_suppressed):
            return None
        words, length = self._state.words, self._state.block_length
        slot_Q = (place_Q // length).clamp_max(words.num_slots - 1)
        position_Q = words.scalar("block_start")[slot_Q].long() + place_Q % length
        suppressed_QK = None
        if plan.any_suppressed:
            too_early_Q = position_Q < words.scalar("suppress_before")[slot_Q]
            suppressed_QK = words.stop_ids_MK[slot_Q].long()
            suppressed_QK = suppressed_QK.masked_fill(
                ~too_early_Q[:, None], self._state.mask_token_id
            )
        return RowParams(
            temperature_R=words.scalar("temperature")[slot_Q],
            top_p_R=words.scalar("top_p")[slot_Q],
            top_k_R=words.scalar("top_k")[slot_Q].long(),
            min_p_R=words.scalar("min_p")[slot_Q],
            seed_R=words.seed_M[slot_Q],
            position_R=position_Q,
            step_R=words.scalar("denoising_step")[slot_Q].long(),
            suppressed_RK=suppressed_QK,
        )
