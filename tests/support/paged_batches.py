"""Ragged batches over paged KV, and their attention token by token in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Against float64 on the same rounded inputs: what is left is the rounding of weights and outputs.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Batch:
    """``rows`` lists the kv_limit of every token, row by row; ``unowned`` tokens stand behind."""

    rows: list[list[int]]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    page_size: int = 8
    same_pages: bool = False
    unowned: int = 0

    def inputs(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> dict[str, Any]:
        """Arguments of ``paged_attention``: random, the same every time."""
        generator = torch.Generator().manual_seed(len(self.rows))
        limits = [limit for row in self.rows for limit in row] + [1] * self.unowned
        num_rows, max_kv_len = len(self.rows), max(limits, default=1)
        pages_per_row = -(-max_kv_len // self.page_size) + 1  # one more than needed
        num_pages = num_rows * pages_per_row
        pages = torch.randperm(num_pages, generator=generator).view(num_rows, pages_per_row)
        row_table = torch.randperm(num_rows, generator=generator)
        if self.same_pages:
            row_table[:] = 0

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        kv_shape = (num_pages, self.page_size, self.num_kv_heads, self.head_dim)
        offsets = torch.tensor([0, *(len(row) for row in self.rows)]).cumsum(0)
        return {
            "q_THd": random(len(limits), self.num_heads, self.head_dim),
            "key_pages": random(*kv_shape),
            "value_pages": random(*kv_shape),
            "page_table_MP": pages.to(device, torch.int32),
            "row_table_S": row_table.to(device, torch.int32),
            "row_offsets_S1": offsets.to(device, torch.int32),
            "kv_limit_T": torch.tensor(limits, dtype=torch.int32, device=device),
            "max_row_len": max(map(len, self.rows)),
            "max_kv_len": max_kv_len,
            "busy_rows": max(sum(map(bool, self.rows)), 1),
            "scale": self.head_dim**-0.5,
        }

    def poison_unseen_slots(self, inputs: dict[str, Any]) -> None:
        """Write NaN and infinity where no token of the batch may look."""
        seen = torch.zeros(inputs["key_pages"].shape[:2], dtype=torch.bool)
        pages_SP = self._pages_of_rows(inputs)
        for row, limits in enumerate(self.rows):
            for position in range(max(limits, default=0)):
                seen[pages_SP[row, position // self.page_size], position % self.page_size] = True
        unseen = ~seen.to(inputs["key_pages"].device)
        inputs["key_pages"][unseen] = torch.nan
        inputs["value_pages"][unseen] = torch.inf

    def attend_token_by_token(self, inputs: dict[str, Any]) -> Tensor:
        """Written to be read: float64, one token and head at a time, on the CPU.

        Tokens of no row are left out.
        """
        group = self.num_heads // self.num_kv_heads
        q_THd, keys, values = (
            inputs[name].cpu().double() for name in ("q_THd", "key_pages", "value_pages")
        )
        pages_SP = self._pages_of_rows(inputs)
        tokens = [(row, limit) for row, limits in enumerate(self.rows) for limit in limits]
        out_THd = torch.empty_like(q_THd[: len(tokens)])
        for token, (row, limit) in enumerate(tokens):
            keys_NKd = keys[pages_SP[row]].flatten(0, 1)[:limit]
            values_NKd = values[pages_SP[row]].flatten(0, 1)[:limit]
            for head in range(self.num_heads):
                kv_head = head // group
                score_N = keys_NKd[:, kv_head] @ q_THd[token, head]
                weight_N = (score_N * inputs["scale"]).softmax(0)
                out_THd[token, head] = weight_N @ values_NKd[:, kv_head]
        return out_THd

    def _pages_of_rows(self, inputs: dict[str, Any]) -> Tensor:
        pages_SP: Tensor = inputs["page_table_MP"].cpu().long()[inputs["row_table_S"].cpu().long()]
        return pages_SP
