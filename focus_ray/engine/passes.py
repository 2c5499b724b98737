"""The forward pass of a step in two parts, on static buffers, so that each can be recorded.

The first part ends where eviction decides: embedding, layer 0, layer 1 up to its keys and values.
The second runs the rest for the tokens that are retained. Between them the host learns how many
these are. C tokens and S rows are the most of any step; D hidden size, H query heads, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from focus_ray.engine.cuda_graphs import Cut
from focus_ray.kernels.compact import Compacted
from focus_ray.kernels.retain import Retained
from focus_ray.kernels.rows import Rows
from focus_ray.models.base import BlockDiffusionModel, OnLayer
from focus_ray.models.eviction import Eviction
from focus_ray.models.kv_cache import KVCache
from focus_ray.models.step import StepTensors

USUAL_ROW_LEN = 8
"""Tokens of a row, by which attention guesses how many rows a step of some tokens has."""

CUTS = frozenset({1, 2, 8})
"""Layers before which a recording is cut. The host launches a layer of one sequence in about an
eighth of the time that the device runs it, and the first graph behind a wait is short."""


@dataclass(frozen=True)
class StepSize:
    """Tokens and rows of a part of a step, padding included."""

    num_tokens: int
    num_rows: int


class Passes:
    """Runs both parts of a pass over the tokens that ``rows`` names.

    Args:
        rows: planned before each step.
        num_slots: most sequences that decode at once.
        max_kv_len: KV positions of the longest sequence.
        importance_dtype, attend_cached: see ``retain``.

    Attributes:
        retained: what eviction chose; of use after ``head`` with ``by_importance``.
        kept: what goes through the later layers; of use after ``compact``, or after ``head`` where
            nothing is evicted.
        hidden_CD: what comes out behind the final norm.
    """

    def __init__(
        self,
        model: BlockDiffusionModel,
        cache: KVCache,
        rows: Rows,
        page_table_MP: Tensor,
        *,
        num_slots: int,
        max_kv_len: int,
        importance_dtype: torch.dtype,
        attend_cached: bool,
    ) -> None:
        self._model = model
        self._cache = cache
        self._rows = rows
        self._page_table_MP = page_table_MP
        self._num_slots = num_slots
        self._max_kv_len = max_kv_len
        num_rows, self._block_length = rows.processed_SB.shape
        num_tokens = len(rows.token_ids_C)
        device, dtype = rows.token_ids_C.device, model.dtype
        width, heads = model.hidden_size, model.query_shape
        self._x_CD = torch.zeros(num_tokens, width, dtype=dtype, device=device)
        self._q_CHd = torch.zeros(num_tokens, *heads, dtype=dtype, device=device)
        self.retained = Retained.allocate(num_rows, self._block_length, device)
        self.kept = Compacted.allocate(num_tokens, num_rows, width, heads, dtype, device)
        self.hidden_CD = torch.zeros_like(self._x_CD)
        self._eviction = Eviction(
            rows,
            self.retained,
            self.kept,
            trash_slot=cache.trash_slot,
            importance_dtype=importance_dtype,
            attend_cached=attend_cached,
            shards=model.shards,
        )

    @property
    def kept_SB(self) -> Tensor:
        """bool, what each row retains; of use after both ``head`` and ``compact``."""
        return self.retained.kept_NB

    def head(self, size: StepSize, by_importance: bool, cut: Cut) -> None:
        """Up to the keys and values of layer 1.

        With ``by_importance`` also the choice of what is retained, which ``compact`` is to follow.
        """
        step = self._processed(size)
        eviction = self._eviction if by_importance else None
        x_TD, q_THd = self._model.begin(step, self._cache, eviction, _cutting(cut))
        if by_importance:
            self._x_CD[: size.num_tokens].copy_(x_TD)
            self._q_CHd[: size.num_tokens].copy_(q_THd)
        else:
            self._keep_all(size, x_TD, q_THd)

    def compact(self, size: StepSize) -> None:
        """Leave out what is not retained."""
        n = size.num_tokens
        self._eviction.compact(self._x_CD[:n], self._q_CHd[:n], self._processed(size))

    def tail(self, size: StepSize, cut: Cut) -> None:
        """From the queries of layer 1 to the final norm."""
        kept, n = self.kept, size.num_tokens
        step = self._step(size, kept.positions_R, kept.kv_limit_R, kept.slot_R, kept.row_offsets_S1)
        x_RD, q_RHd = kept.x_RD[:n], kept.q_RHd[:n]
        hidden_RD = self._model.finish(x_RD, q_RHd, step, self._cache, _cutting(cut))
        self.hidden_CD[:n].copy_(hidden_RD)

    def _keep_all(self, size: StepSize, x_TD: Tensor, q_THd: Tensor) -> None:
        rows, kept, n = self._rows, self.kept, size.num_tokens
        kept.x_RD[:n].copy_(x_TD)
        kept.q_RHd[:n].copy_(q_THd)
        kept.positions_R[:n].copy_(rows.positions_C[:n])
        kept.slot_R[:n].copy_(rows.slot_C[:n])
        kept.kv_limit_R[:n].copy_(rows.kv_limit_C[:n])
        kept.row_offsets_S1.copy_(rows.row_offsets_S1)
        kept.open_row_Q[:n].copy_(rows.open_token_C[:n])
        kept.open_place_Q[:n].copy_(rows.open_place_C[:n])
        self.retained.kept_NB.copy_(rows.processed_SB)

    def _processed(self, size: StepSize) -> StepTensors:
        rows = self._rows
        return self._step(size, rows.positions_C, rows.kv_limit_C, rows.slot_C, rows.row_offsets_S1)

    def _step(
        self,
        size: StepSize,
        positions_C: Tensor,
        kv_limit_C: Tensor,
        slot_C: Tensor,
        row_offsets_S1: Tensor,
    ) -> StepTensors:
        n, s = size.num_tokens, size.num_rows
        least, most = -(-n // self._block_length), min(n, s, self._num_slots)
        return StepTensors(
            token_ids_T=self._rows.token_ids_C[:n],
            positions_T=positions_C[:n],
            kv_limit_T=kv_limit_C[:n],
            slot_T=slot_C[:n],
            page_table_MP=self._page_table_MP,
            row_table_S=self._rows.row_slot_S[:s],
            row_offsets_S1=row_offsets_S1[: s + 1],
            max_row_len=self._block_length,
            max_kv_len=self._max_kv_len,
            busy_rows=max(least, min(most, -(-n // USUAL_ROW_LEN)), 1),
        )


def _cutting(cut: Cut) -> OnLayer:
    def on_layer(layer_index: int) -> None:
        if layer_index in CUTS:
            cut()

    return on_layer
